"""The line to the host: a virtio-serial port, opened by one process, without a dependable end of file.

The kernel (drivers/char/virtio_console.c): ``read`` gives 0 bytes while nobody is connected on the host, ``poll`` then
says POLLIN and POLLHUP at once; bytes that the host queued before it disconnected stay readable. So every session
begins with a line ``VMBK1 <32 hex digits>``: everything before it is discarded, and its nonce is sent back. A host
that is not answered tries again with another nonce and accepts only the answer to its last.

What the host sends, and that it came or went, are told by two paths of the kernel, the latter a work queue: a hello may
be read before its host is known to have come, or the one before it to have gone. So nobody counts as gone who has not
been away for ``GRACE``.

A listening socket works like a port: one connection at a time, the next accepted when it has ended.
"""

import contextlib
import errno
import os
import re
import select
import socket
import stat
import time
from typing import Optional

from . import PROTOCOL

PORTS = "/sys/class/virtio-ports"
PAUSE = 0.02  # seconds between looks at a port nobody is connected to: its poll never blocks
GRACE = 1.0  # seconds
READ_SIZE = 65536
WRITE_SIZE = 32768  # the kernel takes no more at once

_HELLO = re.compile(rb"VMBK1 ([0-9a-f]{32})\n")
_HELLO_LENGTH = 39
HELLO_BEGIN = b"VMBK"
_BEGUN = b"VMBK1 begun\n"


class PortClosed(Exception):
    """Nobody is connected on the host's side, now."""


class PortGone(PortClosed):
    """The port was unplugged, or is a stream that has ended: nobody will ever connect again."""


class Resync(Exception):
    """What came is not what may come here: the session starts anew at the next hello."""


class Port:
    """Buffered, non-blocking input and output with deadlines. ``descriptor`` may be a port, a pty, a connected socket
    or a listening one."""

    def __init__(self, descriptor: int) -> None:
        self._listener: Optional[socket.socket] = None
        self._connection = descriptor
        self._ends = False  # whether an end of file is final
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            self._ends = True
            opened = socket.socket(fileno=os.dup(descriptor))
            if opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                opened.setblocking(False)
                os.close(descriptor)
                self._listener, self._connection, self._ends = opened, -1, False
            else:
                opened.close()
        if self._connection >= 0:
            os.set_blocking(self._connection, False)
        self._lost = False  # a connection of the listener has ended; ``reset`` makes room for the next
        self._away: Optional[float] = None  # monotonic time since which nobody has seemed connected to the port
        self.buffer = bytearray()

    def close(self) -> None:
        """Let go of the port; another process may open it then."""
        if self._connection >= 0:
            os.close(self._connection)
            self._connection = -1
        if self._listener is not None:
            self._listener.close()

    def fill(self, seconds: float) -> bool:
        """Add what has come to ``buffer``, waiting up to ``seconds`` for it; False when nothing came.

        Raises ``PortClosed`` when nobody is connected (the caller pauses before it looks again).
        """
        self._require_connection()
        self._poll(select.POLLIN, seconds)
        try:
            data = os.read(self._connection, READ_SIZE)
        except BlockingIOError:
            self._away = None
            return False
        except OSError as error:
            raise self._closed(error)
        if not data:
            self._nobody()
            return False
        self._away = None
        self.buffer += data
        return True

    def write(self, data: "bytes | bytearray | memoryview", deadline: Optional[float] = None) -> None:
        """Send all of ``data``; ``deadline`` is monotonic time. Raises ``PortClosed`` when the host went or takes
        nothing."""
        view = memoryview(data)
        while view:
            self._require_connection()
            try:
                view = view[os.write(self._connection, view[:WRITE_SIZE]) :]
                self._away = None
                continue
            except BlockingIOError:
                pass
            except OSError as error:
                raise self._closed(error)
            if self._poll(select.POLLOUT, 1.0) & select.POLLHUP:
                self._nobody()
            if deadline is not None and time.monotonic() > deadline:
                raise PortClosed

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes. Raises ``PortClosed``."""
        while len(self.buffer) < count:
            self.fill(1.0)
        taken = bytes(self.buffer[:count])
        del self.buffer[:count]
        return taken

    def begins_with_hello(self) -> bool:
        """Whether the next bytes are the host's attempt to begin anew; waits for four bytes."""
        while len(self.buffer) < len(HELLO_BEGIN):
            self.fill(1.0)
        return self.buffer.startswith(HELLO_BEGIN)

    def find_hello(self) -> Optional[bytes]:
        """The nonce of the last hello in the buffer, everything up to it discarded; None when there is none yet."""
        every = list(_HELLO.finditer(self.buffer))
        if not every:
            del self.buffer[: max(0, len(self.buffer) - _HELLO_LENGTH)]  # may end with the beginning of one
            return None
        nonce, end = every[-1].group(1), every[-1].end()
        del self.buffer[:end]
        return bytes(nonce)

    def announce(self) -> None:
        """Tell a host that is in a session with a helper that was here before: that one is no more."""
        with contextlib.suppress(PortClosed):
            self.write(_BEGUN, time.monotonic())

    def answer_hello(self, nonce: bytes) -> None:
        """Send a host's nonce back: the session begins."""
        self.write(b"VMBK1 " + nonce + b" %d\n" % PROTOCOL, time.monotonic() + 10)

    def await_hello(self) -> None:
        """Wait, however long, for a host that says hello, and answer it. Raises ``PortGone``."""
        while True:
            nonce = self.find_hello()
            try:
                if nonce is not None:
                    self.answer_hello(nonce)
                    return
                self.fill(1.0)
            except PortGone:
                raise
            except PortClosed:
                self.reset()
                time.sleep(PAUSE)

    def reset(self) -> None:
        """After ``PortClosed``, once no thread writes any more: drop a connection that has ended, take the next."""
        if self._listener is None:
            return
        if self._lost:
            os.close(self._connection)
            self._connection, self._lost = -1, False
            self.buffer.clear()
        if self._connection < 0:
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                return
            self._connection = accepted.detach()
            os.set_blocking(self._connection, False)

    def _require_connection(self) -> None:
        if self._connection < 0 or self._lost:
            raise PortClosed

    def _nobody(self) -> None:
        """Nobody seems to be connected: pauses. Raises ``PortClosed`` once it has been so for long enough."""
        now, since = time.monotonic(), self._away  # another thread may be writing
        if since is None:
            self._away = since = now
        if self._ends or self._listener is not None or now - since > GRACE:
            raise self._closed(None)
        time.sleep(PAUSE)

    def _poll(self, events: int, seconds: float) -> int:
        poller = select.poll()
        poller.register(self._connection, events)
        ready = poller.poll(int(seconds * 1000))
        return ready[0][1] if ready else 0

    def _closed(self, error: Optional[OSError]) -> PortClosed:
        """What a failed read or write means: for now, or for good."""
        if self._listener is not None:
            self._lost = True
            return PortClosed()
        if self._ends or (error is not None and error.errno in (errno.ENODEV, errno.EBADF)):
            return PortGone()
        return PortClosed()


def hello_in(line: bytes) -> Optional[bytes]:
    """The nonce when ``line`` (without its newline) ends with a hello, whatever stale bytes stand before it."""
    found = re.search(rb"VMBK1 ([0-9a-f]{32})\Z", line)
    return found.group(1) if found else None


def open_port(name: str, seconds: float) -> Port:
    """The virtio-serial port called ``name``, waited for up to ``seconds``. Raises ``OSError`` (EBUSY: another has
    it open)."""
    deadline = time.monotonic() + seconds
    while True:
        path = _port_path(name)
        if path is not None:
            try:
                return Port(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            except FileNotFoundError:
                pass  # the kernel knows it, its node is still to come
        if time.monotonic() > deadline:
            raise FileNotFoundError(errno.ENOENT, "no virtio-serial port of this name", name)
        time.sleep(PAUSE)


def _port_path(name: str) -> Optional[str]:
    """The kernel's node of a port: udev's link by name may lag behind."""
    try:
        entries = os.listdir(PORTS)
    except FileNotFoundError:
        return None
    for entry in entries:
        try:
            with open(os.path.join(PORTS, entry, "name")) as file:
                if file.read().strip() == name:
                    return "/dev/" + entry
        except OSError:
            continue  # unplugged meanwhile
    return None
