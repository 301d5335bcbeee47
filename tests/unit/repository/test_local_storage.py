"""The local directory: objects whole or not at all, claims that end with their process, errors with a place."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmbackupd.errors import RepositoryFull, RepositoryMissing, StorageError
from vmbackupd.repository import LocalStorage, ObjectInfo
from vmbackupd.repository.local import TEMPORARY


@pytest.fixture(params=["unnamed", "named", "rename"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStorage:
    """On a filesystem that can everything, one without O_TMPFILE, one without hard links either."""
    made = LocalStorage(tmp_path / "store")
    made.create()
    if request.param != "unnamed":
        made._unnamed = False
    if request.param == "rename":

        def no_links(*_: object, **__: object) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", no_links)
    return made


def test_objects(storage: LocalStorage) -> None:
    assert storage.put_if_absent("packs/ab/abcd", [b"one", bytearray(b"two"), memoryview(b"three")])
    assert not storage.put_if_absent("packs/ab/abcd", [b"other"])
    assert storage.get("packs/ab/abcd") == b"onetwothree"
    assert storage.get("packs/ab/abcd", 3, 3) == b"two"
    assert storage.get("packs/ab/abcd", 9, 100) == b"ee"
    assert storage.get("packs/ab/abcd", 100) == b""
    assert storage.stat("packs/ab/abcd") == ObjectInfo("packs/ab/abcd", 11)
    assert storage.put_if_absent("packs/cd/cdef", [])
    assert storage.put_if_absent("manifests/vm-1", [b"x"])
    assert {info.name for info in storage.list("packs/")} == {"packs/ab/abcd", "packs/cd/cdef"}
    assert list(storage.list("packs/ab/abc")) == [ObjectInfo("packs/ab/abcd", 11)]
    assert list(storage.list("packs/ab/x")) == list(storage.list("nothing/")) == []
    assert storage.delete("packs/ab/abcd")
    assert not storage.delete("packs/ab/abcd")
    assert storage.stat("packs/ab/abcd") is None
    for call in (storage.get, storage.open):
        with pytest.raises(FileNotFoundError):
            call("packs/ab/abcd")
    assert (storage.free_bytes() or 0) > 0
    assert not list(storage.path.rglob(f"{TEMPORARY}*"))


def test_files_are_private(storage: LocalStorage) -> None:
    storage.put_if_absent("packs/ab/abcd", [b"x"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in [storage.path, *storage.path.rglob("*")])


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../b", "a//b", ".hidden", "a/.tmp-x", "a/b/c/d", "a\0b", "ü"]
)
def test_refused_names(storage: LocalStorage, name: str) -> None:
    for call in (storage.get, storage.open, storage.stat, storage.delete, lambda name: storage.put_if_absent(name, [])):
        with pytest.raises(ValueError):
            call(name)


def test_failed_write_leaves_nothing(storage: LocalStorage) -> None:
    def parts() -> object:
        yield b"one"
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError):
        storage.put_if_absent("packs/ab/abcd", parts())  # type: ignore[arg-type]
    assert list(storage.list("packs/")) == []
    assert not [path for path in storage.path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, RepositoryFull),
        (errno.EDQUOT, RepositoryFull),
        (errno.EIO, StorageError),
        (errno.EROFS, StorageError),
    ],
)
def test_errors_name_the_place(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, code: int, expected: type[Exception]
) -> None:
    for function in ("write", "fsync"):

        def fail(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            with pytest.raises(expected, match="store/packs/ab/abcd"):
                storage.put_if_absent("packs/ab/abcd", [b"x"])
        assert list(storage.list("packs/")) == [] or function == "fsync"


def test_missing_directory(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "absent")
    for call in (lambda: storage.get("a"), lambda: list(storage.list("a/")), lambda: storage.put_if_absent("a", [])):
        with pytest.raises(RepositoryMissing, match="repository init"):
            call()
    with pytest.raises(StorageError, match="does not exist"):
        LocalStorage(tmp_path / "absent" / "deeper").create()


def test_directory_removed_while_in_use(storage: LocalStorage) -> None:
    storage.put_if_absent("packs/ab/abcd", [b"x"])
    subprocess.run(["rm", "-r", str(storage.path / "packs")], check=True)
    with pytest.raises(StorageError, match="removed"):
        storage.put_if_absent("packs/ab/abce", [b"x"])
    assert storage.put_if_absent("packs/ab/abce", [b"x"])


def test_claims(storage: LocalStorage) -> None:
    claim = storage.claim("sessions/one", b"who")
    assert storage.get("sessions/one") == b"who"
    assert not storage.abandoned("sessions/one")
    with pytest.raises(StorageError):
        storage.claim("sessions/one", b"other")
    claim.release()
    claim.release()
    assert storage.stat("sessions/one") is None
    assert not storage.abandoned("sessions/one")


def test_claim_of_a_killed_process(storage: LocalStorage) -> None:
    program = (
        "import sys; from vmbackupd.repository import LocalStorage\n"
        f"claim = LocalStorage({str(storage.path)!r}).claim('sessions/one', b'who')\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert not storage.abandoned("sessions/one")
        child.kill()
    assert storage.abandoned("sessions/one")


def test_leftovers(storage: LocalStorage) -> None:
    storage.put_if_absent("packs/ab/abcd", [b"x"])
    left = storage.path / "packs" / "ab" / f"{TEMPORARY}0123"
    left.write_bytes(b"half")
    assert [info.name for info in storage.list("packs/")] == ["packs/ab/abcd"]

    def parts() -> object:
        yield b"one"
        assert storage.remove_temporaries() == 1  # not the one that is being written
        yield b"two"

    assert storage.put_if_absent("packs/ab/abce", parts())  # type: ignore[arg-type]
    assert storage.get("packs/ab/abce") == b"onetwo"
    assert not left.exists()


def test_a_claim_that_is_released_while_somebody_looks(tmp_path: Path) -> None:
    """Its file was opened before it was removed, and can be locked after: that is no sign of a death."""
    storage = LocalStorage(tmp_path)
    claim = storage.claim("sessions/one", b"who")
    look = storage.open

    def open_and_release(name: str) -> int:
        descriptor = look(name)
        claim.release()
        return descriptor

    storage.open = open_and_release  # type: ignore[method-assign]
    assert not storage.abandoned("sessions/one")
