"""A real filesystem that is full: a clear error, nothing published, nothing lost, and room again afterwards."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require
from tests.unit.repository.repository_support import CHUNK, make, reopen, store
from vmbackupd.errors import RepositoryFull

ROOT = Path(__file__).parents[3]
MIB = 2**20


def test_a_full_filesystem(tmp_path: Path) -> None:
    """On a tmpfs of 16 MiB, in a mount namespace of its own: nothing is left of it, however the test ends."""
    possible = os.geteuid() == 0 and shutil.which("unshare") is not None
    require("root's rights and unshare", possible)
    program = f"{sys.executable} -m tests.unit.repository.test_full_disk {tmp_path}"
    script = f"mount -t tmpfs -o size=16m none {tmp_path} && exec {program}"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "passed\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def in_the_namespace(path: Path) -> None:
    """Back up until the filesystem is full, again and again, at different fill levels."""
    first = random.Random(1).randbytes(3 * MIB)
    with make(path) as repository:
        tree = store(repository, "one", first)
        used = taken(path)
        for turn in range(6):
            ballast = path / "ballast"
            ballast.write_bytes(bytes(2 * MIB * turn))
            with pytest.raises(RepositoryFull, match=str(path)):
                store(repository, "too-large", random.Random(turn + 2).randbytes(20 * MIB))
            ballast.unlink()
            repository.clean_up()
            assert taken(path) <= used + MIB, (taken(path), used)
            with reopen(path) as other:
                assert [summary.id for summary in other.backups()] == ["one"]
                assert other.image(tree).read(0, len(first)) == first
        second = random.Random(99).randbytes(100 * CHUNK)
        tree = store(repository, "two", second)
        assert repository.image(tree).read(0, len(second)) == second
    print("passed")


def taken(path: Path) -> int:
    """Bytes in use on the filesystem."""
    figures = os.statvfs(path)
    return (figures.f_blocks - figures.f_bfree) * figures.f_frsize


if __name__ == "__main__":
    in_the_namespace(Path(sys.argv[1]))
