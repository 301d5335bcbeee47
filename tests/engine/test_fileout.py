"""Images straight into files: the same bytes as through the plain reader, holes kept, only differences in place."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.engine.servers import ENVIRONMENT
from tests.integration.restore_kit import loop_device
from tests.unit.repository.repository_support import (
    CHUNK,
    FaultyStorage,
    keys_of,
    make,
    manifest,
    objects,
    reopen,
    sparse_image,
    store,
    volume,
)
from vmbackupd.engine.fileout import write_file
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import Cancelled, RepositoryCorrupt, StorageError, TargetError, TargetRefused
from vmbackupd.repository import LocalStorage, Repository

MiB = 1 << 20


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vmbackup-read")]


def write(image: ImageSource, path: Path, *, progress: Progress | None = None, **options: Any) -> Progress:
    progress = progress or Progress()
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        write_file(image, fd, progress, label=str(path), **options)
    finally:
        os.close(fd)
        assert reading_threads() == []
    return progress


SIZES = [0, 1, CHUNK, CHUNK + 1, 16 * CHUNK - 1, 700 * CHUNK + 99, 1500 * CHUNK]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.9])
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_new_file_is_the_image(tmp_path: Path, size: int, density: float, encrypted: bool) -> None:
    rng = random.Random(size)
    image = sparse_image(rng, size, density=density)
    repository = make(tmp_path / "repository", encrypted=encrypted)
    source = repository.image(store(repository, "one", image))
    for workers in (0, 1, 5):
        path = tmp_path / f"out-{workers}"
        progress = write(source, path, workers=workers)
        assert path.read_bytes() == image
        assert progress.bytes_done == progress.bytes_total == size
        assert progress.bytes_read == source.data_bytes()
        assert progress.zero_bytes == size - progress.bytes_read
        assert progress.bytes_written <= progress.bytes_read


def test_nothing_of_what_was_there_shows_through_holes(tmp_path: Path) -> None:
    rng = random.Random(12)
    image = sparse_image(rng, 500 * CHUNK, density=0.3)
    repository = make(tmp_path / "repository")
    source = repository.image(store(repository, "one", image))
    for length in (5, 500 * CHUNK, 600 * CHUNK):
        (tmp_path / "out").write_bytes(rng.randbytes(length))
        write(source, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == image


def test_holes_stay_holes(tmp_path: Path) -> None:
    """Those between chunks, and those of 16 KiB and more within: source files have had them."""
    repository = make(tmp_path / "repository", chunk_size=65536, fanout=16)
    image = bytearray(64 * MiB)
    image[MiB : MiB + 4096] = b"x" * 4096
    image[MiB + 40960 : MiB + 45056] = b"y" * 4096
    image[-65536:] = b"z" * 65536
    source = repository.image(store(repository, "one", bytes(image)))
    progress = write(source, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == image
    assert (tmp_path / "out").stat().st_blocks * 512 <= 2 * 4096 + 65536 + 4096
    assert progress.bytes_written == 2 * 4096 + 65536


@pytest.mark.parametrize("seed", range(6))
def test_in_place_writes_only_what_differs(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(300, 900)
    size = count * CHUNK - rng.randrange(CHUNK)
    image = sparse_image(rng, size, density=rng.random())
    repository = make(tmp_path / "repository")
    source = repository.image(store(repository, "one", image))
    path = tmp_path / "target"
    write(source, path)
    target, touched = bytearray(image), set()
    for _ in range(rng.choice([0, 1, 30])):
        at = rng.randrange(size)
        length = min(rng.choice([1, 100, CHUNK, 9 * CHUNK]), size - at)
        new = rng.choice([bytes(length), rng.randbytes(length)])
        target[at : at + length] = new
        with path.open("r+b") as file:
            file.seek(at)
            file.write(new)
    for index in range(count):
        piece = slice(index * CHUNK, (index + 1) * CHUNK)
        if target[piece] != image[piece]:
            touched.add(index)
    progress = write(source, path, in_place=True, workers=rng.choice([1, 2, 4]))
    assert path.read_bytes() == image
    lengths = {index: len(image[index * CHUNK : (index + 1) * CHUNK]) for index in touched}
    assert progress.bytes_written == sum(lengths.values())
    holes = {index for index in touched if not any(image[index * CHUNK : (index + 1) * CHUNK])}
    assert progress.bytes_read == sum(lengths[index] for index in touched - holes)
    assert progress.bytes_done == size


def test_in_place_over_anything(tmp_path: Path) -> None:
    """Whatever was there, of whatever length: a file that is too long is cut, holes are punched."""
    rng = random.Random(4)
    image = sparse_image(rng, 900 * CHUNK, density=0.3)
    repository = make(tmp_path / "repository")
    source = repository.image(store(repository, "one", image))
    for length in (0, 5, 400 * CHUNK + 3, 900 * CHUNK, 1000 * CHUNK):
        path = tmp_path / "target"
        path.write_bytes(rng.randbytes(length))
        progress = write(source, path, in_place=True)
        assert path.read_bytes() == image
        if length >= len(image):
            assert progress.bytes_written == len(image)
        assert path.stat().st_blocks * 512 <= source.data_bytes() + 65536


def test_a_block_device_in_place(tmp_path: Path) -> None:
    """A loop device where there may be one: it cannot tell where it holds data, and may be longer than the image."""
    rng = random.Random(5)
    image = sparse_image(rng, 600 * CHUNK, density=0.4)
    repository = make(tmp_path / "repository")
    source = repository.image(store(repository, "one", image))
    backing = tmp_path / "backing"
    before = rng.randbytes(610 * CHUNK)
    backing.write_bytes(before)
    with loop_device(backing) as device:
        progress = write(source, Path(device), in_place=True)
        assert progress.bytes_written == len(image)
        again = write(source, Path(device), in_place=True)
        assert (again.bytes_written, again.bytes_read) == (0, 0)
    assert backing.read_bytes() == image + before[len(image) :]


def test_a_device_that_is_too_small(tmp_path: Path) -> None:
    repository = make(tmp_path / "repository")
    source = repository.image(store(repository, "one", b"x" * CHUNK))
    fd = os.open("/dev/null", os.O_RDWR)
    try:
        with pytest.raises(TargetRefused, match=f"0 bytes, the image to be written {CHUNK}"):
            write_file(source, fd, Progress(), label="nothing")
    finally:
        os.close(fd)


def test_an_error_of_the_target_is_told(tmp_path: Path) -> None:
    rng = random.Random(6)
    repository = make(tmp_path / "repository")
    source = repository.image(store(repository, "one", rng.randbytes(600 * CHUNK)))
    (tmp_path / "out").touch()
    os.truncate(tmp_path / "out", 600 * CHUNK)
    fd = os.open(tmp_path / "out", os.O_RDONLY)
    try:
        with pytest.raises(TargetError, match=r"the file: writing \d+ bytes at \d+: Bad file descriptor"):
            write_file(source, fd, Progress(), label="the file", in_place=True)
        with pytest.raises(TargetError, match="the file: setting its size to 2457600 bytes: Invalid argument"):
            write_file(source, fd, Progress(), label="the file")
    finally:
        os.close(fd)
    assert reading_threads() == []


def test_cancel(tmp_path: Path) -> None:
    rng = random.Random(7)
    repository = make(tmp_path / "repository")
    tree = store(repository, "one", rng.randbytes(600 * CHUNK))
    progress = Progress()
    progress.cancel()
    with pytest.raises(Cancelled):
        write(repository.image(tree), tmp_path / "never", progress=progress)
    assert (tmp_path / "never").stat().st_size == 0

    # in the middle: a storage without files, whose tenth read cancels
    progress = Progress()
    storage = FaultyStorage(LocalStorage(tmp_path / "repository"), descriptors=False)
    reads = 0

    def get(name: str, offset: int = 0, length: int | None = None) -> bytes:
        nonlocal reads
        reads += 1
        if reads == 10:
            progress.cancel()
        return storage.storage.get(name, offset, length)

    storage.get = get  # type: ignore[method-assign]
    with Repository.open(storage, keys=keys_of(storage)) as other, pytest.raises(Cancelled):
        write(other.image(tree), tmp_path / "out", progress=progress)
    assert progress.bytes_done < progress.bytes_total


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("encrypted", [False, True])
def test_damaged_packs(tmp_path: Path, descriptors: bool, encrypted: bool) -> None:
    """What is damaged in one pack is read from another that holds the same; if there is none, the error names it."""
    rng = random.Random(8)
    image = sparse_image(rng, 900 * CHUNK, density=0.7)
    path = tmp_path / "repository"
    repository = make(path, encrypted=encrypted)
    tree = store(repository, "one", image)
    kept = {name: data for name, data in objects(path).items() if name.startswith("indexes")}
    first = sorted(name for name in objects(path) if name.startswith("packs"))
    for name in kept:
        (path / name).unlink()
    again = reopen(path)
    assert store(again, "two", image) == tree
    for name, data in kept.items():
        (path / name).write_bytes(data)
    for name in first:
        damaged = bytearray((path / name).read_bytes())
        for at in range(0, len(damaged), 20_000):
            damaged[at] ^= 0xFF
        (path / name).write_bytes(damaged[: rng.choice([len(damaged), len(damaged) // 2])])
    (path / first[0]).unlink()
    storage = FaultyStorage(LocalStorage(path), descriptors=descriptors)
    with Repository.open(storage, keys=keys_of(storage)) as healed:
        write(healed.image(tree), tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == image
    second = [name for name in objects(path) if name.startswith("packs") and name not in first]
    for name in second:
        (path / name).write_bytes(bytes(len(objects(path)[name])))
    with (
        Repository.open(storage, keys=keys_of(storage)) as broken,
        pytest.raises(RepositoryCorrupt, match="chunk [0-9a-f]{64}"),
    ):
        write(broken.image(tree), tmp_path / "never")


def test_a_storage_that_fails(tmp_path: Path) -> None:
    rng = random.Random(9)
    repository = make(tmp_path / "repository")
    tree = store(repository, "one", rng.randbytes(900 * CHUNK))
    storage = FaultyStorage(LocalStorage(tmp_path / "repository"), descriptors=False)
    with Repository.open(storage, keys=keys_of(storage)) as other:
        image = other.image(tree)
        storage.always = ("get packs", StorageError("the network is down"))
        with pytest.raises(StorageError, match="the network is down"):
            write(image, tmp_path / "out")


def test_neighbouring_chunks_cost_one_request(tmp_path: Path) -> None:
    """A storage that is asked over a network is asked for megabytes, not for chunks."""
    rng = random.Random(10)
    image = rng.randbytes(2048 * CHUNK)
    repository = make(tmp_path / "repository", fanout=256)
    tree = store(repository, "one", image)
    storage = FaultyStorage(LocalStorage(tmp_path / "repository"), descriptors=False)
    with Repository.open(storage, keys=keys_of(storage)) as other:
        source = other.image(tree)
        source.data_bytes()
        storage.operations.clear()
        write(source, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == image
    gets = [what for what in storage.operations if what.startswith("get packs")]
    assert len(gets) < 2048 / 16


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A large image takes no more memory than a small one."""
    repository = make(tmp_path / "repository", chunk_size=65536, fanout=256)
    with repository.writer("big") as writer:
        sink = writer.image(1 << 30)
        rng = random.Random(11)
        parts = [rng.randbytes(32768) + bytes(32768) for _ in range(64)]
        for at in range(0, 1 << 30, 65536):
            sink.write(at, parts[(at >> 16) % 64][:65532] + (at >> 16).to_bytes(4, "little"))
        tree = sink.finish()
        writer.publish(manifest("big", volume("vda", tree, 1 << 30)))
    program = f"""
import os, resource, sys
from vmbackupd.engine.fileout import write_file
from vmbackupd.engine.progress import Progress
from vmbackupd.repository import LocalStorage, Repository
repository = Repository.open(LocalStorage({str(tmp_path / "repository")!r}))
image = repository.image({tree!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fd = os.open({str(tmp_path / "out")!r}, os.O_RDWR | os.O_CREAT)
write_file(image, fd, Progress(), label="out", workers=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, env=ENVIRONMENT
    )
    assert int(run.stdout) < 48 * 1024  # KiB; the index cache among it
