"""What nbdkit's Python plugin loads: one volume of a backup, read-only. Nobody imports this.

nbdkit does NBD; this file is its callbacks, and ``served`` does the work. The one parameter is ``fd``, a socket from
the process that owns this one: it sends what is to be served (with the repository's keys, so they are in no command
line or environment), then is told that all is ready. When it closes its end, by whatever death, this process ends.
"""

from __future__ import annotations

import os
import pickle
import socket
import sys
import threading
from typing import Any

API_VERSION = 2
READY = b"\0"

_owner: socket.socket
_volume: Any
_nbdkit: Any


def config(key: str, value: str) -> None:
    """A parameter of the command line."""
    global _nbdkit, _owner, _volume
    import nbdkit  # type: ignore[import-not-found] # exists within nbdkit only

    _nbdkit = nbdkit
    if key != "fd":
        raise ValueError(f"unknown parameter {key}")
    _owner = socket.socket(fileno=int(value))
    try:
        _volume = _receive()
    except Exception as error:
        _owner.sendall(f"{type(error).__name__}: {error}".encode())  # a traceback is no answer to a person
        os._exit(1)


def _receive() -> Any:
    """What the owner sends, opened."""
    with _owner.makefile("rb") as stream:
        setup = pickle.load(stream)
        if setup["python"] != sys.version_info[:2]:
            raise RuntimeError(
                f"nbdkit's Python plugin runs Python {sys.version.split()[0]}, vmbackupd {setup['python']}:"
                " install both for the same Python"
            )
        # What the owner imports from, before what this Python would; each keeps its own standard library.
        sys.path[:0] = [path for path in setup["path"] if path not in sys.path]
        request = pickle.load(stream)
    from vmbackupd.exchange.served import ServedVolume

    return ServedVolume.of(request)


def config_complete() -> None:
    """The parameters are over."""
    if "_volume" not in globals():
        raise ValueError("the parameter fd is missing: vmbackupd starts this server, nobody else")


def thread_model() -> int:
    """Any number of requests at once."""
    return int(_nbdkit.THREAD_MODEL_PARALLEL)


def after_fork() -> None:
    """The socket is bound: clients may come."""
    threading.Thread(target=_end_with_owner, daemon=True).start()
    _owner.sendall(READY)


def _end_with_owner() -> None:
    try:
        while _owner.recv(1):
            pass
    finally:
        os._exit(0)


def open(readonly: bool) -> int:
    """A client has come."""
    return 1


def get_size(handle: int) -> int:
    """Bytes of the image."""
    return int(_volume.size)


def block_size(handle: int) -> tuple[int, int, int]:
    """Least, best and most bytes of a request. A large one is held in memory, by each of many threads."""
    return 1, min(max(_volume.chunk_size, 512), 2**20), 4 * 2**20


def is_rotational(handle: int) -> bool:
    """Reading far apart costs no more than reading on."""
    return False


def can_multi_conn(handle: int) -> bool:
    """Nothing is ever written, so all connections see the same."""
    return True


def can_extents(handle: int) -> bool:
    """Holes are known without reading."""
    return True


def pread(handle: int, buffer: memoryview, offset: int, flags: int) -> None:
    """Fill ``buffer``."""
    _checked(_volume.read, offset, buffer)


def extents(handle: int, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Which parts are data."""
    hole = _nbdkit.EXTENT_HOLE | _nbdkit.EXTENT_ZERO
    return [(at, length, 0 if data else hole) for at, length, data in _checked(_volume.extents, offset, count)]


def _checked(call: Any, *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except Exception:
        import errno

        _nbdkit.set_error(errno.EIO)
        raise
