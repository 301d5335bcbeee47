"""Raw files into a sink: holes are not read, every other byte is, and a file that fails says where."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vmbackupd.engine.filein import file_size, read_file
from vmbackupd.engine.memory import MemorySink
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import Cancelled, SourceError

CHUNK = 65536


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def holds_data(piece: bytes) -> bool:
    return piece.count(0) < len(piece)


def scattered(rng: random.Random, size: int) -> bytes:
    """Mostly zeros, with data here and there that begins and ends anywhere."""
    image = bytearray(size)
    for _ in range(size // 300_000):
        at = rng.randrange(size)
        length = min(rng.choice([1, 4096, CHUNK, rng.randrange(1, 400_000)]), size - at)
        image[at : at + length] = rng.randbytes(length) if rng.random() < 0.8 else bytes(length)
    return bytes(image)


def sparse(path: Path, data: bytes) -> int:
    """``data`` in a file where 4 KiB blocks of zeros are holes; the number of blocks that are none."""
    blocks = [at for at in range(0, len(data), 4096) if holds_data(data[at : at + 4096])]
    with path.open("wb") as file:
        for at in blocks:
            os.pwrite(file.fileno(), data[at : at + 4096], at)
        file.truncate(len(data))
    return len(blocks)


def touched(path: Path, chunk: int) -> set[int]:
    """The chunks in which the filesystem says there is data, asked for by another way: block by block."""
    found = set()
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        for at in range(0, size, 4096):
            try:
                if os.lseek(fd, at, os.SEEK_DATA) < min(at + 4096, size):
                    found.add(at // chunk)
            except OSError:
                break
    return found


@pytest.mark.parametrize("chunk", [4096, CHUNK, 1 << 20])
@pytest.mark.parametrize("window", [0, 8 << 20])
def test_all_bytes_arrive_and_holes_are_not_read(tmp_path: Path, chunk: int, window: int) -> None:
    rng = random.Random(f"{chunk} {window}")
    for number in range(4):
        path = tmp_path / f"{number}.raw"
        image = scattered(rng, rng.choice([8 << 20, (7 << 20) + rng.randrange(1, 2 << 20)]))
        sparse(path, image)
        sink, progress = MemorySink(len(image), chunk), Progress()
        with opened(path) as fd:
            read_file(fd, sink, progress, window=window, drop_cache=number == 0)
        assert sink.complete() and bytes(sink) == image
        pieces = {index: image[index * chunk : (index + 1) * chunk] for index in range(-(-len(image) // chunk))}
        assert sink.zeros == {index for index, piece in pieces.items() if not holds_data(piece)}
        assert progress.bytes_read == sum(len(pieces[index]) for index in touched(path, chunk))
        assert progress.bytes_read < len(image) or chunk > CHUNK
        assert progress.bytes_done == progress.bytes_total == len(image)
        assert progress.zero_bytes == sum(len(pieces[index]) for index in sink.zeros)


@pytest.mark.parametrize("size", [0, 1, 511, CHUNK - 1, CHUNK, CHUNK + 1])
def test_small_files(tmp_path: Path, size: int) -> None:
    path = tmp_path / "small.raw"
    path.write_bytes(b"x" * size)
    sink = MemorySink(size, CHUNK)
    with opened(path) as fd:
        assert file_size(fd) == size
        read_file(fd, sink, Progress())
    assert sink.complete() and bytes(sink) == b"x" * size


def test_a_file_of_nothing_but_a_hole_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "hole.raw"
    path.touch()
    os.truncate(path, 1 << 40)  # a tebibyte
    sink, progress = MemorySink((1 << 40) - 1, 4 << 20), Progress()
    with opened(path) as fd:
        read_file(fd, sink, progress)
    assert not sink.chunks and progress.bytes_read == 0
    assert progress.zero_bytes == progress.bytes_done == (1 << 40) - 1


def test_the_sink_says_how_much_is_read(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(bytes(range(1, 251)) * 1000)
    with opened(path) as fd:
        sink = MemorySink(100_000, CHUNK)
        read_file(fd, sink, Progress())
        assert bytes(sink) == path.read_bytes()[:100_000]
        with pytest.raises(SourceError, match="image.raw: it has 250000 bytes, .* 250001"):
            read_file(fd, MemorySink(250_001, CHUNK), Progress(), label=str(path))


def test_a_file_that_shrinks_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(b"x" * (4 << 20))
    sink = MemorySink(4 << 20, CHUNK)
    sink.on_put = lambda index: os.truncate(path, 1 << 20) if index == 3 else None
    with opened(path) as fd, pytest.raises(SourceError, match="image.raw: .*truncated meanwhile"):
        read_file(fd, sink, Progress(), label=str(path))


def test_a_read_error_names_file_and_place(tmp_path: Path) -> None:
    # a directory has a size, knows no holes and cannot be read
    with opened(tmp_path) as fd:
        os.lseek(fd, 0, os.SEEK_END)
        with pytest.raises(SourceError, match="somewhere: reading 4096 bytes at 0: Is a directory"):
            read_file(fd, MemorySink(4096, CHUNK), Progress(), label="somewhere")


def test_a_pipe_is_refused() -> None:
    ours, theirs = os.pipe()
    try:
        with pytest.raises(SourceError, match="a pipe: its size is not to be had"):
            read_file(ours, MemorySink(10, CHUNK), Progress(), label="a pipe")
    finally:
        os.close(ours)
        os.close(theirs)


def test_it_can_be_cancelled(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(b"x" * (4 << 20))
    progress = Progress()
    sink = MemorySink(4 << 20, CHUNK)
    sink.on_put = lambda index: progress.cancel() if index == 5 else None
    with opened(path) as fd:
        with pytest.raises(Cancelled):
            read_file(fd, sink, progress)
        assert 0 < progress.bytes_done < 4 << 20
        with pytest.raises(Cancelled):
            read_file(fd, sink, progress)


def test_what_the_sink_raises_passes_through(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(b"x" * (1 << 20))
    sink = MemorySink(1 << 20, CHUNK)

    def full(index: int) -> None:
        raise OSError("full")

    sink.on_put = full
    with opened(path) as fd, pytest.raises(OSError, match="full"):
        read_file(fd, sink, Progress())


def test_chunk_sizes_out_of_range_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.raw"
    path.write_bytes(b"x" * 4096)
    with opened(path) as fd:
        for chunk in (1000, 8 << 20):
            with pytest.raises(ValueError, match="power of two"):
                read_file(fd, MemorySink(4096, chunk), Progress())
