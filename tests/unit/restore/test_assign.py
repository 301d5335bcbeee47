"""Which volume goes where, and what is refused before any target is looked at."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmbackupd.errors import InvalidArgument
from vmbackupd.model import Consistency, Method, VolumeKind, VolumeRecord
from vmbackupd.restore.address import TargetKind
from vmbackupd.restore.assign import assign_targets
from vmbackupd.restore.check import missing_directories, path_problems


def record(name: str, kind: VolumeKind = VolumeKind.VIRTUAL) -> VolumeRecord:
    return VolumeRecord(name, kind, Method.GUEST_SNAPSHOT, Consistency.FILESYSTEM, 1 << 20, "tree")


LUN = "iscsi:iqn.2024-01.org.example:d/1"
VOLUMES = (record("vda"), record("vdb"), record(LUN, VolumeKind.PASS_THROUGH))


def test_a_directory_takes_everything() -> None:
    targets = assign_targets("web1", VOLUMES, {}, "/new")
    assert {volume: str(target) for volume, target in targets.items()} == {
        "vda": "/new/vda.qcow2", "vdb": "/new/vdb.qcow2", LUN: "/new/iscsi_iqn.2024-01.org.example_d_1.raw"}


def test_a_stated_target_counts_more_than_the_directory() -> None:
    stated = {"vda": "/other/system.img", "vdb": "none", LUN: "iscsi://h/iqn.x:y/3"}
    targets = assign_targets("web1", VOLUMES, stated, "/new")
    vda, lun = targets["vda"], targets[LUN]
    assert vda is not None and vda.kind is TargetKind.RAW and lun is not None and lun.kind is TargetKind.ISCSI
    assert targets["vdb"] is None


def test_without_a_directory_every_volume_needs_a_target() -> None:
    with pytest.raises(InvalidArgument) as caught:
        assign_targets("web1", VOLUMES, {"vda": "/new/vda.qcow2"}, None)
    text = str(caught.value)
    assert "vdb (virtual)" in text and f"{LUN} (pass-through)" in text and "vda" not in text.split(":")[1]
    assert "--volume VOLUME=TARGET" in text and "--to" in text and "iscsi://" in text


def test_an_unknown_volume_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="no volume vdz.*vda, vdb, iscsi:"):
        assign_targets("web1", VOLUMES, {"vdz": "/x"}, "/new")


def test_nothing_to_restore_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="nothing to restore"):
        assign_targets("web1", VOLUMES[:1], {"vda": "none"}, "/new")


@pytest.mark.parametrize("stated", [
    {"vda": "/new/vdb.qcow2"}, {"vda": "/x/../new/vdb.qcow2"},
    {"vda": "iscsi://a/iqn.x/1", LUN: "iscsi://b:3261/iqn.x/1"},  # two portals of one target
])
def test_two_volumes_never_share_a_target(stated: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="would both be written"):
        assign_targets("web1", VOLUMES, stated, "/new")


def test_two_names_of_one_file_are_one_target(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.link(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    for other in ("b", "c"):
        with pytest.raises(InvalidArgument, match="would both be written"):
            assign_targets("web1", VOLUMES[:2], {"vda": str(tmp_path / "a"), "vdb": str(tmp_path / other)}, None)


def test_a_link_is_followed_to_the_file_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link.qcow2").symlink_to(tmp_path / "real")
    target = assign_targets("web1", VOLUMES[:1], {"vda": str(tmp_path / "link.qcow2")}, None)["vda"]
    assert target is not None and target.file == str(tmp_path / "real") and target.kind is TargetKind.QCOW2


def test_the_directory_is_absolute() -> None:
    with pytest.raises(InvalidArgument, match="absolute"):
        assign_targets("web1", VOLUMES, {}, "new")


def test_only_the_stated_directory_is_made(tmp_path: Path) -> None:
    new = str(tmp_path / "a/b")
    targets = assign_targets("web1", VOLUMES[:2], {"vdb": str(tmp_path / "typo/vdb.raw")}, new)
    problems: list[str] = []
    assert path_problems(new, targets, problems) == (str(tmp_path / "a"), new)
    assert len(problems) == 1 and "volume vdb" in problems[0] and "does not exist" in problems[0]


def test_a_file_in_the_way_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    problems: list[str] = []
    for new in (str(tmp_path / "a"), str(tmp_path / "a/b")):
        path_problems(new, assign_targets("web1", VOLUMES[:1], {}, new), problems)
    assert len(problems) == 2


def test_a_cut_off_restore_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "vda.qcow2.part").touch()
    problems: list[str] = []
    path_problems(str(tmp_path), assign_targets("web1", VOLUMES[:1], {}, str(tmp_path)), problems)
    assert len(problems) == 1 and "vda.qcow2.part exists" in problems[0]


def test_missing_directories_come_outermost_first(tmp_path: Path) -> None:
    assert missing_directories(str(tmp_path)) == ()
    assert missing_directories(f"{tmp_path}/a//b/") == (f"{tmp_path}/a", f"{tmp_path}/a/b")
