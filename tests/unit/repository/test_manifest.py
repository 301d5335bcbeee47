"""The manifest: what goes in comes out, and nothing impossible comes out."""

from __future__ import annotations

import copy
import json
import random
from dataclasses import replace
from typing import Any

import pytest

from tests.unit.repository.repository_support import manifest, volume
from vmbackupd.errors import InvalidArgument, RepositoryCorrupt
from vmbackupd.model import Change, ChangeRecord, CoverageRecord, Method, RevertMode, Segment, VolumeKind, VolumeMap
from vmbackupd.repository import BackupSummary, Manifest, StoreRecord
from vmbackupd.repository.envelope import seal, unseal
from vmbackupd.repository.header import Header

TREE = "ab" * 32


def full() -> Manifest:
    return replace(
        manifest("web1-20260101T000000Z-00000001"),
        volumes=(
            volume(
                "vda", TREE, 1000, bytes_read=7, bytes_stored=5, reverted_chunks=3, details={"path": "/x", "n": [1]},
                change=ChangeRecord(Change.TRACKED, "web1-0", "", 4, 2, 1, "token", "pool.5.8388700"),
            ),
            replace(volume("wwn:0x1", TREE, 500), tree=None, t2_tree=TREE),
        ),
        revert=RevertMode.RESTORE,
        store=StoreRecord(TREE, 4096),
        volume_maps=(
            VolumeMap("root", 300, 0, 4096, (Segment(0, "vda", 100, 100), Segment(100, "wwn:0x1", 0, 200)), 9),
        ),
        coverage=(
            CoverageRecord("vda", "/dev/vda", VolumeKind.VIRTUAL, 1000, Method.GUEST_SNAPSHOT, "captured", ""),
            CoverageRecord("wwn:0x2", "/dev/sdb", VolumeKind.PASS_THROUGH, 7, None, "allowed", "no dm device"),
        ),
        config={"domain.xml": TREE},
        guest={"kernel": "6.1", "boot_id": "x"},
        tool_version="0.1.0",
    )


def test_round_trip() -> None:
    one = full()
    assert Manifest.from_json(json.loads(one.encode())) == one
    assert one.encode() == Manifest.from_json(one.to_json()).encode()
    assert one.trees() == [TREE] * 4


def test_a_manifest_from_before_there_were_increments_reads_as_full_backups() -> None:
    old = full().to_json()
    for item in old["volumes"]:
        del item["change"]
    assert {record.change for record in Manifest.from_json(old).volumes} == {ChangeRecord()}


def test_show_carries_the_proof() -> None:
    shown = full().to_json()
    assert {"t1", "t2", "freeze_ms", "volumes"} <= shown.keys()
    keys = {"id", "kind", "method", "consistency", "size", "bytes_read", "bytes_stored", "reverted_chunks"}
    assert all(keys <= item.keys() for item in shown["volumes"])


def test_summary() -> None:
    summary = BackupSummary.of(full())
    assert (summary.volumes, summary.size, summary.bytes_stored, summary.uncovered) == (2, 1500, 5, ("wwn:0x2",))
    assert json.loads(json.dumps(summary.to_json()))["vm"]["name"] == "web1"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("version",), 2, "version: manifest version 2"),
        (("id",), "../x", "id: "),
        (("t1",), "now", r"t1: expected a number"),
        (("freeze_ms",), -1, "freeze_ms: expected a number"),
        (("revert",), "never", "revert: expected one of backup, restore, both"),
        (("volumes", 0, "kind"), "odd", r"volumes\[0\]\.kind: expected one of virtual, pass-through"),
        (("volumes", 0, "size"), -1, r"volumes\[0\]\.size: expected an integer"),
        (("volumes", 1, "t2_tree"), "zz", r"volumes\[1\]\.t2_tree: "),
        (("volumes", 0, "details"), 5, r"volumes\[0\]\.details: expected an object"),
        (("volumes", 0, "change", "method"), "guessed", r"volumes\[0\]\.change\.method: expected one of full, tracked"),
        (("volumes", 0, "change", "missed"), -1, r"volumes\[0\]\.change\.missed: expected an integer"),
        (("store", "tree"), "", r"store\.tree: "),
        (("volume_maps", 0, "segments", 1, 0), 99, r"volume_maps\[0\]\.segments\[1\]\.volume_offset: expected 100"),
        (("volume_maps", 0, "segments", 1, 3), 0, r"volume_maps\[0\]\.segments\[1\]\.length: expected an integer"),
        (("volume_maps", 0, "segments", 1), [1], r"volume_maps\[0\]\.segments\[1\]: expected \[volume offset"),
        (("volume_maps", 0, "size"), 301, r"volume_maps\[0\]\.segments: they cover 300 bytes of a volume of 301"),
        (("coverage", 0, "reason"), None, r"coverage\[0\]\.reason: missing"),
        (("coverage", 1, "kind"), "x", r"coverage\[1\]\.kind: expected one of"),
        (("config", "domain.xml"), 1, r"config\.domain\.xml: expected a string"),
    ],
)
def test_strict(path: tuple[Any, ...], value: object, message: str) -> None:
    shown = full().to_json()
    inner: Any = shown
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(RepositoryCorrupt, match=f"^{message}"):
        Manifest.from_json(shown)


def test_any_damage_is_an_error_or_a_manifest() -> None:
    rng = random.Random(1)
    good = full().to_json()
    for _ in range(500):
        shown = copy.deepcopy(good)
        inner: Any = shown
        while isinstance(inner, (dict, list)) and inner:
            key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
            if rng.random() < 0.4:
                if rng.random() < 0.5 and isinstance(inner, dict):
                    del inner[key]
                else:
                    inner[key] = rng.choice([None, -1, 2**80, "", "x" * 70, [], {}, True, 1.5, float("inf"), [[]]])
                break
            inner = inner[key]
        try:
            Manifest.from_json(shown)
        except RepositoryCorrupt:
            pass


def test_what_cannot_be_read_back_is_not_written() -> None:
    for wrong in (
        replace(full(), id="a/b"),
        replace(full(), guest={"x": float("nan")}),
        replace(full(), guest={"x": object()}),
        replace(full(), config={"x": "no tree"}),
        replace(full(), freeze_ms=float("inf")),
    ):
        with pytest.raises(InvalidArgument):
            wrong.encode()


def test_envelope() -> None:
    rng = random.Random(2)
    header = Header.new(chunk_size=4096, fanout=16)
    sealed = seal(b"VMBKMANI", header, b"content")
    assert unseal(b"VMBKMANI", header, sealed, "x") == b"content"
    for length in range(len(sealed)):
        with pytest.raises(RepositoryCorrupt):
            unseal(b"VMBKMANI", header, sealed[:length], "x")
    for at in range(len(sealed)):
        damaged = bytearray(sealed)
        damaged[at] ^= 1 << rng.randrange(8)
        with pytest.raises(RepositoryCorrupt, match="^x "):
            unseal(b"VMBKMANI", header, bytes(damaged), "x")
    with pytest.raises(RepositoryCorrupt):
        unseal(b"VMBKMANI", Header.new(chunk_size=4096, fanout=16), sealed, "x")
    with pytest.raises(RepositoryCorrupt):
        unseal(b"VMBKINDX", header, sealed, "x")
