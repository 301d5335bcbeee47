"""Where the project reads an image from: the file itself, or NBD exports of it as a job meets them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from vmbackupd.engine.copyloop import Progress, copy_in
from vmbackupd.engine.filein import read_file
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.sink import ChunkSink


def fill_from_file(sink: ChunkSink, path: Path) -> None:
    """All of a raw image, its holes left out."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_file(descriptor, sink, Progress(sink.size))
    finally:
        os.close(descriptor)


def fill_from_nbd(sink: ChunkSink, socket: str) -> None:
    """All of an NBD export, as a job reads it."""
    with NbdConnection(unix=socket) as connection:
        copy_in(connection, sink, Progress(sink.size))


@contextmanager
def nbd_slices(image: Path, directory: Path, count: int) -> Iterator[list[str]]:
    """``count`` nbdkit servers, each with an equal part of the image: the sockets."""
    part = image.stat().st_size // count
    with ExitStack() as stack:
        sockets = []
        for number in range(count):
            sockets.append(str(directory / f"slice-{number}.sock"))
            words = ["nbdkit", "-f", "--exit-with-parent", "-U", sockets[-1], "--filter=offset", "file", str(image)]
            process = subprocess.Popen([*words, f"offset={number * part}", f"range={part}"], stdin=subprocess.DEVNULL)
            stack.callback(_end, process, Path(sockets[-1]))
        deadline = time.monotonic() + 20
        while not all(Path(name).exists() for name in sockets):
            if time.monotonic() > deadline:
                raise TimeoutError("nbdkit did not start in 20 s")
            time.sleep(0.01)
        yield sockets


def _end(process: subprocess.Popen[bytes], socket: Path) -> None:
    process.kill()
    process.wait()
    socket.unlink(missing_ok=True)
