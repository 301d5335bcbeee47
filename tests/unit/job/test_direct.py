"""A LUN that the host reads while the guest writes to it: with the kernel's order of things the result is T1."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.randoms import rng
from tests.engine.stores import make_store, room_for
from vmbackupd.config import parse
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.memory import MemorySink
from vmbackupd.guest_helper.exceptions import Exceptions, Store
from vmbackupd.guest_helper.image import Device
from vmbackupd.guest_helper.stack import Piece
from vmbackupd.hypervisor.base import DiskSource
from vmbackupd.job import direct
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.observer import JobObserver
from vmbackupd.job.reading import Reading
from vmbackupd.model import ChangeRecord, Method, VolumeKind

__all__ = ["rng"]

CHUNK = 65536
SNAPSHOT_CHUNK = 65536
DISK = "8:0"


class Kernel:
    """A guest's disk of two volumes that lie apart from the borders of its chunks, and the COW store of each. A write
    goes the way of dm-snapshot: old content and its entry first, then the disk."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.rng, self.directory = rng, directory
        self.size = 300 * CHUNK + 512 * rng.randrange(1, 100)
        self.disk = directory / "lun"
        self.t1 = b"".join(rng.choice([rng.randbytes, bytes])(CHUNK) for _ in range(301))[: self.size]
        self.disk.write_bytes(self.t1)
        border = 512 * rng.randrange(1000, 2000)
        self.volumes = [
            [Piece(0, DISK, 1024, border)],
            [
                Piece(0, DISK, 5 * CHUNK + border + 512, 7 * CHUNK),
                Piece(7 * CHUNK, DISK, 200 * CHUNK + 1536, 90 * CHUNK),
            ],
        ]
        self.olds: list[list[int]] = [[], []]
        for number in (0, 1):
            self._write_store(number)

    def volume_size(self, number: int) -> int:
        return sum(piece.length for piece in self.volumes[number])

    def _write_store(self, number: int) -> None:
        room = room_for(-(-self.volume_size(number) // SNAPSHOT_CHUNK), SNAPSHOT_CHUNK)
        store, _ = make_store(self.olds[number], SNAPSHOT_CHUNK, room, self.rng)
        (self.directory / f"cow{number}").write_bytes(store)

    def write_somewhere(self) -> None:
        number = self.rng.randrange(2)
        at = 512 * self.rng.randrange(self.volume_size(number) // 512)
        old = at // SNAPSHOT_CHUNK
        if old not in self.olds[number]:
            self.olds[number].append(old)
            self._write_store(number)
        piece = next(piece for piece in self.volumes[number] if piece.offset <= at < piece.offset + piece.length)
        with open(self.disk, "r+b") as disk:
            os.pwrite(disk.fileno(), self.rng.randbytes(512), piece.disk_offset + at - piece.offset)

    def exceptions(self) -> Bitmap:
        """What the helper serves: its own code reads the stores."""
        stores = [
            (Store(Device(str(self.directory / f"cow{number}")), self.volume_size(number)), pieces)
            for number, pieces in enumerate(self.volumes)
        ]
        export = Exceptions(DISK, self.size, stores)
        export.open()
        data = b"".join(block.data or bytes(block.length) for block in export.read(0, export.size))
        return Bitmap.from_bytes(data, -(-self.size // CHUNK))


def context(directory: Path, direct: str = "auto") -> BackupContext:
    """What of a job counts here."""
    config = parse(f'runtime_directory = "{directory}/r"\n[passthrough]\ndirect = "{direct}"\n')
    nothing: Any = None
    observer = JobObserver(lambda changed: None)
    return BackupContext(
        "j1", "web1", nothing, config, nothing, observer, nothing, SimpleNamespace(helper=None), nothing, nothing
    )  # type: ignore[arg-type]


def reading_of(disk: Path, size: int, sink: MemorySink, changed: Bitmap) -> Reading:
    source = DiskSource("block", "raw", path=str(disk))
    plan = DiskPlan("sda", VolumeKind.PASS_THROUGH, Method.GUEST_SNAPSHOT, size, DISK, "sda", source)
    return Reading(plan, sink, None, changed, ChangeRecord(), Bitmap(changed.length))  # type: ignore[arg-type]


def everything(size: int) -> Bitmap:
    chunks = Bitmap(-(-size // CHUNK))
    chunks.set(0, len(chunks))
    return chunks


@pytest.mark.parametrize("increment", [False, True])
def test_what_is_read_while_the_guest_writes_is_t1(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch, increment: bool
) -> None:
    kernel = Kernel(tmp_path, rng)
    changed = everything(kernel.size)
    if increment:
        changed.clear(rng.randrange(100), 150)
    for _ in range(10):
        kernel.write_somewhere()
    sink = MemorySink(kernel.size, CHUNK)
    sink.on_put = lambda index: kernel.write_somewhere() if rng.random() < 0.3 else None
    reading = reading_of(kernel.disk, kernel.size, sink, changed)

    async def bitmap(ctx: object, name: str, chunks: int) -> Bitmap:
        assert (name, chunks) == ("sda#exceptions", len(changed))
        return kernel.exceptions()

    monkeypatch.setattr(direct, "bitmap", bitmap)
    ctx = context(tmp_path)
    left = asyncio.run(direct.as_of_t1(ctx, reading))
    again = {first + i for first, count in left.runs() for i in range(count)}
    wanted = {first + i for first, count in changed.runs() for i in range(count)}
    assert again < wanted == sink.chunks.keys() | sink.zeros
    t1 = {index: kernel.t1[index * CHUNK : (index + 1) * CHUNK] for index in wanted}
    read = {index: sink.chunks.get(index, bytes(len(t1[index]))) for index in wanted}
    assert {index for index in wanted if read[index] != t1[index]} <= again
    assert any(read[index] != t1[index] for index in again)  # the guest did get in between
    assert reading.plan.details["read_by"] == "host" and reading.bytes_read > 0 and not ctx.observer.warnings
    assert not list((tmp_path / "r").iterdir())


def test_what_the_host_cannot_open_goes_through_the_guest(tmp_path: Path) -> None:
    size = 4 * CHUNK
    disk = tmp_path / "lun"
    disk.write_bytes(bytes(size))
    for path, expected in [
        (
            tmp_path / "none",
            size,
        ),
        (disk, size + 512),
    ]:
        ctx, sink = context(tmp_path), MemorySink(expected, CHUNK)
        reading = reading_of(path, expected, sink, everything(expected))
        assert asyncio.run(direct.as_of_t1(ctx, reading)) == reading.changed
        (warning,) = ctx.observer.warnings
        assert warning.startswith("sda: it is read through the guest, because the host could not: ")
        assert ("No such file" if path != disk else f"has {size} bytes, the guest's disk {expected}") in warning
        assert "read_by" not in reading.plan.details and not sink.chunks


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    ctx = context(tmp_path, direct="never")
    reading = reading_of(tmp_path / "none", CHUNK, MemorySink(CHUNK, CHUNK), everything(CHUNK))
    assert asyncio.run(direct.as_of_t1(ctx, reading)) is reading.changed
    assert not ctx.observer.warnings


@pytest.mark.parametrize(
    ("source", "opened"),
    [
        (None, None),
        (DiskSource("block", "raw", path="/dev/sdx"), "/dev/sdx"),
        (DiskSource("file", "raw", path="/srv/image"), None),
        (DiskSource("network", "raw", protocol="rbd", name="pool/image", host="a"), None),
        (
            DiskSource("network", "raw", protocol="iscsi", name="iqn.2024-01.org.example:a/7", host="192.0.2.7"),
            "iscsi://192.0.2.7:3260/iqn.2024-01.org.example:a/7",
        ),
        (
            DiskSource("network", "raw", protocol="iscsi", name="iqn.x", host="2001:db8::1", port=3261),
            "iscsi://[2001:db8::1]:3261/iqn.x/0",
        ),
        (DiskSource("network", "raw", protocol="iscsi", name="iqn.x/y", host="a"), None),
        (DiskSource("network", "raw", protocol="iscsi", name="iqn.x/1"), None),
    ],
)
def test_only_the_domain_says_what_the_host_opens(source: DiskSource | None, opened: str | None) -> None:
    spec = direct.lun_of(source)
    assert (str(spec) if spec else None) == opened
    assert spec is None or (spec.live and spec.driver == "raw")
