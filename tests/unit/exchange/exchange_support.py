"""What the tests of exports, imports and served images share."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from tests.engine.stores import make_store, room_for
from tests.unit.repository.repository_support import make, manifest, volume
from vmbackupd.engine import reference
from vmbackupd.hypervisor.storage_daemon import StorageDaemon
from vmbackupd.model import Segment, VolumeMap
from vmbackupd.repository import Manifest, Repository, StoreRecord

T = TypeVar("T")
CHUNK = 65536


class Watcher:
    """An observer that remembers, and can do something when a step begins or bytes are done."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.warnings: list[str] = []
        self.done = self.total = 0
        self.on_progress: Callable[[int], None] | None = None

    def step(self, name: str) -> None:
        self.steps.append(name)

    def progress(self, done: int, total: int) -> None:
        assert self.done <= done <= total or self.total != total
        self.done, self.total = done, total
        if self.on_progress is not None:
            self.on_progress(done)

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Effects:
    """What a journal would hold: effects that are not withdrawn yet."""

    def __init__(self) -> None:
        self.pending: list[tuple[str, str]] = []
        self.seen: list[tuple[str, str]] = []

    def __call__(self, undo: str, argument: str) -> Callable[[], None]:
        entry = (undo, argument)
        self.pending.append(entry)
        self.seen.append(entry)
        return lambda: self.pending.remove(entry)


def tool(*argv: object) -> str:
    """Run a program that has to succeed; its output."""
    words = [str(word) for word in argv]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def run(work: Awaitable[T], timeout: float = 60) -> T:
    """Run a coroutine to its end; a hung one fails the test."""

    async def main() -> T:
        return await asyncio.wait_for(work, timeout)

    return asyncio.run(main())


def daemons(directory: Path) -> Callable[[], StorageDaemon]:
    return lambda: StorageDaemon(directory / "run")


def disk_image(rng: random.Random, size: int) -> bytes:
    """A disk: mostly holes, with text, noise, zeros that are no holes, and a start and an end that are data."""
    image = bytearray(size)
    for _ in range(max(size // 700_000, 4)):
        at = rng.randrange(size)
        length = min(rng.choice([512, 4096, CHUNK, rng.randrange(1, 300_000)]), size - at)
        kind = rng.randrange(3)
        image[at : at + length] = rng.randbytes(length) if kind == 0 else (b"vmbackupd %d " % at * length)[:length]
    image[:512], image[-512:] = rng.randbytes(512), rng.randbytes(512)
    return bytes(image)


def sparse_file(path: Path, data: bytes) -> Path:
    """``data`` in a file whose 4 KiB blocks of zeros are holes."""
    with path.open("wb") as file:
        for at in range(0, len(data), 4096):
            block = data[at : at + 4096]
            if block.count(0) < len(block):
                os.pwrite(file.fileno(), block, at)
        file.truncate(len(data))
    return path


def stored(
    directory: Path, image: bytes, *, chunk: int = CHUNK, backup: str = "web1-1", encrypted: bool = False
) -> tuple[Repository, Manifest]:
    """A repository with one backup of one volume, ``vda``."""
    repository = make(directory / "repository", chunk_size=chunk, fanout=16, encrypted=encrypted)
    with repository.writer(backup) as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        published = manifest(backup, volume("vda", sink.finish(), len(image)))
        writer.publish(published)
    return repository, repository.manifest(backup)


def stored_at_t2(directory: Path, rng: random.Random, size: int) -> tuple[Repository, Manifest, bytes]:
    """A repository with a backup that is to be reverted at restore time; and what ``vda`` held at T1."""
    t2 = disk_image(rng, size)
    start, length = 128 * 1024, size // 2  # of the one volume on the disk
    chunk = 4096
    olds = rng.sample(range(length // chunk), length // chunk // 4)
    store, _ = make_store(olds, chunk, room_for(len(olds), chunk), rng)
    store += bytes(-len(store) % 512)
    lead = 8192
    scratch = bytes(lead) + store
    mapped = VolumeMap("data", length, lead, len(store), (Segment(0, "vda", start, length),), len(olds))
    repository = make(directory / "repository", chunk_size=CHUNK, fanout=16)
    with repository.writer("web1-t2") as writer:
        trees = []
        for image in (t2, scratch):
            sink = writer.image(len(image))
            sink.write(0, image)
            trees.append(sink.finish())
        record = volume("vda", trees[0], size)
        published = manifest(
            "web1-t2",
            type(record)(record.id, record.kind, record.method, record.consistency, size, None, t2_tree=trees[0]),
            store=StoreRecord(trees[1], len(scratch)),
            volume_maps=(mapped,),
        )
        writer.publish(published)
    expected = reference.revert(t2, "vda", scratch, [mapped])
    return repository, repository.manifest("web1-t2"), expected
