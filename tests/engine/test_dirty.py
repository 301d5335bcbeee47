"""Dirty bitmaps of real qcow2 files, served by qemu-nbd, against what was written."""

from __future__ import annotations

import random
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from tests.engine.servers import ENVIRONMENT, nbdkit, qemu_nbd
from vmbackupd.engine import reference
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.copyloop import copy_in
from vmbackupd.engine.dirty import data_chunks, dirty_chunks
from vmbackupd.engine.memory import MemorySink
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import Cancelled, SourceError

CHUNK = 65536


def run(*argv: object) -> None:
    subprocess.run([str(word) for word in argv], check=True, env=ENVIRONMENT, stdout=subprocess.DEVNULL)


def write(image: Path, runs: list[tuple[int, int]], pattern: int = 7) -> None:
    words = [word for at, length in runs for word in ("-c", f"write -P {pattern} {at} {length}")]
    run("qemu-io", "-f", "qcow2", *words, image)


def image_with_bitmap(tmp_path: Path, size: int, granularity: int) -> Path:
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, size)
    write(image, [(0, min(size, 1 << 20))])  # before the bitmap: not in it
    run("qemu-img", "bitmap", "--add", "-g", granularity, image, "vmbackupd-1")
    return image


def random_runs(rng: random.Random, size: int) -> list[tuple[int, int]]:
    blocks = size // 512
    starts = [rng.randrange(blocks) for _ in range(rng.randrange(1, 30))]
    return [(at * 512, min(rng.choice([1, 8, 128, 1000]), blocks - at) * 512) for at in starts]


@pytest.mark.parametrize("granularity", [512, 4096, CHUNK, 1 << 20])
def test_against_what_was_written(tmp_path: Path, rng: random.Random, granularity: int) -> None:
    size = (64 << 20) + 512 * rng.randrange(200)
    image = image_with_bitmap(tmp_path, size, granularity)
    runs = random_runs(rng, size)
    write(image, runs)
    marked = [(at // granularity, (at + length - 1) // granularity - at // granularity + 1) for at, length in runs]
    marked = [(first * granularity, min(count * granularity, size - first * granularity)) for first, count in marked]
    with qemu_nbd(tmp_path, image, "-r", "-B", "vmbackupd-1", form="qcow2") as path:
        for chunk in (CHUNK, 4096, 1 << 20):
            with NbdConnection(unix=path, bitmap="vmbackupd-1") as disk:
                assert disk.has_bitmap and disk.can_block_status
                found = dirty_chunks(disk, chunk, Progress())
                assert len(found) == -(-size // chunk)
                sectors = [(at // 512, length // 512) for at, length in marked]
                assert list(found.runs()) == reference.chunks_of(sectors, chunk // 512)
                assert not disk.closed


def test_a_bitmap_and_the_allocation_on_one_connection(tmp_path: Path) -> None:
    """A server answers for both at once: neither is taken for the other."""
    size = 64 << 20
    image = image_with_bitmap(tmp_path, size, CHUNK)
    write(image, [(8 << 20, 4 << 20), (32 << 20, 1 << 20)])
    run("qemu-io", "-f", "qcow2", "-c", f"write -z {33 << 20} {8 << 20}", image)  # changed, and a hole
    with (
        qemu_nbd(tmp_path, image, "-r", "-B", "vmbackupd-1", form="qcow2") as path,
        NbdConnection(unix=path, bitmap="vmbackupd-1") as disk,
    ):
        only = dirty_chunks(disk, CHUNK, Progress())
        assert list(only.runs()) == [(128, 64), (512, 16 + 128)]
        assert list(data_chunks(disk, CHUNK, Progress()).runs()) == [(0, 16), (128, 64), (512, 16)]
        sink, progress = MemorySink(size, CHUNK), Progress()
        copy_in(disk, sink, progress, only=only)
        assert (progress.bytes_read, progress.zero_bytes) == (5 << 20, 8 << 20)
        assert sorted(sink.chunks) == [*range(128, 192), *range(512, 528)]
        assert sink.zeros == set(range(528, 656))
        whole = Progress()
        copy_in(disk, MemorySink(size, CHUNK), whole)
        assert whole.bytes_read == 6 << 20


def test_what_is_no_whole_number_of_questions(tmp_path: Path, rng: random.Random) -> None:
    """Larger than one question, with more extents than one answer keeps."""
    size = (3 << 30) + 512
    image = image_with_bitmap(tmp_path, size, 512)
    expected = Bitmap(-(-size // CHUNK))
    everywhere = [*range(0, 9 << 20, 1024)] + [rng.randrange(size // 512) * 512 for _ in range(50)]
    everywhere += [(2 << 30) - 512, 2 << 30, size - 512]
    for number in range(0, len(everywhere), 5000):
        write(image, [(at, 512) for at in everywhere[number : number + 5000]])
    for at in everywhere:
        expected.set(at // CHUNK)
    with (
        qemu_nbd(tmp_path, image, "-r", "-B", "vmbackupd-1", form="qcow2") as path,
        NbdConnection(unix=path, bitmap="vmbackupd-1") as disk,
    ):
        assert dirty_chunks(disk, CHUNK, Progress()) == expected


def test_a_bitmap_that_is_not_there_is_never_an_empty_one(tmp_path: Path) -> None:
    image = image_with_bitmap(tmp_path, 1 << 20, CHUNK)
    with qemu_nbd(tmp_path, image, "-r", form="qcow2") as path:
        for options in ({}, {"bitmap": "vmbackupd-1"}):
            with NbdConnection(unix=path, **options) as disk:
                assert not disk.has_bitmap
                with pytest.raises(SourceError, match="does not have the bitmap"):
                    dirty_chunks(disk, CHUNK, Progress())
                assert disk.pread(0, 1) == b"\7"
        for name in ("", "a\0b"):
            with pytest.raises(ValueError, match="no name"):
                NbdConnection(unix=path, bitmap=name)
    with nbdkit(tmp_path, "memory", "1M") as path, NbdConnection(unix=path, bitmap="vmbackupd-1") as disk:
        assert disk.can_block_status and not disk.has_bitmap


def test_cancelled_before_it_began(tmp_path: Path) -> None:
    image, progress = image_with_bitmap(tmp_path, 1 << 20, CHUNK), Progress()
    progress.cancel()
    with (
        qemu_nbd(tmp_path, image, "-r", "-B", "vmbackupd-1", form="qcow2") as path,
        NbdConnection(unix=path, bitmap="vmbackupd-1") as disk,
        pytest.raises(Cancelled),
    ):
        dirty_chunks(disk, CHUNK, progress)


def answers(*extents: tuple[int, int, int], error: int = 0) -> bytes:
    """All that a server with a disk of 1 MiB says: the contexts 1 (allocation) and 2 (the bitmap), then of the first
    block status ``extents`` of (context, length, flags), each in a chunk of its own, or an error."""

    def option(number: int, kind: int, data: bytes = b"") -> bytes:
        return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data

    def chunk(flags: int, kind: int, data: bytes = b"") -> bytes:
        return struct.pack(">IHHQI", 0x668E33EF, flags, kind, 1, len(data)) + data

    contexts = option(10, 4, b"\0\0\0\1base:allocation") + option(10, 4, b"\0\0\0\2qemu:dirty-bitmap:b")
    go = option(7, 3, struct.pack(">HQH", 0, 1 << 20, 3)) + option(7, 1)
    said = b"".join(chunk(0, 5, struct.pack(">III", *extent)) for extent in extents)
    last = chunk(1, 32769, struct.pack(">IH", error, 0)) if error else chunk(1, 0)
    return b"NBDMAGICIHAVEOPT\0\3" + option(8, 1) + contexts + option(10, 1) + go + said + last


@pytest.mark.parametrize(
    "said",
    [
        answers(),
        answers((1, 1 << 20, 0)),
        answers((1, 1 << 20, 1), (2, 0, 0)),
        answers((2, 1 << 19, 0), (2, 1 << 19, 0)),
        answers(error=5),
        answers((2, 1 << 19, 0), error=5),
        answers((2, 1 << 19, 0)),
    ],
    ids=["nothing", "allocation-only", "empty", "twice", "error", "half-and-error", "half"],
)
def test_a_server_that_does_not_tell_all_of_it(said: bytes) -> None:
    """Silence about a part of the disk is an error, not "nothing changed there"."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        with NbdConnection(fd=ours.fileno(), bitmap="b", stall_timeout=0.5) as disk:
            assert (disk.size, disk.has_bitmap) == (1 << 20, True)
            with pytest.raises(SourceError, match="bitmap|malformed|no answer"):
                dirty_chunks(disk, CHUNK, Progress())
            assert disk.closed
