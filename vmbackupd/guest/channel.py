"""The control channel to the guest helper: JSON lines over the unix socket of a virtio-serial port.

The guest is not trusted: lines are bounded, every wait has a deadline, and an answer that is not the one to our
request ends the channel.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Mapping

from vmbackupd import typed
from vmbackupd.errors import GuestHelperError, GuestHelperUnavailable, GuestProtocolError
from vmbackupd.guest import hello

MAX_LINE = 4 * 2**20
_READ_SIZE = 256 * 1024


class Channel:
    """One session. After any error but ``GuestHelperError`` it is closed and stays so."""

    def __init__(self, sock: socket.socket, vm: str) -> None:
        """``sock`` is past the hello and not blocking; use :meth:`open`."""
        self.vm = vm
        self._socket = sock
        self._buffer = bytearray()
        self._number = 0
        self._lock = asyncio.Lock()
        self._closed = False

    @classmethod
    async def open(cls, path: str, *, vm: str, timeout: float) -> Channel:
        """Connect and say hello, again and again for ``timeout`` seconds: the helper may be starting still.

        Raises ``GuestHelperUnavailable`` when nobody answers, ``GuestProtocolError``.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        try:
            sock = await hello.connect(path, deadline)
        except OSError as error:
            raise GuestHelperUnavailable(f"VM {vm}: cannot connect to the channel {path}: {error}") from error
        try:
            await hello.greet(sock, deadline)
        except OSError as error:  # TimeoutError is one
            sock.close()
            raise GuestHelperUnavailable(
                f"VM {vm}: no guest helper answered on {path} within {timeout:g} s{f' ({error})' if str(error) else ''}"
            ) from error
        except BaseException:
            sock.close()
            raise
        return cls(sock, vm)

    async def request(self, method: str, params: Mapping[str, object], timeout: float) -> dict[str, object]:
        """The result of ``method``, whose content is unchecked.

        Raises ``GuestHelperError`` (``reason`` is the helper's code) when the helper says it failed,
        ``GuestHelperUnavailable`` when no answer comes in time or the channel is lost, ``GuestProtocolError``.
        """
        async with self._lock:
            if self._closed:
                raise GuestHelperUnavailable(f"VM {self.vm}: the channel to the guest helper is closed")
            try:
                async with asyncio.timeout(timeout):
                    return await self._exchange(method, params)
            except GuestHelperError:
                raise
            except TimeoutError as error:
                await self.close()
                raise GuestHelperUnavailable(
                    f"VM {self.vm}: the guest helper did not answer {method} within {timeout:g} s"
                ) from error
            except OSError as error:
                await self.close()
                raise GuestHelperUnavailable(f"VM {self.vm}: the channel to the guest helper broke: {error}") from error
            except BaseException:  # also when cancelled: an answer may still come, and would be taken for another's
                await self.close()
                raise

    async def close(self) -> None:
        """Close the connection; the helper goes on running."""
        self._closed = True
        self._socket.close()

    @property
    def closed(self) -> bool:
        return self._closed

    async def _exchange(self, method: str, params: Mapping[str, object]) -> dict[str, object]:
        self._number += 1
        line = json.dumps({"id": self._number, "method": method, "params": dict(params)}, separators=(",", ":"))
        await asyncio.get_running_loop().sock_sendall(self._socket, line.encode() + b"\n")
        what = f"VM {self.vm}: the guest helper's answer to {method}"
        reply = typed.parse_object(await self._line(what), what=what, max_length=MAX_LINE, error=GuestProtocolError)
        if reply.get("id") != self._number:
            raise GuestProtocolError(f"{what} is to another request")
        if "error" in reply:
            raise self._failure(method, reply, what)
        return typed.get_object(reply, "result", at=what, error=GuestProtocolError)

    async def _line(self, what: str) -> bytes:
        """The next line, without its newline."""
        searched = 0
        while True:
            end = self._buffer.find(b"\n", searched)
            if end >= 0:
                line = bytes(self._buffer[:end])
                del self._buffer[: end + 1]
                if line.endswith(hello.BEGUN):
                    raise ConnectionResetError("it ended, and another was started")
                return line
            searched = len(self._buffer)
            if searched > MAX_LINE:
                raise GuestProtocolError(f"{what} is longer than {MAX_LINE} bytes")
            data = await asyncio.get_running_loop().sock_recv(self._socket, _READ_SIZE)
            if not data:
                raise ConnectionResetError("closed by the guest")
            self._buffer += data

    def _failure(self, method: str, reply: dict[str, object], what: str) -> GuestHelperError:
        error = typed.get_object(reply, "error", at=what, error=GuestProtocolError)
        code = typed.get_str(error, "code", max_length=64, at=what, error=GuestProtocolError)
        message = typed.get_str(error, "message", max_length=4096, at=what, error=GuestProtocolError)
        return GuestHelperError(f"VM {self.vm}: {method} failed in the guest: {message}", reason=code)
