"""Where bytes lie and who uses a disk, on stacks as guests have them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from vmbackupd.errors import UncoveredVolume
from vmbackupd.guest import topology
from vmbackupd.guest.report import GuestReport, parse_report
from vmbackupd.guest.topology import Place
from vmbackupd.guest_helper.dm import Target
from vmbackupd.guest_helper.stack import Stack

MOUNT = [{"path": "/x", "fstype": "ext4", "options": "rw"}]


def device(name: str, devno: str, kind: str = "disk", size: int = 1 << 40, **more: object) -> dict[str, Any]:
    return {
        "name": name,
        "devno": devno,
        "type": kind,
        "size": size,
        "logical_block": 512,
        "read_only": False,
        "removable": False,
        "transport": "other",
        "slaves": [],
        "holders": [],
        "mounts": [],
        "swap": False,
        **more,
    }


def dm(
    number: int, table: Sequence[tuple[int, int, str, str]], name: str = "", uuid: str = "LVM-x", **more: object
) -> dict[str, Any]:
    size = sum(row[1] for row in table) * 512
    return device(
        f"dm-{number}",
        f"253:{number}",
        "dm",
        size,
        **more,
        dm={"name": name or f"v{number}", "uuid": uuid, "table": [list(row) for row in table]},
    )


def report(*devices: dict[str, Any]) -> GuestReport:
    return parse_report({"boot_id": "b", "kernel": "", "hostname": "", "devices": list(devices)})


def test_linear_over_a_partition() -> None:
    found = report(
        device("sda", "8:0"),
        device("sda1", "8:1", "part", 1 << 30, parent="8:0", start=1 << 20),
        dm(0, [(0, 100, "linear", "8:1 2048"), (100, 50, "linear", "8:1 2148"), (150, 7, "linear", "8:0 7")]),
    )
    assert topology.flatten(found, "253:0") == (
        Place("8:0", (1 << 20) + 2048 * 512, 150 * 512),
        Place("8:0", 7 * 512, 7 * 512),
    )
    assert topology.flatten(found, "8:1") == (Place("8:0", 1 << 20, 1 << 30),)
    assert topology.leaf_disks(found, "8:1") == {"8:0"}


def test_volume_on_volumes() -> None:
    found = report(
        device("sda", "8:0"),
        device("sdb", "8:16"),
        dm(0, [(0, 10, "linear", "8:0 100"), (10, 10, "linear", "8:16 500")]),
        dm(1, [(0, 8, "linear", "253:0 6")]),
    )
    assert topology.flatten(found, "253:1") == (Place("8:0", 106 * 512, 4 * 512), Place("8:16", 500 * 512, 4 * 512))


def test_a_multipath_device_stands_for_its_disk() -> None:
    table = [(0, 1000, "multipath", "0 0 1 1 service-time 0 2 2 8:0 1 1 8:16 1 1")]
    part = [(0, 100, "linear", "253:0 50")]
    found = report(
        device("sda", "8:0", size=512000, holders=["253:0"]),
        device("sdb", "8:16", size=512000, holders=["253:0"]),
        dm(0, table, "mpatha", slaves=["8:0", "8:16"], holders=["253:1"]),
        dm(1, part, "mpatha-part1", slaves=["253:0"], mounts=MOUNT),
    )
    assert topology.flatten(found, "253:1") == (Place("253:0", 50 * 512, 100 * 512),)
    assert topology.leaf_disks(found, "253:1") == {"253:0"}
    assert [(user.devno, user.volume) for user in topology.live_users(found, "253:0")] == [("253:1", "253:1")]
    tables = {"253:0": [Target(*row) for row in table], "253:1": [Target(*row) for row in part]}
    assert [tuple(piece) for piece in Stack(None, tables).pieces("253:1")] == [(0, "253:0", 50 * 512, 100 * 512)]


@pytest.mark.parametrize("seed", range(20))
def test_stripes_byte_for_byte(seed: int) -> None:
    """Against the definition: sector s is in chunk s // chunk; chunk c lies on stripe c % n as its chunk c // n."""
    dice = random.Random(seed)
    count, chunk = dice.randint(1, 4), dice.choice([1, 2, 8])
    starts = [dice.randrange(1000) * 10000 for _ in range(count)]
    length = count * chunk * dice.randint(1, 6)
    params = f"{count} {chunk} " + " ".join(f"8:{index} {start}" for index, start in enumerate(starts))
    first = dice.randrange(length)
    found = report(
        *(device(f"sd{index}", f"8:{index}") for index in range(count)),
        dm(0, [(0, 5, "linear", "8:0 99"), (5, length, "striped", params)]),
        dm(1, [(0, 5 + length - first, "linear", f"253:0 {first}")]),
    )
    expected = []
    for sector in range(first, 5 + length):
        if sector < 5:
            expected.append(("8:0", 99 + sector))
        else:
            index, within = divmod(sector - 5, chunk)
            expected.append((f"8:{index % count}", starts[index % count] + index // count * chunk + within))
    places = topology.flatten(found, "253:1")
    assert [(place.disk, place.offset // 512 + i) for place in places for i in range(place.length // 512)] == expected


@pytest.mark.parametrize("seed", range(10))
def test_helper_places_bytes_alike(seed: int) -> None:
    """The guest's own map, for what it serves, and the host's, for what it reverts, are the same."""
    dice = random.Random(seed)
    tables = {}
    for number in range(4):
        rows, at = [], 0
        for _ in range(dice.randint(1, 4)):
            below = f"253:{dice.randrange(number)}" if number and dice.random() < 0.5 else f"9999:{dice.randrange(2)}"
            length, offset = 64, dice.randrange(4) * 16
            if below.startswith("253") and sum(row[1] for row in tables[below]) < 64 + offset:
                below = "9999:0"
            if dice.random() < 0.3:
                rows.append((at, length, "striped", f"2 16 9999:0 {offset} 9999:1 {offset}"))
            else:
                rows.append((at, length, "linear", f"{below} {offset}"))
            at += length
        tables[f"253:{number}"] = rows
    found = report(
        device("sda", "9999:0"), device("sdb", "9999:1"), *(dm(number, tables[f"253:{number}"]) for number in range(4))
    )
    stack = Stack(None, {devno: [Target(*row) for row in rows] for devno, rows in tables.items()})
    for devno in tables:
        joined: list[Place] = []
        for piece in stack.pieces(devno):
            last = joined[-1] if joined else None
            if last is not None and (last.disk, last.offset + last.length) == (piece.disk, piece.disk_offset):
                joined[-1] = Place(last.disk, last.offset, last.length + piece.length)
            else:
                joined.append(Place(piece.disk, piece.disk_offset, piece.length))
        assert tuple(joined) == topology.flatten(found, devno)


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        ([dm(0, [(0, 8, "crypt", "aes - 0 8:0 0")])], "target crypt"),
        ([dm(0, [(0, 8, "thin", "253:1 1")])], "target thin"),
        ([dm(0, [(0, 8, "linear", "9:9 0")])], "does not report"),
        ([dm(0, [(0, 8, "linear", "253:0 0")])], "itself|too deep|levels deep"),
        ([dm(0, [(0, 8, "linear", "8:0")])], "does not parse"),
        ([dm(0, [(0, 8, "linear", "8:0 -1")])], "does not parse"),
        ([dm(0, [(0, 8, "striped", "2 4 8:0 0")])], "does not parse"),
        ([dm(0, [(0, 8, "striped", "0 0")])], "does not parse"),
        ([dm(0, [(0, 8, "striped", "3 1 8:0 0 8:0 0 8:0 0")])], "does not parse"),
        ([dm(0, [])], "no table"),
        ([dm(0, [(0, 8, "linear", "9:0 0")]), device("md0", "9:0", "md")], "md device"),
    ],
)
def test_what_cannot_be_placed(devices: list[dict[str, Any]], reason: str) -> None:
    found = report(device("sda", "8:0"), *devices)
    why = topology.why_not_flat(found, "253:0")
    assert why is not None
    with pytest.raises(UncoveredVolume, match=reason):
        topology.flatten(found, "253:0")


def test_past_the_end() -> None:
    found = report(device("sda", "8:0", size=4096), dm(0, [(0, 8, "linear", "8:0 1")]))
    with pytest.raises(UncoveredVolume, match="past the end"):
        topology.flatten(found, "253:0")


def test_too_many_pieces() -> None:
    found = report(device("sda", "8:0", size=2**62), dm(0, [(0, 2**40, "striped", "1 1 8:0 0")]))
    with pytest.raises(UncoveredVolume, match="more than"):
        topology.flatten(found, "253:0")


def plain_guest() -> GuestReport:
    """Root on a partition, /boot beside a PV, a LUN with LVM, one with LUKS on LVM, one with a bare filesystem."""
    return report(
        device("vda", "254:0"),
        device("vda1", "254:1", "part", 1 << 30, parent="254:0", start=1 << 20, mounts=[{**MOUNT[0], "path": "/boot"}]),
        device("vda2", "254:2", "part", 1 << 35, parent="254:0", start=1 << 31, holders=["253:0", "253:1"]),
        dm(0, [(0, 8, "linear", "254:2 2048")], "vg-root", slaves=["254:2"], mounts=[{**MOUNT[0], "path": "/"}]),
        dm(1, [(0, 8, "linear", "254:2 4096")], "vg-swap", slaves=["254:2"], swap=True),
        device("sda", "8:0", holders=["253:2"]),
        dm(2, [(0, 8, "linear", "8:0 2048")], "san-db", slaves=["8:0"], holders=["253:3"]),
        dm(3, [(0, 8, "crypt", "aes - 0 253:2 0")], "db-open", "CRYPT-x", slaves=["253:2"], mounts=MOUNT),
        device("sdb", "8:16", mounts=MOUNT),
        device("sdc", "8:32", holders=["253:4", "253:5"]),
        dm(4, [(0, 8, "linear", "8:32 2048")], "raw-vm", slaves=["8:32"]),
        dm(5, [(0, 8, "linear", "8:32 2048")], "vmbk-j0-0-real", "VMBK-j0-0-real", slaves=["8:32"]),
        device("sdd", "8:48", holders=["9:0"]),
        device("md0", "9:0", "md", slaves=["8:48"], mounts=MOUNT),
        device("sde", "8:64"),
    )


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        ("254:0", [("filesystem", "253:0", "253:0"), ("swap", "253:1", "253:1"), ("filesystem", "254:1", None)]),
        ("8:0", [("filesystem", "253:3", "253:2")]),
        ("8:16", [("filesystem", "8:16", None)]),
        ("8:32", [("volume", "253:4", "253:4")]),
        ("8:48", [("filesystem", "9:0", None)]),
        ("8:64", []),
        ("1:1", []),
    ],
)
def test_live_users(disk: str, expected: list[tuple[str, str, str | None]]) -> None:
    users = topology.live_users(plain_guest(), disk)
    assert [(user.kind, user.devno, user.volume) for user in users] == expected


def test_top_volumes() -> None:
    assert [volume.devno for volume in topology.top_volumes(plain_guest())] == ["253:0", "253:1", "253:2", "253:4"]


def test_snapshots_of_a_backup_are_no_users() -> None:
    found = plain_guest()
    assert all("vmbk" not in user.what for disk in ("8:32",) for user in topology.live_users(found, disk))


def test_deep_diamonds_end_soon() -> None:
    """Each volume lies twice on the one below: without care every level doubles the work."""
    found = report(
        device("sda", "8:0"),
        *(
            dm(
                number,
                [(0, 8, "linear", f"{below} 0"), (8, 8, "linear", f"{below} 0")],
                slaves=[below],
                holders=[f"253:{number + 1}"] if number < 60 else [],
            )
            for number in range(61)
            for below in ["8:0" if not number else f"253:{number - 1}"]
        ),
    )
    assert topology.why_not_flat(found, "253:60") is not None
    topology.live_users(found, "8:0")
    topology.top_volumes(found)
