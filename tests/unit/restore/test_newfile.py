"""Files a restore makes: nothing of anybody else's is touched, and what is ours goes away again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmbackupd.errors import TargetRefused
from vmbackupd.host.newfile import NewFile, Withdraw
from vmbackupd.restore.files import WrittenFiles
from vmbackupd.restore.plan import BlobPlan, RestorePlan


class Record:
    """What a journal would hold."""

    def __init__(self) -> None:
        self.pending: list[tuple[str, str]] = []
        self.seen: list[tuple[str, str]] = []

    def __call__(self, undo: str, argument: str) -> Withdraw:
        entry = (undo, argument)
        assert not os.path.lexists(argument) or undo == "unlink", f"told of {entry} after it happened"
        self.pending.append(entry)
        self.seen.append(entry)
        return lambda: self.pending.remove(entry)


def fill(file: NewFile, data: bytes = b"new") -> None:
    with open(file.reserve(), "wb") as out:
        out.write(data)


def test_a_file_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    told, path = Record(), tmp_path / "x"
    file = NewFile(str(path), False, told)
    fill(file)
    assert not path.exists() and told.pending == [("unlink", f"{path}.part")]
    assert os.stat(file.part).st_mode & 0o777 == 0o600
    file.rename()
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["x"] and told.pending == [("unlink", str(path))]
    file.remove()
    assert os.listdir(tmp_path) == [] and told.pending == []


def test_a_replaced_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    told, path = Record(), tmp_path / "x"
    path.write_bytes(b"old")
    file = NewFile(str(path), True, told)
    fill(file)
    assert path.read_bytes() == b"old"
    file.remove()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]
    fill(file)
    file.rename()
    file.remove()  # takes nothing back: there is nothing to put in its place
    assert path.read_bytes() == b"new" and told.pending == [] and ("unlink", str(path)) not in told.seen


def test_a_part_of_another_restore_is_not_touched(tmp_path: Path) -> None:
    told = Record()
    (tmp_path / "x.part").write_bytes(b"theirs")
    file = NewFile(str(tmp_path / "x"), False, told)
    with pytest.raises(TargetRefused, match="x.part"):
        file.reserve()
    file.remove()
    assert (tmp_path / "x.part").read_bytes() == b"theirs" and told.pending == []


def test_a_file_that_came_up_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    told, path = Record(), tmp_path / "x"
    file = NewFile(str(path), False, told)
    fill(file)
    path.write_bytes(b"theirs")
    with pytest.raises(TargetRefused, match="was not there when the work began"):
        file.rename()
    file.remove()
    assert path.read_bytes() == b"theirs" and os.listdir(tmp_path) == ["x"] and told.pending == []


def test_a_link_in_the_place_of_the_part_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"theirs")
    (tmp_path / "x.part").symlink_to(tmp_path / "victim")
    with pytest.raises(TargetRefused):
        NewFile(str(tmp_path / "x"), False, Record()).reserve()
    assert (tmp_path / "victim").read_bytes() == b"theirs"


def plan(directories: tuple[str, ...], blobs: tuple[BlobPlan, ...]) -> RestorePlan:
    return RestorePlan("b", "web1", None, (), (), directories, blobs, None, (), (), (), False, False)


def test_small_files_and_directories_come_and_go(tmp_path: Path) -> None:
    told = Record()
    blobs = (BlobPlan("nvram", "1", f"{tmp_path}/a/b/n.fd"), BlobPlan("tpm", "2", f"{tmp_path}/t/u/tpm2/state"))
    files = WrittenFiles(plan((f"{tmp_path}/a", f"{tmp_path}/a/b"), blobs), told)
    files.make_directories()
    files.write({"1": b"vars", "2": b"state"})
    assert not os.path.exists(blobs[0].path)
    files.rename()
    assert Path(blobs[0].path).read_bytes() == b"vars" and Path(blobs[1].path).read_bytes() == b"state"
    assert {entry for entry in told.pending if entry[0] == "rmdir"} == {
        ("rmdir", f"{tmp_path}/{name}") for name in ("a", "a/b", "t", "t/u", "t/u/tpm2")}
    files.remove()
    assert os.listdir(tmp_path) == [] and told.pending == []


def test_a_directory_somebody_uses_is_left(tmp_path: Path) -> None:
    told = Record()
    files = WrittenFiles(plan((f"{tmp_path}/a",), ()), told)
    files.make_directories()
    (tmp_path / "a/theirs").touch()
    files.remove()
    assert (tmp_path / "a/theirs").exists() and told.pending == [("rmdir", f"{tmp_path}/a")]
