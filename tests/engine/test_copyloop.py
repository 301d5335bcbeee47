"""The copy loops, over real NBD servers."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.engine.randoms import some_chunks
from tests.engine.servers import ENVIRONMENT, nbdkit, nbdkit_on_socket, qemu_nbd
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.copyloop import Progress, copy_in, copy_out
from vmbackupd.engine.memory import MemorySink, MemorySource
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.nbdimage import NbdSink, NbdSource
from vmbackupd.engine.reference import items_of
from vmbackupd.errors import BackupError, Cancelled, SourceError, TargetError, TargetRefused

CHUNK = 65536


def scattered(rng: random.Random, size: int, pieces: int = 40) -> bytes:
    """Mostly zeros, with data here and there; some of it begins and ends in the middle of a chunk."""
    image = bytearray(size)
    for _ in range(pieces):
        at = rng.randrange(size)
        length = min(rng.choice([1, 512, 4096, CHUNK, rng.randrange(1, 400_000)]), size - at)
        image[at : at + length] = rng.randbytes(length)
    return bytes(image)


def sparse_file(path: Path, data: bytes) -> Path:
    """``data`` in a file whose 4 KiB blocks of zeros are holes."""
    with path.open("wb") as file:
        for at in range(0, len(data), 4096):
            if any(data[at : at + 4096]):
                os.pwrite(file.fileno(), data[at : at + 4096], at)
        file.truncate(len(data))
    return path


def check_in(disk: NbdConnection, image: bytes, chunk: int = CHUNK, **options: int) -> Progress:
    sink, progress = MemorySink(len(image), chunk), Progress()
    copy_in(disk, sink, progress, **options)
    assert sink.complete() and bytes(sink) == image
    zero = [index for index in range(-(-len(image) // chunk)) if not any(image[index * chunk : (index + 1) * chunk])]
    assert sink.zeros == set(zero)
    assert progress.bytes_done == progress.bytes_total == len(image)
    assert progress.zero_bytes == sum(min(chunk, len(image) - index * chunk) for index in zero)
    assert not disk.closed
    return progress


# ---- in


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_holes_do_not_travel(tmp_path: Path, rng: random.Random, form: str) -> None:
    size = (32 << 20) + 512 * rng.randrange(200)
    image = scattered(rng, size)
    source = sparse_file(tmp_path / "image.raw", image)
    if form == "qcow2":
        source = tmp_path / "image.qcow2"
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(tmp_path / "image.raw"), str(source)]
        subprocess.run(argv, check=True, env=ENVIRONMENT)
    with qemu_nbd(tmp_path, source, "-r", form=form) as path, NbdConnection(unix=path) as disk:
        progress = check_in(disk, image)
        assert progress.bytes_read < size
        check_in(disk, image, in_flight=1, request=1)
        check_in(disk, image, chunk=4096, in_flight=3, request=100_000)
        check_in(disk, image, chunk=1 << 20, in_flight=1000, request=1 << 30)
        check_in(disk, image[: size // 2])  # a sink smaller than the export


@pytest.mark.parametrize(
    "filters",
    [
        [],
        ["--filter=noextents"],
        ["--filter=error", "error-extents=EIO", "error-extents-rate=100%"],
        ["--filter=blocksize-policy", "blocksize-minimum=512", "blocksize-preferred=4096", "blocksize-maximum=32k"],
        ["--filter=blocksize-policy", "blocksize-minimum=65536", "blocksize-preferred=64k", "blocksize-maximum=4M"],
        ["--filter=delay", "rdelay=3ms"],
    ],
    ids=["plain", "noextents", "extents-fail", "small-requests", "large-blocks", "slow"],
)
def test_servers_of_all_kinds(tmp_path: Path, rng: random.Random, filters: list[str]) -> None:
    image = scattered(rng, 8 << 20)
    sparse_file(tmp_path / "image", image)
    options = [word for word in filters if not word.startswith("--")]
    if any("blocksize" in word for word in options):
        options.append("blocksize-error-policy=error")
    argv = [*filters[:1], "file", str(tmp_path / "image"), *options]
    with nbdkit(tmp_path, *argv) as path, NbdConnection(unix=path) as disk:
        check_in(disk, image)


def test_structured_and_simple_replies_over_a_socket_pair(rng: random.Random, tmp_path: Path) -> None:
    image = scattered(rng, 4 << 20)
    sparse_file(tmp_path / "image", image)
    for flags in [[], ["--no-sr"]]:
        with nbdkit_on_socket(*flags, "file", str(tmp_path / "image")) as ours:
            disk = NbdConnection(fd=ours.fileno())
            assert disk.can_block_status == (not flags)
            check_in(disk, image)
            disk.close()


def check_only(disk: NbdConnection, image: bytes, only: Bitmap, sink: MemorySink) -> None:
    """Exactly the chunks of ``only`` arrive, and only they are counted."""
    chunk = sink.chunk_size
    asked, progress = MemorySink(len(image), chunk), Progress()
    copy_in(disk, asked, progress, only=only)
    copy_in(disk, sink, Progress(), only=only)
    parts = {index: image[index * chunk : (index + 1) * chunk] for index in items_of(only.runs())}
    assert asked.chunks == {index: part for index, part in parts.items() if any(part)}
    assert asked.zeros == {index for index, part in parts.items() if not any(part)}
    assert progress.bytes_done == progress.bytes_total == sum(map(len, parts.values()))
    assert progress.zero_bytes == sum(len(part) for part in parts.values() if not any(part))
    assert progress.bytes_read <= progress.bytes_done


@pytest.mark.parametrize("extents", [True, False])
def test_only_some_chunks(tmp_path: Path, rng: random.Random, extents: bool) -> None:
    image = scattered(rng, (32 << 20) + 512 * rng.randrange(200))
    sparse_file(tmp_path / "image", image)
    filters = [] if extents else ["--filter=noextents"]
    with nbdkit(tmp_path, *filters, "file", str(tmp_path / "image")) as path, NbdConnection(unix=path) as disk:
        for chunk in (CHUNK, 4096):
            chunks = -(-len(image) // chunk)
            sink, rest = MemorySink(len(image), chunk), Bitmap(chunks)
            rest.set(0, chunks)
            for _ in range(10):
                only = some_chunks(rng, chunks)
                check_only(disk, image, only, sink)
                rest.subtract(only)
            with NbdConnection(unix=path) as another:
                check_only(another, image, rest, sink)
            assert sink.complete() and bytes(sink) == image


def test_holes_among_some_chunks_do_not_travel(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "1G") as path, NbdConnection(unix=path) as disk:
        only, progress = Bitmap((1 << 30) // CHUNK), Progress()
        only.set(7, 10_000)
        copy_in(disk, MemorySink(disk.size, CHUNK), progress, only=only)
        assert (progress.zero_bytes, progress.bytes_read) == (10_000 * CHUNK, 0)


def test_a_bitmap_of_another_image(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "1M") as path, NbdConnection(unix=path) as disk:
        with pytest.raises(ValueError, match="a bitmap of 17 bits for an image of 16 chunks"):
            copy_in(disk, MemorySink(1 << 20, CHUNK), Progress(), only=Bitmap(17))
        assert not disk.closed


def test_an_empty_image(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "0") as path, NbdConnection(unix=path) as disk:
        check_in(disk, b"")
        copy_in(disk, MemorySink(0, CHUNK), Progress(), only=Bitmap(0))
        copy_out(MemorySource(0, CHUNK), disk, Progress(), target_is_zero=False)


def test_read_errors(tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    argv = ["--filter=noextents", "--filter=error", "pattern", "64M", "error-pread=EIO", "error-pread-rate=100%"]
    with nbdkit(tmp_path, *argv, f"error-file={trigger}") as path, NbdConnection(unix=path, export="sdb") as disk:
        sink = MemorySink(disk.size, CHUNK)
        sink.on_put = lambda index: trigger.touch() if index == 100 else None
        with pytest.raises(
            SourceError, match=r"NBD export 'sdb': reading \d+ bytes at offset \d+: Input/output error \(EIO\)"
        ):
            copy_in(disk, sink, Progress())
        assert disk.closed and 100 in sink.chunks
        assert sorted(sink.chunks) == list(range(len(sink.chunks)))  # in order, whatever came back first


def test_a_server_that_dies(tmp_path: Path) -> None:
    server = nbdkit(tmp_path, "--filter=noextents", "pattern", "64M")
    path = server.__enter__()
    disk = NbdConnection(unix=path)
    sink = MemorySink(disk.size, CHUNK)

    def die(index: int) -> None:
        if index == 50:
            server.__exit__(None, None, None)

    sink.on_put = die
    with pytest.raises(SourceError, match="NBD export"):
        copy_in(disk, sink, Progress())


def test_a_sink_that_fails(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "pattern", "64M") as path, NbdConnection(unix=path) as disk:
        sink = MemorySink(disk.size, CHUNK)

        def full(index: int) -> None:
            if index == 10:
                raise OSError(28, "No space left on device")

        sink.on_put = full
        with pytest.raises(OSError, match="No space"):
            copy_in(disk, sink, Progress())
        assert disk.closed


def test_the_wrong_sizes(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "1M") as path, NbdConnection(unix=path) as disk:
        with pytest.raises(SourceError, match="1048576 bytes"):
            copy_in(disk, MemorySink((1 << 20) + 1, CHUNK), Progress())
        for chunk in (0, 1000, 8 << 20):
            with pytest.raises(ValueError, match="power of two"):
                copy_in(disk, MemorySink(1 << 20, chunk), Progress())
        with pytest.raises(ValueError, match="in_flight 0"):
            copy_in(disk, MemorySink(1 << 20, CHUNK), Progress(), in_flight=0)
        with pytest.raises(TargetRefused, match="1048576 bytes"):
            copy_out(MemorySource((1 << 20) + 1, CHUNK), disk, Progress(), target_is_zero=True)
        assert not disk.closed


# ---- cancel


def test_cancel_in_the_middle(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "pattern", "1G") as path, NbdConnection(unix=path) as disk:
        sink, progress = MemorySink(disk.size, CHUNK), Progress()
        sink.on_put = lambda index: progress.cancel() if index == 20 else None
        with pytest.raises(Cancelled):
            copy_in(disk, sink, progress)
        assert progress.cancelled and len(sink.chunks) == 21 and disk.closed


@pytest.mark.parametrize(
    "argv",
    [
        ["--filter=noextents", "--filter=delay", "pattern", "64M", "rdelay=100"],
        ["--filter=delay", "pattern", "64M", "delay-extents=100"],
    ],
    ids=["read", "block-status"],
)
def test_cancel_while_the_server_hangs(tmp_path: Path, argv: list[str]) -> None:
    with nbdkit(tmp_path, *argv) as path:
        disk, progress, caught = NbdConnection(unix=path), Progress(), []

        def copy() -> None:
            try:
                copy_in(disk, MemorySink(disk.size, CHUNK), progress)
            except BackupError as error:
                caught.append(type(error))

        thread = threading.Thread(target=copy)
        thread.start()
        while progress.bytes_total == 0:
            assert thread.is_alive()
        started = time.monotonic()
        progress.cancel()
        thread.join(5)
        assert not thread.is_alive() and time.monotonic() - started < 1
        assert caught == [Cancelled] and disk.closed


def test_cancelled_before_it_began(tmp_path: Path) -> None:
    progress = Progress()
    progress.cancel()
    with nbdkit(tmp_path, "memory", "1M") as path, NbdConnection(unix=path) as disk:
        with pytest.raises(Cancelled):
            copy_in(disk, MemorySink(disk.size, CHUNK), progress)
        assert not disk.closed


# ---- out


@pytest.mark.parametrize("target_is_zero", [True, False])
@pytest.mark.parametrize(
    "filters", [[], ["--filter=nozero"], ["--filter=blocksize-policy"]], ids=["plain", "nozero", "4k"]
)
def test_out(tmp_path: Path, rng: random.Random, target_is_zero: bool, filters: list[str]) -> None:
    size = (16 << 20) + 4096 * rng.randrange(16)
    image = scattered(rng, size)
    image = image[: 4 << 20] + bytes(2 << 20) + image[6 << 20 :]  # a hole for every chunk size
    target = tmp_path / "target"
    target.write_bytes(b"" if target_is_zero else rng.randbytes(size))
    os.truncate(target, size)
    options = [
        "blocksize-minimum=4096",
        "blocksize-preferred=4096",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ]
    argv = [*filters, "file", str(target), *(options if "blocksize" in str(filters) else [])]
    with nbdkit(tmp_path, *argv) as path, NbdConnection(unix=path) as disk:
        assert disk.can_zero == ("--filter=nozero" not in filters)
        for chunk in (CHUNK, 4096, 1 << 20):
            progress = Progress()
            source = MemorySource.over(image, chunk)
            source.chunks[0] = image[:chunk].ljust(min(chunk, size), b"\0")  # data that may be zeros
            copy_out(source, disk, progress, target_is_zero=target_is_zero, in_flight=rng.choice([1, 3, 32]))
            assert progress.bytes_done == progress.bytes_total == size
            assert target.read_bytes() == image
    assert not target_is_zero or target.stat().st_blocks * 512 < size


def failing_flush() -> list[str]:
    """A disk that takes everything and can't flush it."""
    scripts = {
        "get_size": "echo 16777216",
        "pread": "head -c $3 /dev/zero",
        "can_write": "exit 0",
        "pwrite": "cat > /dev/null",
        "can_flush": "exit 0",
        "flush": "echo EIO broken >&2; exit 1",
    }
    return ["eval", *(f"{name}={script}" for name, script in scripts.items())]


@pytest.mark.parametrize(
    ("argv", "source", "error"),
    [
        (["--filter=error", "memory", "16M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"], b"x", "ENOSPC"),
        (["--filter=error", "memory", "16M", "error-zero=EIO", "error-zero-rate=100%"], b"\0", "EIO"),
        (failing_flush(), b"x", "EIO"),
    ],
    ids=["write", "zero", "flush"],
)
def test_write_errors(tmp_path: Path, argv: list[str], source: bytes, error: str) -> None:
    with nbdkit(tmp_path, *argv) as path, NbdConnection(unix=path, export="vda") as disk:
        image = MemorySource.over(source * (1 << 20), CHUNK)
        with pytest.raises(TargetError, match=rf"NBD export 'vda': .*\({error}\)"):
            copy_out(image, disk, Progress(), target_is_zero=False)
        assert disk.closed


def test_a_read_only_target(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "-r", "memory", "1M") as path, NbdConnection(unix=path) as disk:
        with pytest.raises(TargetRefused, match="read-only"):
            copy_out(MemorySource(1 << 20, CHUNK), disk, Progress(), target_is_zero=True)
        with pytest.raises(TargetRefused, match="read-only"):
            NbdSink(disk)


def test_a_source_that_fails(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "memory", "16M") as path, NbdConnection(unix=path) as disk:
        source = MemorySource.over(b"x" * (16 << 20), CHUNK)
        source.on_get = lambda index: 1 // (100 - index)
        with pytest.raises(ZeroDivisionError):
            copy_out(source, disk, Progress(), target_is_zero=True)


def test_cancel_out_while_the_server_hangs(tmp_path: Path) -> None:
    with nbdkit(tmp_path, "--filter=delay", "memory", "64M", "wdelay=100") as path:
        disk, progress, caught = NbdConnection(unix=path), Progress(), []
        source = MemorySource.over(b"x" * (64 << 20), CHUNK)

        def copy() -> None:
            try:
                copy_out(source, disk, progress, target_is_zero=True, in_flight=2)
            except BackupError as error:
                caught.append(type(error))

        thread = threading.Thread(target=copy)
        thread.start()
        while progress.bytes_read == 0:
            assert thread.is_alive()
        progress.cancel()
        thread.join(5)
        assert not thread.is_alive() and caught == [Cancelled]


# ---- the ends as objects


def test_sink_and_source(tmp_path: Path, rng: random.Random) -> None:
    """From one export to another, through NbdSource and NbdSink, both ways of using them."""
    size = (4 << 20) + 512
    image = scattered(rng, size, 12)
    source_file, target_file = sparse_file(tmp_path / "source", image), tmp_path / "target"
    target_file.write_bytes(rng.randbytes(size))
    (tmp_path / "in").mkdir()
    with (
        qemu_nbd(tmp_path, source_file, "-r") as source_path,
        qemu_nbd(tmp_path / "in", target_file) as target_path,
        NbdConnection(unix=source_path) as source,
        NbdConnection(unix=target_path) as target,
    ):
        chunks = NbdSource(source, chunk_size=4096)
        inside = {index for first, count in chunks.data_runs() for index in range(first, first + count)}
        data = {at // 4096 for at in range(0, size, 4096) if any(image[at : at + 4096])}
        assert data <= inside and len(inside) < size // 4096
        sink = NbdSink(target)
        copy_in(source, sink, Progress())
        sink.finish()
        assert target_file.read_bytes() == image
        target_file.write_bytes(rng.randbytes(size))
    with (
        qemu_nbd(tmp_path, source_file, "-r") as source_path,
        qemu_nbd(tmp_path / "in", target_file) as target_path,
        NbdConnection(unix=source_path) as source,
        NbdConnection(unix=target_path) as target,
    ):
        copy_out(NbdSource(source), target, Progress(), target_is_zero=False)
        assert target_file.read_bytes() == image


def test_sink_errors_show_at_the_latest_in_finish(tmp_path: Path) -> None:
    argv = ["--filter=error", "memory", "1M", "error-pwrite=ENOSPC", "error-pwrite-rate=100%"]
    (tmp_path / "in").mkdir()
    with (
        nbdkit(tmp_path / "in", "pattern", "64k") as source_path,
        nbdkit(tmp_path, *argv) as path,
        NbdConnection(unix=path, export="lun") as disk,
        NbdConnection(unix=source_path) as source,
    ):
        sink = NbdSink(disk, size=65536)
        with pytest.raises(TargetError, match=r"'lun': writing .*\(ENOSPC\)"):
            copy_in(source, sink, Progress())
            sink.finish()
        with pytest.raises(TargetRefused, match="1048576 bytes"):
            NbdSink(disk, size=1 << 21)


# ---- peers that lie


def flipping_proxy(server: socket.socket, ours: socket.socket, rng: random.Random) -> list[threading.Thread]:
    """Carries bytes both ways, and flips bits in what the server says, after the handshake."""

    def carry(source: socket.socket, target: socket.socket, spoil: bool) -> None:
        passed = 0
        try:
            while data := bytearray(source.recv(16384)):
                for _ in range(2):
                    at = rng.randrange(len(data))
                    if spoil and passed + at > 600 and rng.random() < 0.3:
                        data[at] ^= 1 << rng.randrange(8)
                passed += len(data)
                target.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    threads = [
        threading.Thread(target=carry, args=(server, ours, True)),
        threading.Thread(target=carry, args=(ours, server, False)),
    ]
    for thread in threads:
        thread.start()
    return threads


def test_flipped_bits_on_the_line_never_crash_or_hang(tmp_path: Path, rng: random.Random) -> None:
    image = scattered(rng, 2 << 20, 60)
    sparse_file(tmp_path / "image", image)
    failed = 0
    for _ in range(25):
        near, far = socket.socketpair()
        with nbdkit_on_socket("file", str(tmp_path / "image")) as server, near, far:
            threads = flipping_proxy(server, far, rng)
            try:
                disk = NbdConnection(fd=near.fileno(), timeout=2, stall_timeout=0.3)
                sink = MemorySink(min(disk.size, len(image)), 4096)
                copy_in(disk, sink, Progress(), in_flight=4, request=8192)
                assert sink.complete()
                disk.close()
            except SourceError:
                failed += 1
            near.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(5)
    assert failed > 0


# ---- size

FLAT = """
import sys
from pathlib import Path
from vmbackupd.engine.copyloop import Progress, copy_in, copy_out
from vmbackupd.engine.memory import DigestSink
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.nbdimage import NbdSource

def peak():
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

before = peak()
disk, target = NbdConnection(unix=sys.argv[1]), NbdConnection(unix=sys.argv[2])
sink, progress = DigestSink(disk.size, 65536), Progress()
copy_in(disk, sink, progress)
copy_out(NbdSource(disk), target, Progress(), target_is_zero=True)
again = DigestSink(disk.size, 65536)
copy_in(target, again, Progress())
disk.close()
target.close()
assert again.digest() == sink.digest()
print(sink.digest().hex(), sink.data_chunks, sink.zero_chunks, progress.bytes_read, peak() - before)
"""


def test_memory_is_flat_on_a_sparse_tebibyte(tmp_path: Path, rng: random.Random) -> None:
    from vmbackupd.engine.memory import DigestSink

    size = 1 << 40
    expected = DigestSink(size, CHUNK)
    indexes = sorted(rng.sample(range(size // CHUNK), 3000))
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        for index in indexes:
            data = rng.randbytes(CHUNK)
            os.pwrite(file.fileno(), data, index * CHUNK)
            expected.update(index, data)
        file.truncate(size)
    target.touch()
    os.truncate(target, size)
    (tmp_path / "in").mkdir()
    with qemu_nbd(tmp_path, source, "-r") as first, qemu_nbd(tmp_path / "in", target) as second:
        argv = [sys.executable, "-c", FLAT, first, second]
        result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    digest, data, zero, read, grown = result.stdout.split()
    assert digest == expected.digest().hex()
    assert (int(data), int(zero)) == (len(indexes), size // CHUNK - len(indexes))
    assert int(read) < 2 * len(indexes) * CHUNK
    assert int(grown) < 48 << 20, f"{int(grown) >> 20} MiB more than before"
