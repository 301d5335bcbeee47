"""Real NBD servers for the tests: nbdkit and qemu-nbd on unix sockets, each gone when its ``with`` block ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import require

# a sanitizer that is preloaded into us (see setup.py) is not for them
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


@contextmanager
def running(argv: list[str], ready: Path) -> Iterator[None]:
    """``argv`` until the block ends; entered once ``ready`` exists."""
    require(argv[0], shutil.which(argv[0]) is not None)
    words = ready.with_suffix(".stderr")
    with words.open("wb") as stderr:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=stderr, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 20
        while not ready.exists():
            assert process.poll() is None, f"{argv} ended with {process.returncode}: {words.read_text()}"
            assert time.monotonic() < deadline, f"{argv[0]} is not ready after 20 s"
            time.sleep(0.005)
        yield
    finally:
        # not terminate: nbdkit waits for its clients then
        process.kill()
        process.wait()


@contextmanager
def nbdkit(directory: Path, *arguments: str) -> Iterator[str]:
    """An nbdkit with this plugin, its filters and parameters; gives the socket's path."""
    path, pid = directory / "nbdkit.sock", directory / "nbdkit.pid"
    with running(["nbdkit", "-f", "--exit-with-parent", "-U", str(path), "-P", str(pid), *arguments], pid):
        yield str(path)
    path.unlink(missing_ok=True)
    pid.unlink(missing_ok=True)


@contextmanager
def qemu_nbd(directory: Path, image: Path, *arguments: str, form: str = "raw") -> Iterator[str]:
    """A qemu-nbd that exports ``image``; gives the socket's path."""
    path, pid = directory / "qemu-nbd.sock", directory / "qemu-nbd.pid"
    argv = ["qemu-nbd", "-t", "-k", str(path), "--pid-file", str(pid), "-f", form, *arguments, str(image)]
    with running(argv, pid):
        yield str(path)
    path.unlink(missing_ok=True)
    pid.unlink(missing_ok=True)


@contextmanager
def nbdkit_on_socket(*arguments: str) -> Iterator[socket.socket]:
    """An nbdkit that serves one connection on a socket pair; gives our end."""
    require("nbdkit", shutil.which("nbdkit") is not None)
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(["nbdkit", "-s", *arguments], stdin=theirs, stdout=theirs, env=ENVIRONMENT)
        try:
            yield ours
        finally:
            process.kill()
            process.wait()
