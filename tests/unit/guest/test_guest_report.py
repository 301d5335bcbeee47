"""The parser of a report against everything a guest may write into it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmbackupd.errors import BackupError, GuestProtocolError, UncoveredVolume
from vmbackupd.guest import topology
from vmbackupd.guest.report import GuestReport, parse_report


def device(name: str, devno: str, kind: str = "disk", **more: object) -> dict[str, Any]:
    """A device as the helper reports it."""
    return {
        "name": name,
        "devno": devno,
        "type": kind,
        "size": 1 << 30,
        "logical_block": 512,
        "read_only": False,
        "removable": False,
        "serial": None,
        "wwn": None,
        "vendor": None,
        "model": None,
        "transport": "other",
        "pci": None,
        "target": None,
        "unit": None,
        "iscsi": None,
        "parent": None,
        "start": None,
        "slaves": [],
        "holders": [],
        "dm": None,
        "fstype": None,
        "fsuuid": None,
        "mounts": [],
        "swap": False,
        "backing": None,
        **more,
    }


def sample() -> dict[str, Any]:
    return {
        "boot_id": "b",
        "kernel": "6.1",
        "hostname": "h",
        "devices": [
            device(
                "sda",
                "8:0",
                holders=["253:0"],
                transport="iscsi",
                pci=None,
                target=0,
                unit=1,
                serial="s",
                wwn="600",
                iscsi={"iqn": "iqn.2000:x", "portal": "10.0.2.2:3260", "lun": 1},
            ),
            device("vda", "254:0", transport="virtio", pci="0000:03:00.0"),
            device(
                "vda1",
                "254:1",
                "part",
                parent="254:0",
                start=1 << 20,
                size=1 << 29,
                mounts=[{"path": "/", "fstype": "ext4", "options": "rw"}],
            ),
            device(
                "dm-0",
                "253:0",
                "dm",
                slaves=["8:0"],
                size=2048 * 512,
                swap=True,
                dm={
                    "name": "vg-lv",
                    "uuid": "LVM-x",
                    "table": [[0, 1024, "linear", "8:0 2048"], [1024, 1024, "linear", "8:0 9000"]],
                },
            ),
        ],
    }


def test_sample() -> None:
    report = parse_report(sample())
    lv = report.by_devno("253:0")
    assert lv is not None and lv.dm is not None and lv.dm.table[1].start == 1024
    assert report.partitions("254:0")[0].mounts[0].path == "/"
    sda = report.by_devno("8:0")
    assert sda is not None and sda.iscsi is not None and sda.iscsi.lun == 1


@pytest.mark.parametrize(
    ("at", "key", "value"),
    [
        (0, "devno", "8"),
        (0, "devno", "8:0:0"),
        (0, "devno", "99999:0"),
        (0, "devno", "254:0"),
        (0, "size", -1),
        (0, "size", 2**63),
        (0, "size", 1.5),
        (0, "size", True),
        (0, "type", "tape"),
        (0, "transport", ""),
        (0, "pci", "03:00.0"),
        (0, "name", ""),
        (0, "name", "x" * 300),
        (0, "serial", 7),
        (0, "serial", "a\0b"),
        (0, "iscsi", {}),
        (0, "iscsi", []),
        (0, "holders", ["9:9"]),
        (0, "holders", ["8:0"]),
        (0, "holders", "8:0"),
        (0, "holders", [8]),
        (0, "holders", ["x"] * 5000),
        (2, "start", None),
        (2, "start", 2**63 - 1),
        (2, "size", 1 << 31),
        (2, "parent", "9:9"),
        (1, "parent", "8:0"),
        (1, "start", 5),
        (0, "dm", {"name": "x", "uuid": "", "table": []}),
        (3, "dm", {"name": "x", "uuid": "", "table": [[0, 0, "linear", ""]]}),
        (3, "dm", {"name": "x", "uuid": "", "table": [[0, 8, "linear", ""], [9, 8, "linear", ""]]}),
        (3, "dm", {"name": "x", "uuid": "", "table": [[0, 8, "linear"]]}),
        (3, "dm", {"name": "x", "uuid": "", "table": [{}]}),
        (3, "dm", {"name": "x" * 200, "uuid": "", "table": []}),
        (2, "mounts", [{}]),
        (2, "mounts", [{"path": "/"}]),
        (0, "swap", None),
        (0, "read_only", "no"),
        (0, "logical_block", 0),
        (0, "unit", -1),
    ],
)
def test_wrong_value(at: int, key: str, value: object) -> None:
    raw = sample()
    raw["devices"][at][key] = value
    with pytest.raises(GuestProtocolError) as caught:
        parse_report(raw)
    assert len(str(caught.value)) < 1000


def test_too_many_devices() -> None:
    raw = sample()
    raw["devices"] = [device(f"sd{number}", f"8:{number}") for number in range(4097)]
    with pytest.raises(GuestProtocolError):
        parse_report(raw)


def test_too_many_rows() -> None:
    raw = sample()
    rows = [[number, 1, "linear", "8:0 0"] for number in range(40000)]
    raw["devices"] = [
        device(f"dm-{number}", f"253:{number}", "dm", dm={"name": "x", "uuid": "", "table": rows})
        for number in range(2)
    ]
    with pytest.raises(GuestProtocolError):
        parse_report(raw)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["8:0", "253:0", "dm"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def paths(value: object, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += paths(inner, (*at, key))
    return found


PATHS = paths(sample())


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON | st.just("__delete__")), min_size=1, max_size=4))
def test_mutations(changes: list[tuple[tuple[Any, ...], object]]) -> None:
    """A mutated report is refused, or everything that works on reports copes with it."""
    raw = copy.deepcopy(sample())
    for path, value in changes:
        try:
            inner: Any = raw
            for key in path[:-1]:
                inner = inner[key]
            if value == "__delete__":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took the place away
    try:
        report = parse_report(raw if isinstance(raw, dict) else {})
    except GuestProtocolError:
        return
    use(report)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["disk", "part", "dm", "md"]),
            st.integers(0, 2**40),
            st.lists(
                st.tuples(
                    st.integers(1, 2**40),
                    st.sampled_from(["linear", "striped", "crypt"]),
                    st.text("0123456789: -x", max_size=30),
                ),
                max_size=4,
            ),
            st.lists(st.integers(0, 5), max_size=3),
        ),
        max_size=6,
    )
)
def test_random_stacks(devices: list[tuple[str, int, list[tuple[int, str, str]], list[int]]]) -> None:
    """Tables that refer to each other in circles, past ends, to nothing."""
    raw = []
    for number, (kind, size, rows, others) in enumerate(devices):
        table, at = [], 0
        for length, target, params in rows:
            table.append(
                [at, length, target, f"253:{others[0] if others else 9} {length}" if len(params) > 20 else params]
            )
            at += length
        links = [f"253:{other}" for other in others if other < len(devices) and other != number]
        raw.append(
            device(
                f"d{number}",
                f"253:{number}",
                kind,
                size=size,
                slaves=links,
                holders=links[::-1],
                parent=links[0] if kind == "part" and links else None,
                start=0 if kind == "part" else None,
                dm={"name": f"v{number}", "uuid": "", "table": table} if kind == "dm" else None,
            )
        )
    try:
        report = parse_report({"boot_id": "b", "kernel": "", "hostname": "", "devices": raw})
    except GuestProtocolError:
        return
    use(report)


def use(report: GuestReport) -> None:
    json.dumps([item.name for item in topology.top_volumes(report)])
    for item in report.devices:
        topology.live_users(report, item.devno)
        topology.leaf_disks(report, item.devno)
        reason = topology.why_not_flat(report, item.devno)
        try:
            places = topology.flatten(report, item.devno)
        except BackupError as error:
            assert isinstance(error, UncoveredVolume)
            continue
        assert reason is None
        for place in places:
            disk = report.by_devno(place.disk)
            assert disk is not None and place.offset + place.length <= disk.size
