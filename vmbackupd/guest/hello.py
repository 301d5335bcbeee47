"""How a session on a virtio-serial port begins: the host sends ``VMBK1 <nonce>``, the helper sends the nonce back.

A port may hold stale bytes of an earlier session in both directions, and the helper may be in the middle of it. So an
unanswered hello is repeated with another nonce, and only the answer to the last one counts: nothing stale can follow
it. Where the helper speaks first, its first bytes belong to the answer: it may have given the session up in between.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable

from vmbackupd.errors import GuestHelperUnavailable, GuestProtocolError

PROTOCOL = 1
"""Version of the control protocol; the helper must answer with the same."""

BEGUN = b"VMBK1 begun"
"""What a helper says, unasked, when it starts: another, which may have been killed in the middle of a line, is gone."""

RETRY = 2.0  # seconds until a hello is repeated
MAX_DISCARDED = 256 * 2**20  # bytes of an old session that are skipped; QEMU's queues hold far less
_MAX_VERSION = 12  # characters


class Hello:
    """Finds the answer in a stream of bytes whose beginning may be stale."""

    def __init__(self) -> None:
        self._nonce = b""
        self._discarded = 0

    def line(self) -> bytes:
        """The next attempt: a line with a fresh nonce."""
        self._nonce = secrets.token_hex(16).encode()
        return b"VMBK1 " + self._nonce + b"\n"

    def look(self, data: bytes) -> tuple[int, bool]:
        """(how many bytes of ``data`` are done with, whether they end with the answer to the last attempt).

        Bytes that are not done with are to be shown again, with what follows them. Raises ``GuestProtocolError`` for a
        flood, ``GuestHelperUnavailable`` for another protocol version.
        """
        answer = b"VMBK1 " + self._nonce + b" "
        at = data.find(answer)
        if at < 0:
            return self._discard(len(data) - _overlap(data, answer)), False
        end = data.find(b"\n", at)
        if end < 0:
            if len(data) - at > len(answer) + _MAX_VERSION:
                raise GuestProtocolError("the guest helper's hello does not end")
            return self._discard(at), False
        self._check_version(data[at + len(answer) : end])
        return end + 1, True

    def _discard(self, count: int) -> int:
        self._discarded += count
        if self._discarded > MAX_DISCARDED:
            raise GuestProtocolError(f"the guest sent {self._discarded} bytes and no answer to a hello")
        return count

    def _check_version(self, text: bytes) -> None:
        if text != b"%d" % PROTOCOL:
            version = text[:_MAX_VERSION].decode("ascii", "replace")
            raise GuestHelperUnavailable(
                f"the guest helper speaks version {version!r} of the protocol, this host version {PROTOCOL}: install "
                "the same version of vmbackupd-guest in the guest, or remove it and let the host bring its own"
            )


def _overlap(data: bytes, wanted: bytes) -> int:
    """Length of the longest end of ``data`` that ``wanted`` begins with."""
    for length in range(min(len(data), len(wanted) - 1), 0, -1):
        if data.endswith(wanted[:length]):
            return length
    return 0


async def connect(path: str, deadline: float) -> socket.socket:
    """A non-blocking socket connected to ``path``; ``deadline`` is the loop's time. Raises ``OSError``,
    ``TimeoutError``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        async with asyncio.timeout_at(deadline):
            await asyncio.get_running_loop().sock_connect(sock, path)
    except BaseException:
        sock.close()
        raise
    return sock


async def greet(sock: socket.socket, deadline: float, first: bytes = b"") -> None:
    """Do the hello on a non-blocking socket, and take nothing from it that comes after the answer: that has to begin
    with ``first``.

    Raises ``TimeoutError`` when nobody answers, ``OSError`` or ``GuestProtocolError``.
    """
    loop = asyncio.get_running_loop()
    hello = Hello()
    while True:
        async with asyncio.timeout_at(deadline):
            await loop.sock_sendall(sock, hello.line())
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + RETRY)):
                await _answered(sock, hello)
                await _begins(sock, first)
                return
        except TimeoutError:
            if loop.time() >= deadline:
                raise


async def _answered(sock: socket.socket, hello: Hello) -> None:
    """Read up to the answer. Peeks first, because an NBD greeting may follow at once."""
    shown = b""
    while True:
        shown = await _more(sock, shown)
        done, found = hello.look(shown)
        if done:
            sock.recv(done)
        shown = shown[done:]
        if found:
            return


async def _begins(sock: socket.socket, first: bytes) -> None:
    """Wait for ``first``, and leave it to be read."""
    shown = b""
    while len(shown) < len(first):
        shown = await _more(sock, shown)
        if shown[: len(first)] != first[: len(shown)]:
            raise GuestProtocolError(f"the guest helper begins with {shown[: len(first)]!r}, not with {first!r}")


async def _more(sock: socket.socket, shown: bytes) -> bytes:
    """What there is to read, without taking it, once it is more than ``shown``."""
    while True:
        await _readable(sock)
        data = sock.recv(65536, socket.MSG_PEEK)
        if not data:
            raise ConnectionResetError("the guest's port was closed")
        if len(data) > len(shown):
            return data
        await asyncio.sleep(0.005)  # the rest takes a moment; the loop would say at once that there is something


async def _readable(sock: socket.socket) -> None:
    """Until ``sock`` has bytes to read, or has ended."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    remove: Callable[[int], bool] = loop.remove_reader
    number = sock.fileno()
    loop.add_reader(number, wake)
    try:
        await ready
    finally:
        remove(number)
