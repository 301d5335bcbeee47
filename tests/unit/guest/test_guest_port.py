"""The helper's end of the line, on a FIFO: like a virtio-serial port it gives 0 bytes and POLLHUP while nobody has its
other end open."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.support import listen
from vmbackupd.guest import hello
from vmbackupd.guest_helper import port as module
from vmbackupd.guest_helper.port import GRACE, Port, PortClosed


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "port"
    os.mkfifo(path)
    return path


@pytest.fixture
def port(fifo: Path) -> Iterator[Port]:
    opened = Port(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK))
    yield opened
    opened.close()


def test_a_host_that_seems_to_be_away_for_a_moment_has_not_gone(
    fifo: Path, port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guest may read a hello before its kernel has noticed that the host before went and that this one came."""
    monkeypatch.setattr(module, "GRACE", 20.0)

    def host() -> None:
        for part in (b"abcd", b"efgh"):
            with open(fifo, "wb") as line:
                line.write(part)
            assert waiting.wait(20)

    waiting = threading.Event()
    thread = threading.Thread(target=host)
    thread.start()
    try:
        assert port.take(4) == b"abcd"
        assert port.fill(0.0) is False  # away
        waiting.set()
        assert port.take(4) == b"efgh"
    finally:
        waiting.set()
        thread.join()


def test_a_host_that_stays_away_has_gone(port: Port) -> None:
    began = time.monotonic()
    with pytest.raises(PortClosed):
        port.take(1)
    assert time.monotonic() - began >= GRACE


def test_a_helper_says_that_it_has_begun() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        port = Port(theirs.detach())
        port.announce()
        assert ours.recv(100) == hello.BEGUN + b"\n"
        port.close()


def test_a_helper_begins_where_nobody_hears_it(tmp_path: Path) -> None:
    with listen(tmp_path / "port") as sock:
        port = Port(os.dup(sock.fileno()))
        port.announce()
        port.close()
