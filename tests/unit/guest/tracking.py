"""Disks of this machine's own kernel to be tracked: loop devices (requests), zram (bios), and a private bpffs."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmbackupd.guest_helper.marks import Marks
from vmbackupd.guest_helper.tracker import Trackers

CHUNK = 65536
_libc = ctypes.CDLL(None, use_errno=True)


def usable() -> bool:
    """Whether this machine lets us load programs and make disks."""
    return os.geteuid() == 0 and all(
        Path(path).exists() for path in ("/sys/fs/bpf", "/sys/kernel/btf/vmlinux", "/dev/loop-control")
    )


class Disk:
    """A block device. ``path`` and ``devno`` name it."""

    def __init__(self, path: str) -> None:
        self.path = path
        status = os.stat(path)
        self.devno = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._memory = mmap.mmap(-1, 16 << 20)

    @property
    def size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def write(self, offset: int, length: int, seed: int = 1) -> None:
        """Random bytes past the page cache: multiples of 512."""
        self.write_bytes(offset, random.Random(seed).randbytes(length))

    def write_bytes(self, offset: int, data: bytes) -> None:
        self._memory[: len(data)] = data
        assert os.pwritev(self._fd, [memoryview(self._memory)[: len(data)]], offset) == len(data)

    def read(self, offset: int, length: int) -> bytes:
        assert os.preadv(self._fd, [memoryview(self._memory)[:length]], offset) == length
        return self._memory[:length]

    def flush(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)


@contextmanager
def loop_disk(file: Path, size: int, *options: str) -> Iterator[Disk]:
    """A loop device over a new sparse file, or over one that is there."""
    if not file.exists():
        with open(file, "wb") as made:
            made.truncate(size)
    path = run("losetup", "--find", "--show", *options, str(file))
    try:
        disk = Disk(path)
        try:
            yield disk
        finally:
            disk.close()
    finally:
        run("losetup", "--detach", path)


@contextmanager
def zram_disk(size: int) -> Iterator[Disk]:
    """A disk whose driver takes bios."""
    number = Path("/sys/class/zram-control/hot_add").read_text().strip()
    try:
        Path(f"/sys/block/zram{number}/disksize").write_text(str(size))
        disk = Disk(f"/dev/zram{number}")
        try:
            yield disk
        finally:
            disk.close()
    finally:
        Path("/sys/class/zram-control/hot_remove").write_text(number)


class Tracking:
    """Tracks disks in a bpffs of its own, as one helper after the other does."""

    def __init__(self, bpffs: Path) -> None:
        self.bpffs = bpffs
        self.trackers = Trackers(str(bpffs))

    def helper(self) -> Trackers:
        """The next helper: the one before has ended."""
        self.trackers.close()
        self.trackers = Trackers(str(self.bpffs))
        return self.trackers

    def track(self, *disks: Disk, consumer: str = "host", identity: str = "wwn", limit: int = 64 << 20) -> list[dict]:  # type: ignore[type-arg]
        """A new helper tracks the disks; its answers."""
        asked = [{"device": disk.devno, "identity": identity} for disk in disks]
        answers: list[dict[str, object]] = self.helper().track({"consumer": consumer, "disks": asked, "limit": limit})[
            "disks"
        ]
        return answers

    def collect(self, disk: Disk) -> set[int]:
        """The chunks found by one collect."""
        count = self.trackers.collect(disk.devno)
        found = bits(self.trackers.fresh(disk.devno))
        assert len(found) == count
        return found

    def changed(self, disk: Disk) -> set[int]:
        """All that was collected since the generation."""
        return bits(self.trackers.changed(disk.devno))

    def backup(self, disk: Disk, generation: str) -> None:
        """A backup that is published."""
        self.track(disk)
        self.trackers.flip()
        self.trackers.settle(generation)

    def kinds(self, disk: Disk) -> set[int]:
        """The operations that have left marks which were not collected yet."""
        marks: Marks = self.trackers._disks[disk.devno].marks
        return set(marks._memory[marks.where.fine : marks.where.changed]) - {0}


def bits(bitmap: memoryview) -> set[int]:
    """The numbers of the bits that are set."""
    value = int.from_bytes(bitmap, "little")
    return {number for number in range(len(bitmap) * 8) if value >> number & 1}


def chunks(offset: int, length: int) -> set[int]:
    """Those that a range touches."""
    return set(range(offset // CHUNK, (offset + length - 1) // CHUNK + 1))


def pins(bpffs: Path) -> list[str]:
    """Everything pinned."""
    return sorted(str(path.relative_to(bpffs)) for path in bpffs.rglob("*") if not path.name.endswith(".debug"))


def unmount(path: Path) -> None:
    _libc.umount2(os.fsencode(path), 2)


def run(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout.strip()


def ranges(seed: int, size: int, count: int) -> Iterable[tuple[int, int]]:
    """Random places and lengths in sectors, most of them short."""
    dice = random.Random(seed)
    for _ in range(count):
        length = 512 * dice.choice((1, 2, 8, 8, 8, 127, 128, 129, 300, dice.randrange(1, 4096)))
        yield 512 * dice.randrange((size - length) // 512), length
