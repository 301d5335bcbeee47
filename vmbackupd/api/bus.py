"""A connection to a D-Bus, with what dbus-fast needs corrected to serve on it. Works with dbus-fast 1.84 to 5.2."""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections import deque
from functools import partial
from typing import Any

from dbus_fast import BusType, DBusError, Message, MessageType
from dbus_fast.aio import MessageBus

from vmbackupd.api.names import ROOT
from vmbackupd.errors import BackupError

log = logging.getLogger("api.bus")

OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
_DISCONNECT_TIMEOUT = 5.0


class BusUnavailable(BackupError):
    """There is no D-Bus at the address, or it does not let us in."""

    code = "BusUnavailable"


class Bus(MessageBus):
    """dbus-fast's bus with two corrections.

    It sends ObjectManager's signals from the path of the object they are about; they belong to the object manager's
    own path, and GLib's client misses objects otherwise. And it drops the connection when a message is sent while the
    socket is full, which a large listing followed by a signal is enough for: here a message is handed over only when
    the one before is written and the socket takes more.
    """

    def __init__(self, address: str | None) -> None:
        super().__init__(bus_address=address, bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
        self._outgoing: deque[tuple[Message, asyncio.Future[None]]] = deque()
        self._current: asyncio.Future[Any] | None = None
        self._waiting_fd = -1
        self._end: asyncio.Task[None] | None = None

    def send(self, msg: Message) -> asyncio.Future[None]:  # type: ignore[override]  # as in the class between
        """Send ``msg`` when its turn comes. The future ends when it is written; it is cancelled if it never can be.

        Raises ``ConnectionResetError`` for a method call when the bus is gone: no reply would ever come.
        """
        if msg.message_type is MessageType.METHOD_CALL and not self.connected:
            raise ConnectionResetError("the connection to the bus has ended")
        if msg.message_type is MessageType.SIGNAL and msg.interface == OBJECT_MANAGER:
            msg.path = ROOT
        if not msg.serial:
            msg.serial = self.next_serial()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._outgoing.append((msg, future))
        self._pump()
        return future

    def _pump(self) -> None:
        while self._outgoing and self._waiting_fd < 0 and (self._current is None or self._current.done()):
            if not self.connected:
                self._drop_outgoing()
            elif not self._writable():
                self._wait_writable()
            else:
                message, future = self._outgoing.popleft()
                self._hand_over(message, future)

    def _hand_over(self, message: Message, future: asyncio.Future[None]) -> None:
        self._current = super().send(message)
        if self._current.done():
            _settle(future, self._current)
        else:
            self._current.add_done_callback(partial(self._written, future))

    def _written(self, future: asyncio.Future[None], current: asyncio.Future[Any]) -> None:
        _settle(future, current)
        self._pump()

    def _drop_outgoing(self) -> None:
        while self._outgoing:
            self._outgoing.popleft()[1].cancel()

    def _socket_fd(self) -> int:
        assert self._fd is not None  # not public, and the same in every version
        return self._fd

    def _writable(self) -> bool:
        poll = select.poll()
        poll.register(self._socket_fd(), select.POLLOUT)
        return bool(poll.poll(0))

    def _wait_writable(self) -> None:
        # A duplicate, because dbus-fast adds and removes a writer on the descriptor itself.
        self._waiting_fd = os.dup(self._socket_fd())
        asyncio.get_running_loop().add_writer(self._waiting_fd, self._now_writable)

    def _now_writable(self) -> None:
        asyncio.get_running_loop().remove_writer(self._waiting_fd)
        os.close(self._waiting_fd)
        self._waiting_fd = -1
        self._pump()

    async def close(self) -> None:
        """Write what is waiting, then disconnect and wait until that is done."""
        if self.connected:
            waiting = [future for _, future in self._outgoing]
            if waiting:
                await asyncio.wait(waiting, timeout=_DISCONNECT_TIMEOUT)
            if self._waiting_fd >= 0:
                self._now_writable()
            self._drop_outgoing()
            self.disconnect()
        await self.gone()

    async def gone(self) -> None:
        """Wait until the connection is no more, for whatever reason."""
        if self._end is None:
            self._end = asyncio.ensure_future(self._wait_end())
        await asyncio.shield(self._end)  # who stops waiting must not end it for others

    async def _wait_end(self) -> None:
        try:
            await self.wait_for_disconnect()  # type: ignore[no-untyped-call]
        except (OSError, EOFError, DBusError) as error:
            log.debug("the bus connection ended: %s", error)


def _settle(future: asyncio.Future[None], current: asyncio.Future[Any]) -> None:
    failed = current.cancelled() or current.exception() is not None
    if future.done():
        return
    if failed:
        future.cancel()
    else:
        future.set_result(None)


async def connect(address: str | None) -> Bus:
    """Connect to the bus at ``address``, None for the system bus.

    Raises :class:`BusUnavailable`.
    """
    where = address or "the system bus"
    try:
        bus = Bus(address)
        await bus.connect()
    except (OSError, EOFError, ValueError, DBusError) as error:  # authentication and address errors are ValueErrors
        raise BusUnavailable(f"cannot connect to {where}: {error}") from error
    return bus


async def bus_call(bus: Bus, member: str, signature: str, *body: object) -> list[Any]:
    """Call a method of the bus itself.

    Raises ``DBusError``.
    """
    service = "org.freedesktop.DBus"
    reply = await bus.call(Message(destination=service, path="/org/freedesktop/DBus", interface=service, member=member,
                                   signature=signature, body=list(body)))
    return reply_body(reply)


def reply_body(reply: Message | None) -> list[Any]:
    """The values of a reply; raises ``DBusError`` when it is an error or none came."""
    if reply is None:
        raise DBusError("org.freedesktop.DBus.Error.Disconnected", "the bus connection ended before the reply")
    if reply.message_type is MessageType.ERROR:
        text = str(reply.body[0]) if reply.body else ""
        raise DBusError(reply.error_name or "org.freedesktop.DBus.Error.Failed", text, reply)
    return list(reply.body)
