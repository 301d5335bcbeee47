"""One NBD connection, to real servers: small reads and writes, limits of servers, errors, peers that hang."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engine.servers import nbdkit, nbdkit_on_socket, qemu_nbd
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import Cancelled, SourceError, TargetError


def test_reads_and_writes(tmp_path: Path, rng: random.Random) -> None:
    size = 3 << 20
    mirror = bytearray(size)
    with nbdkit(tmp_path, "memory", str(size)) as path, NbdConnection(unix=path) as disk:
        assert (disk.size, disk.read_only, disk.can_block_status, disk.can_zero) == (size, False, True, True)
        for _ in range(100):
            at = rng.randrange(size)
            data = rng.randbytes(rng.randrange(min(200_000, size - at + 1)))
            disk.pwrite(at, data)
            mirror[at : at + len(data)] = data
        disk.sync()
        for _ in range(100):
            at = rng.randrange(size)
            length = rng.randrange(min(200_000, size - at + 1))
            assert disk.pread(at, length) == mirror[at : at + length]
        assert disk.pread(0, size) == mirror
        for at, length in [(-1, 1), (0, size + 1), (size, 1), (0, -1), (2**64, 1)]:
            with pytest.raises(ValueError, match="not inside"):
                disk.pread(at, length)
        assert disk.pread(size, 0) == b""
    assert disk.closed
    with pytest.raises(TargetError, match="closed"):
        disk.pread(0, 1)


def test_over_a_socket_that_is_connected_already(tmp_path: Path) -> None:
    with nbdkit_on_socket("memory", "1M") as ours:
        disk = NbdConnection(fd=ours.fileno(), export="")
        ours.close()  # it was duplicated
        assert disk.pread(0, 10) == bytes(10)
        disk.close()
        disk.close()


def test_block_size_limits_of_the_server(tmp_path: Path) -> None:
    limits = ["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=64k"]
    argv = ["--filter=blocksize-policy", "pattern", "1M", *limits, "blocksize-error-policy=error"]
    with nbdkit(tmp_path, *argv) as path, NbdConnection(unix=path) as disk:
        assert (disk.min_block, disk.max_request) == (4096, 65536)
        expected = b"".join((at).to_bytes(8, "big") for at in range(0, 1 << 20, 8))
        assert disk.pread(0, 1 << 20) == expected
        assert disk.pread(5001, 100_000) == expected[5001:105_001]
        with pytest.raises(ValueError, match="multiples of 4096"):
            disk.pwrite(1, bytes(4096))


def test_exports_by_name(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 65536)
    with qemu_nbd(tmp_path, image, "-x", "disk one", "-r") as path:
        with NbdConnection(unix=path, export="disk one") as disk:
            assert disk.read_only and disk.pread(65535, 1) == b"x"
            with pytest.raises(TargetError, match="disk one"):
                disk.pwrite(0, b"y" * 512)
        with pytest.raises(SourceError, match="'disk two'"):
            NbdConnection(unix=path, export="disk two")


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        NbdConnection(unix=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="either fd or unix"):
        NbdConnection()
    with pytest.raises(OSError, match="Bad file descriptor"):
        NbdConnection(fd=12345)


def test_errors_name_the_export_and_leave_the_connection_usable(tmp_path: Path) -> None:
    trigger = tmp_path / "fail"
    argv = ["--filter=error", "memory", "1M", "error=EIO", "error-rate=100%", f"error-file={trigger}"]
    with nbdkit(tmp_path, *argv) as path, NbdConnection(unix=path, export="sda") as disk:
        trigger.touch()
        with pytest.raises(SourceError, match=r"NBD export 'sda': reading 512 bytes at offset 1024: .*EIO"):
            disk.pread(1024, 512)
        trigger.unlink()
        assert disk.pread(1024, 512) == bytes(512)
        trigger.touch()
        with pytest.raises(TargetError, match=r"NBD export 'sda': writing 512 bytes at offset 0: .*EIO"):
            disk.pwrite(0, bytes(512))
        assert not disk.closed


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, caught


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_read_that_hangs_can_be_stopped(tmp_path: Path, how: str) -> None:
    with nbdkit(tmp_path, "--filter=delay", "memory", "1M", "rdelay=100") as path:
        disk = NbdConnection(unix=path)
        thread, caught = in_thread(lambda: disk.pread(0, 512))
        while not disk.busy:
            assert thread.is_alive()
        with pytest.raises(RuntimeError, match="another call"):
            disk.sync()
        started = time.monotonic()
        getattr(disk, how)()
        thread.join(5)
        assert not thread.is_alive() and time.monotonic() - started < 2
        assert [type(error) for error in caught] == [Cancelled] and disk.closed


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        started = time.monotonic()
        with pytest.raises(SourceError, match="no answer from the server"):
            NbdConnection(fd=ours.fileno(), timeout=0.3)
        assert time.monotonic() - started < 2
    with nbdkit(tmp_path, "--filter=delay", "memory", "1M", "rdelay=100") as path:
        disk = NbdConnection(unix=path, stall_timeout=0.3)
        with pytest.raises(SourceError, match="no answer from the server"):
            disk.pread(0, 512)
        assert disk.closed


def test_a_server_that_speaks_something_else() -> None:
    greetings = [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"NBDMAGIC" + b"\xff" * 64, b"NBDMAGICIHAVEOPT\xff\xff" + bytes(99)]
    open_files = len(os.listdir("/proc/self/fd"))
    for greeting in greetings:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(greeting)
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(SourceError):
                NbdConnection(fd=ours.fileno(), timeout=2)
    assert len(os.listdir("/proc/self/fd")) == open_files
