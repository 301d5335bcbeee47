"""A real helper process on a unix socket in place of a virtio-serial port, and a way to it for NBD programs."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

Start = Callable[..., subprocess.Popen[bytes]]


def listen(path: Path) -> socket.socket:
    """A listening unix socket, which the helper treats like a port."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    sock.listen(4)
    return sock


class Relay:
    """A unix socket for NBD programs: every connection is carried over to a data port, past the hello."""

    def __init__(self, path: Path, connect: Callable[[], socket.socket]) -> None:
        self.path = path
        self._connect = connect
        self._listener = listen(path)
        self._stop, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="relay")
        self._thread.start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///%s?socket={self.path}"

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._wake)
        self._thread.join()
        self._listener.close()
        os.close(self._stop)

    def _run(self) -> None:
        while True:
            ready, _, _ = select.select([self._listener, self._stop], [], [])
            if self._stop in ready:
                return
            client, _ = self._listener.accept()
            with client, self._connect() as server, contextlib.suppress(ConnectionError):
                self._carry(client, server)  # until one of them is gone: the other one sees it by our closing

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        while True:
            ready, _, _ = select.select([client, server, self._stop], [], [])
            if self._stop in ready:
                return
            for sock in ready:
                data = sock.recv(65536)  # type: ignore[union-attr]
                if not data:
                    return
                other[sock].sendall(data)  # type: ignore[index]
