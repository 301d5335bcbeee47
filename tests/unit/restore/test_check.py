"""What may be written where."""

from __future__ import annotations

import pytest

from vmbackupd.model import Consistency, Method, VolumeKind, VolumeRecord
from vmbackupd.restore.address import IscsiTarget, Target, TargetKind
from vmbackupd.restore.check import choose_writing
from vmbackupd.restore.plan import Content, Found, Writing

SIZE = 1 << 30
VDA = VolumeRecord("vda", VolumeKind.VIRTUAL, Method.GUEST_SNAPSHOT, Consistency.FILESYSTEM, SIZE, "tree")
QCOW2 = Target(TargetKind.QCOW2, "/x/vda.qcow2")
RAW = Target(TargetKind.RAW, "/x/vda.raw")
BLOCK = Target(TargetKind.BLOCK, "/dev/sdq")
LUN = Target(TargetKind.ISCSI, iscsi=IscsiTarget("h", 3260, "iqn.x:y", 1))


def choose(target: Target, found: Found, force: bool = False, in_place: bool = False,
           ) -> tuple[Writing, list[str], list[str]]:
    notes: list[str] = []
    problems: list[str] = []
    return choose_writing(VDA, target, found, force, notes, problems, in_place=in_place), notes, problems


@pytest.mark.parametrize(("target", "found", "writing"), [
    (QCOW2, Found(Content.ABSENT), Writing.CREATE),
    (RAW, Found(Content.ABSENT), Writing.CREATE),
    (QCOW2, Found(Content.EMPTY), Writing.REPLACE),
    (RAW, Found(Content.EMPTY), Writing.REPLACE),  # a file of no bytes
    (RAW, Found(Content.EMPTY, SIZE), Writing.IN_PLACE),
    (BLOCK, Found(Content.EMPTY, SIZE), Writing.IN_PLACE),
    (LUN, Found(Content.EMPTY, SIZE), Writing.IN_PLACE),
])
def test_what_holds_nothing_may_be_written(target: Target, found: Found, writing: Writing) -> None:
    assert choose(target, found) == (writing, [], [])


@pytest.mark.parametrize(("target", "found", "writing"), [
    (QCOW2, Found(Content.DATA, what="an image"), Writing.REPLACE),
    (RAW, Found(Content.DATA, SIZE, "an ext filesystem"), Writing.IN_PLACE),
    (BLOCK, Found(Content.DATA, SIZE, "an LVM physical volume"), Writing.IN_PLACE),
    (LUN, Found(Content.DATA, SIZE, "data"), Writing.IN_PLACE),
])
def test_what_holds_something_needs_force(target: Target, found: Found, writing: Writing) -> None:
    _, _, problems = choose(target, found)
    assert len(problems) == 1 and found.what in problems[0] and "--force" in problems[0]
    assert "volume vda" in problems[0] and str(target) in problems[0]
    assert choose(target, found, force=True) == (writing, [], [])


@pytest.mark.parametrize("target", [RAW, BLOCK, LUN])
def test_in_place_expects_data(target: Target) -> None:
    """It is what an in-place restore is for: no other word is needed, but what is in use stays refused."""
    assert choose(target, Found(Content.DATA, SIZE, "data"), in_place=True) == (Writing.IN_PLACE, [], [])
    assert len(choose(target, Found(Content.DATA, SIZE, "data", users=("a VM",)), in_place=True)[2]) == 1
    assert len(choose(target, Found(Content.DATA, SIZE - 512, "data"), in_place=True)[2]) == 1


def test_in_place_replaces_nothing_as_a_whole_without_force() -> None:
    found = Found(Content.DATA, what="an image")
    writing, _, problems = choose(QCOW2, found, in_place=True)
    assert writing is Writing.REPLACE and len(problems) == 1
    assert choose(QCOW2, Found(Content.DATA, SIZE, "an image"), in_place=True) == (Writing.IN_PLACE, [], [])
    assert choose(QCOW2, Found(Content.ABSENT), in_place=True) == (Writing.CREATE, [], [])


@pytest.mark.parametrize("target", [RAW, BLOCK, LUN])
def test_what_is_too_small_is_refused_with_force_too(target: Target) -> None:
    for content in (Content.EMPTY, Content.DATA):
        _, _, problems = choose(target, Found(content, SIZE - 512), force=True)
        assert len(problems) == 1 and "too small" in problems[0]
        assert str(SIZE) in problems[0] and str(SIZE - 512) in problems[0]


def test_what_is_in_use_is_refused_with_force_too() -> None:
    found = Found(Content.EMPTY, SIZE, users=("sdq1 is mounted at /", "sdq2 is part of dm-0"))
    _, _, problems = choose(BLOCK, found, force=True)
    assert len(problems) == 2 and "mounted at /" in problems[0] and "dm-0" in problems[1]


def test_a_larger_device_is_noted() -> None:
    _, notes, problems = choose(BLOCK, Found(Content.EMPTY, 2 * SIZE))
    assert not problems and len(notes) == 1 and "2.0 GiB" in notes[0]


def test_who_a_device_is_stands_in_the_refusal() -> None:
    found = Found(Content.DATA, SIZE, "data", identity=(("model", "Fast Disk"), ("wwn", "6001405abc")))
    assert "(model Fast Disk, wwn 6001405abc)" in choose(BLOCK, found)[2][0]
