"""Copies out of the repository: chunks are read by threads, straight into the buffers that are written from."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from tests.engine.servers import nbdkit, qemu_nbd
from tests.unit.repository.repository_support import CHUNK, FaultyStorage, keys_of, make, objects, sparse_image, store
from vmbackupd.engine.copyloop import copy_out
from vmbackupd.engine.memory import MemorySource
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.prefetch import ReadPool
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import BackupError, Cancelled, RepositoryCorrupt, StorageError, TargetError
from vmbackupd.repository import LocalStorage, Repository


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("vmbackup-read")]


@pytest.mark.parametrize("target_is_zero", [True, False])
@pytest.mark.parametrize("filters", [[], ["--filter=nozero"], ["--filter=noextents"]], ids=["plain", "nozero", "noext"])
@pytest.mark.parametrize("descriptors", [True, False], ids=["files", "objects"])
@pytest.mark.parametrize("encrypted", [False, True])
def test_copies_equal_the_image(
    tmp_path: Path, rng: random.Random, target_is_zero: bool, filters: list[str], descriptors: bool, encrypted: bool
) -> None:
    size = (rng.randrange(1, 900) * CHUNK) + 512 * rng.randrange(8)
    image = sparse_image(rng, size, density=rng.random())
    tree = store(make(tmp_path / "repository", encrypted=encrypted), "one", image)
    storage = FaultyStorage(LocalStorage(tmp_path / "repository"), descriptors=descriptors)
    target = tmp_path / "target"
    target.write_bytes(bytes(size) if target_is_zero else rng.randbytes(size))
    with (
        Repository.open(storage, keys=keys_of(storage)) as repository,
        nbdkit(tmp_path, *filters, "file", str(target)) as path,
        NbdConnection(unix=path) as disk,
    ):
        source = repository.image(tree)
        for in_flight, request, workers in [(32, 256 << 10, 0), (1, 1, 1), (3, 100_000, 4), (32, 4 << 20, 2)]:
            progress = Progress()
            copy_out(
                source,
                disk,
                progress,
                target_is_zero=target_is_zero,
                in_flight=in_flight,
                request=request,
                workers=workers,
            )
            assert target.read_bytes() == image
            assert progress.bytes_done == progress.bytes_total == size
            assert progress.bytes_read == source.data_bytes()
            assert progress.zero_bytes == size - progress.bytes_read
            assert progress.bytes_written == (progress.bytes_read if target_is_zero else size)
            assert reading_threads() == []


@pytest.mark.parametrize(
    "filters", [[], ["--filter=nozero"], ["--filter=noextents"]], ids=["plain", "nozero", "noextents"]
)
@pytest.mark.parametrize("seed", range(3))
def test_in_place_writes_only_what_differs(tmp_path: Path, filters: list[str], seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randrange(300, 900)
    size = count * CHUNK - 512 * rng.randrange(8)
    image = sparse_image(rng, size, density=rng.random())
    source = make(tmp_path / "repository")
    tree = store(source, "one", image)
    held = bytearray(image)
    for _ in range(rng.choice([0, 1, 30])):
        at = rng.randrange(size)
        length = min(rng.choice([1, 100, CHUNK, 9 * CHUNK]), size - at)
        held[at : at + length] = rng.choice([bytes(length), rng.randbytes(length)])
    target = tmp_path / "target"
    with target.open("wb") as file:
        for at in range(0, size, CHUNK):
            if any(held[at : at + CHUNK]):
                file.seek(at)
                file.write(held[at : at + CHUNK])
        file.truncate(size)
    pieces = [slice(index * CHUNK, (index + 1) * CHUNK) for index in range(count)]
    touched = [piece for piece in pieces if held[piece] != image[piece]]
    log = tmp_path / "log"
    argv = ["--filter=log", *filters, "file", str(target), f"logfile={log}"]
    with nbdkit(tmp_path, *argv) as path, NbdConnection(unix=path) as disk:
        progress = Progress()
        copy_out(source.image(tree), disk, progress, target_is_zero=False, in_place=True, workers=rng.choice([1, 3]))
    assert target.read_bytes() == image
    assert progress.bytes_written == sum(len(image[piece]) for piece in touched)
    assert progress.bytes_read == sum(len(image[piece]) for piece in touched if any(image[piece]))
    assert progress.bytes_done == size
    if not touched:
        assert " Write " not in log.read_text() and " Zero " not in log.read_text()
    assert reading_threads() == []


def test_in_place_over_a_qcow2_server(tmp_path: Path) -> None:
    """Holes of the target are not read: an image of 1 TiB with little in it is a matter of a moment."""
    rng = random.Random(3)
    repository = make(tmp_path / "repository", chunk_size=65536, fanout=256)
    size = 1 << 40
    with repository.writer("one") as writer:
        sink = writer.image(size)
        data = {rng.randrange(size >> 16): rng.randbytes(65536) for _ in range(20)}
        for index, content in data.items():
            sink.write(index << 16, content)
        tree = sink.finish()
        source = writer.source(tree)
        target = tmp_path / "target"
        with target.open("wb") as file:
            file.truncate(size)
            stray = rng.randrange(size >> 16) << 16
            file.seek(stray)
            file.write(b"stray")
        with qemu_nbd(tmp_path, target) as path, NbdConnection(unix=path) as disk:
            for expected in (21 * 65536, 0):
                progress = Progress()
                copy_out(source, disk, progress, target_is_zero=False, in_place=True)
                assert progress.bytes_written == expected
            assert disk.pread(stray, 5) == bytes(5)
            assert all(disk.pread(index << 16, 65536) == content for index, content in data.items())


def test_only_images_of_the_repository_can_be_compared(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "1M") as path, NbdConnection(unix=path) as disk:
        with pytest.raises(ValueError, match="names"):
            copy_out(MemorySource(1 << 20, CHUNK), disk, Progress(), target_is_zero=False, in_place=True)
        assert not disk.closed


@pytest.mark.parametrize("descriptors", [True, False])
def test_a_copy_whose_packs_are_damaged(tmp_path: Path, descriptors: bool) -> None:
    rng = random.Random(4)
    path = tmp_path / "repository"
    repository = make(path)
    image = rng.randbytes(700 * CHUNK)
    tree = store(repository, "one", image)
    repository.image(tree).data_bytes()
    storage = FaultyStorage(LocalStorage(path), descriptors=descriptors)
    with nbdkit(tmp_path, "memory", str(len(image))) as server, Repository.open(storage) as other:
        source = other.image(tree)
        source.data_bytes()  # the nodes are in memory
        for name in [name for name in objects(path) if name.startswith("packs")][1:]:
            (path / name).write_bytes(bytes(len(objects(path)[name])))
        with NbdConnection(unix=server) as disk:
            with pytest.raises(RepositoryCorrupt, match="chunk [0-9a-f]{64}"):
                copy_out(source, disk, Progress(), target_is_zero=True)
            assert disk.closed
    assert reading_threads() == []


def test_a_target_that_fails(tmp_path: Path) -> None:
    rng = random.Random(5)
    repository = make(tmp_path / "repository")
    source = repository.image(store(repository, "one", rng.randbytes(700 * CHUNK)))
    argv = ["--filter=error", "memory", "16M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]

    def copy(words: str, filters: list[str], in_place: bool) -> None:
        with (
            nbdkit(tmp_path, *filters, *argv) as path,
            NbdConnection(unix=path) as disk,
            pytest.raises(TargetError, match=words),
        ):
            copy_out(source, disk, Progress(), target_is_zero=not in_place, in_place=in_place)

    copy("No space left", [], in_place=False)
    argv[-2:] = ["error-pread=EIO", "error-pread-rate=100%"]
    copy("reading", ["--filter=noextents"], in_place=True)
    assert reading_threads() == []


def test_cancelled_while_the_storage_hangs(tmp_path: Path) -> None:
    """The socket is looked after and the flag is seen while threads wait for the storage; they are gone in the end."""
    rng = random.Random(6)
    tree = store(make(tmp_path / "repository"), "one", rng.randbytes(700 * CHUNK))
    storage = FaultyStorage(LocalStorage(tmp_path / "repository"), descriptors=False)
    hangs, go_on = threading.Event(), threading.Event()
    caught: list[type[BackupError]] = []

    def get(name: str, offset: int = 0, length: int | None = None) -> bytes:
        if threading.current_thread().name.startswith("vmbackup-read"):
            hangs.set()
            assert go_on.wait(20)
        return storage.storage.get(name, offset, length)

    with (
        Repository.open(storage) as repository,
        nbdkit(tmp_path, "memory", "16M") as path,
        NbdConnection(unix=path) as disk,
    ):
        source = repository.image(tree)
        source.data_bytes()
        storage.get = get  # type: ignore[method-assign]
        progress = Progress()

        def copy() -> None:
            try:
                copy_out(source, disk, progress, target_is_zero=True)
            except BackupError as error:
                caught.append(type(error))

        thread = threading.Thread(target=copy)
        thread.start()
        assert hangs.wait(20)
        progress.cancel()
        deadline = time.monotonic() + 20
        while not disk.closed:  # given up, though the threads still wait for the storage
            assert time.monotonic() < deadline
            time.sleep(0.001)
        go_on.set()
        thread.join(20)
        assert caught == [Cancelled] and reading_threads() == []


def test_a_pool_that_is_closed(tmp_path: Path) -> None:
    repository = make(tmp_path / "repository")
    source = repository.image(store(repository, "one", b"x" * CHUNK))
    pool = ReadPool(source, workers=3)
    assert len(reading_threads()) == 3
    pool.close()
    assert reading_threads() == []
    pool.close()
    pool = ReadPool(source, workers=1000)
    pool.close()
    assert pool.window == 34  # threads are bounded


def test_the_first_error_is_told_when_all_threads_fail(tmp_path: Path) -> None:
    rng = random.Random(7)
    tree = store(make(tmp_path / "repository"), "one", rng.randbytes(700 * CHUNK))
    storage = FaultyStorage(LocalStorage(tmp_path / "repository"), descriptors=False)
    with Repository.open(storage) as repository, nbdkit(tmp_path, "memory", "16M") as path:
        source = repository.image(tree)
        source.data_bytes()
        storage.always = ("get packs", StorageError("the network is down"))
        for workers in (1, 8):
            with NbdConnection(unix=path) as disk, pytest.raises(StorageError, match="the network is down"):
                copy_out(source, disk, Progress(), target_is_zero=True, workers=workers)
    assert reading_threads() == []


def test_chunks_of_a_writer_at_work(tmp_path: Path) -> None:
    """Not in any pack yet."""
    rng = random.Random(8)
    image = sparse_image(rng, 300 * CHUNK)
    repository = make(tmp_path / "repository")
    with repository.writer("one") as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        source = writer.source(sink.finish())
        target = tmp_path / "target"
        target.write_bytes(bytes(len(image)))
        with nbdkit(tmp_path, "file", str(target)) as path, NbdConnection(unix=path) as disk:
            copy_out(source, disk, Progress(), target_is_zero=True)
        assert target.read_bytes() == image
