"""A capture by a real helper process, of a disk of this machine's own kernel that is tracked and written to."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.support import Start, listen
from tests.unit.guest.tracking import CHUNK, Disk, loop_disk, usable
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import GuestHelperError
from vmbackupd.guest.client import CAPTURED, REST, GuestHelper, open_data_channel
from vmbackupd.guest.replies import CaptureResult
from vmbackupd.units import MiB

pytestmark = pytest.mark.skipif(not usable(), reason="no root, BPF or loop devices")

SIZE = 24 * MiB + 512
LIMIT = 16 * MiB
OWN_BPFFS = """#!/bin/sh
exec unshare --mount sh -c 'mount -t bpf none /sys/fs/bpf && exec "$0" "$@"' {python} "$@"
"""


@pytest.fixture
def disk() -> Iterator[Disk]:
    file = Path(f"/dev/shm/vmbackupd-test-capture-{os.getpid()}")
    file.write_bytes(random.Random(1).randbytes(SIZE))
    try:
        with loop_disk(file, SIZE) as opened:
            yield opened
    finally:
        file.unlink()


@pytest.fixture
def process(tmp_path: Path, start_helper: Start) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """A helper that pins into a bpffs of its own, and the socket that is its data port."""
    python = tmp_path / "python"
    python.write_text(OWN_BPFFS.format(python=sys.executable))
    python.chmod(0o755)
    with listen(tmp_path / "data") as data:
        yield start_helper(python=str(python), keep=(data.fileno(),)), data


class Writer:
    """Writes here and there from ``start`` on, until it has done so for ``seconds``."""

    def __init__(self, disk: Disk, seconds: float) -> None:
        self.disk, self.seconds, self.began = disk, seconds, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        dice = random.Random(2)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            self.disk.write(CHUNK * dice.randrange(100), 4096, dice.randrange(1 << 30))
            self.began.set()

    def __enter__(self) -> None:
        self.thread.start()
        self.began.wait()

    def __exit__(self, *_: object) -> None:
        self.thread.join()


def content(disk: Disk) -> bytes:
    return b"".join(disk.read(at, min(MiB, SIZE - at)) for at in range(0, SIZE, MiB))


async def fetch(path: Path, export: str, length: int) -> bytes:
    channel = await open_data_channel(str(path), timeout=20)
    with channel:
        source = await asyncio.to_thread(NbdConnection, fd=channel.fileno(), export=export)
    try:
        assert source.size == length
        return await asyncio.to_thread(source.pread, 0, length)
    finally:
        source.close()


def shared_memory(process: subprocess.Popen[bytes]) -> int:
    """Bytes that the helper has in memory for a capture."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem")) * 1024


def test_a_disk_that_is_written_to(
    disk: Disk, process: tuple[subprocess.Popen[bytes], socket.socket], tmp_path: Path
) -> None:
    """The capture ends when the writer does; what was copied before, with what it took, is the disk at that moment."""
    running, data = process

    async def work() -> CaptureResult:
        helper = await GuestHelper.reconnect(str(tmp_path / "control"), vm="vm", job="j01234567")
        (tracked,) = await helper.track("test", {disk.devno: "disk"})
        assert tracked.tracking, tracked.reason
        await helper.collect(disk.devno)
        copied = bytearray(content(disk))
        for chunk in (3, 4, 5, 70, SIZE // CHUNK):
            disk.write(chunk * CHUNK, 512)
        before = shared_memory(running)
        assert await helper.prepare_capture([disk.devno], limit=LIMIT) == LIMIT
        assert shared_memory(running) >= before + LIMIT
        await helper.arm(60)
        with Writer(disk, 0.5):
            captured = await helper.capture([disk.devno], deadline=20)
        assert not await helper.disarm()
        expected = content(disk)
        disk.write(3 * CHUNK, 65536, seed=5)  # after it
        await helper.serve(f"fd:{data.fileno()}", {"disk": disk.devno})
        chunks = -(-SIZE // CHUNK)
        rest = Bitmap.from_bytes(await fetch(tmp_path / "data", f"disk{REST}", -(-chunks // 8)), chunks)
        image = await fetch(tmp_path / "data", f"disk{CAPTURED}", SIZE)
        for first, count in rest.runs():
            copied[first * CHUNK : (first + count) * CHUNK] = image[first * CHUNK : (first + count) * CHUNK]
        assert copied == expected
        assert captured.disks[0].chunks == rest.count() and captured.disks[0].bytes == rest.count() * CHUNK
        await helper.release()
        assert shared_memory(running) < before + MiB, "the memory is given back"
        await helper.untrack()
        await helper.close()
        return captured

    assert asyncio.run(work()).passes > 1


def test_too_much_and_never_still(
    disk: Disk, process: tuple[subprocess.Popen[bytes], socket.socket], tmp_path: Path
) -> None:
    async def attempt(limit: int, deadline: float) -> str:
        helper = await GuestHelper.reconnect(str(tmp_path / "control"), vm="vm", job="j01234567")
        await helper.track("test", {disk.devno: "disk"})
        await helper.prepare_capture([disk.devno], limit=limit)
        await helper.arm(60)
        disk.write(0, 2 * MiB)
        with Writer(disk, deadline + 0.2), pytest.raises(GuestHelperError) as caught:
            await helper.capture([disk.devno], deadline=deadline)
        await helper.disarm()
        await helper.release()
        await helper.untrack()
        await helper.close()
        return caught.value.reason

    assert asyncio.run(attempt(MiB, 10)) == "TooMuch"
    assert asyncio.run(attempt(LIMIT, 0.3)) == "NotStill"


def test_a_disk_that_nobody_tracks(
    disk: Disk, process: tuple[subprocess.Popen[bytes], socket.socket], tmp_path: Path
) -> None:
    async def attempt() -> None:
        helper = await GuestHelper.reconnect(str(tmp_path / "control"), vm="vm", job="j01234567")
        with pytest.raises(GuestHelperError) as caught:
            await helper.prepare_capture([disk.devno], limit=LIMIT)
        assert caught.value.reason == "NotTracked"
        await helper.close()

    asyncio.run(attempt())
