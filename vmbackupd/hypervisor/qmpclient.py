"""QMP, the control protocol of QEMU and qemu-storage-daemon (qemu: docs/interop/qmp-spec.txt).

The only module that imports qemu.qmp. A monitor serves one client at a time; commands of one client are answered in
their order, and may be issued by several tasks at once.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qemu.qmp import ExecuteError, QMPClient, QMPError, Runstate

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.base import HypervisorLost

GREETING = 5.0  # QEMU greets at once, unless it serves somebody else
COMMAND = 30.0
CLOSE = 10.0
DIAL_AGAIN = 0.1
REPLY_LIMIT = 64 << 20  # bytes of one reply

log = logging.getLogger("hypervisor.qmpclient")
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it logs it raises as well, for us to judge


class QmpRefused(HypervisorError):
    """QEMU answered a command with an error. ``reason`` is its text, ``kind`` its class (``DeviceNotFound``,
    ``CommandNotFound``, ``GenericError``)."""

    code = "HypervisorCommand"

    def __init__(self, message: str, *, reason: str, kind: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.kind = kind


class QmpLost(HypervisorLost):
    """The connection ended, or was never made: there is no such process any more, or it closed its monitor."""

    code = "HypervisorGone"


class QmpBusy(HypervisorError):
    """There is a monitor, but it does not greet: it serves another client."""

    code = "HypervisorBusy"


class QmpEvents:
    """The events of some names that have come since :meth:`QmpClient.listen`, in their order."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._queue: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()

    def put(self, event: Mapping[str, Any]) -> None:
        if event.get("event") in self._names:
            self._queue.put_nowait(event)

    async def next(self, timeout: float) -> Mapping[str, Any] | None:
        """The next event; None when there is none within ``timeout`` seconds."""
        try:
            return await asyncio.wait_for(self._queue.get(), timeout)
        except TimeoutError:
            return None


class QmpClient:
    """One connection. ``name`` begins the messages of its errors. To be used in one event loop."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._qmp = QMPClient(name, readbuflen=REPLY_LIMIT)
        self._receivers: list[Callable[[Mapping[str, Any]], None]] = []
        self._qmp.events.event_filter = self._accept
        self._watcher: asyncio.Task[None] | None = None
        self.peer_pid: int | None = None

    @property
    def connected(self) -> bool:
        return bool(self._qmp.runstate is Runstate.RUNNING)

    async def connect(self, path: str, *, timeout: float = GREETING) -> None:
        """Connect to the unix socket at ``path``. Raises ``QmpLost`` where nobody listens, ``QmpBusy`` where nobody
        greets within ``timeout`` seconds."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout
        while True:
            peer = self._dial(path)
            try:
                if peer is not None:
                    await self.use(peer, timeout=max(0.0, end - loop.time()))
                    return
            except QmpLost as error:
                log.debug("%s", error)  # it may be about to end, or to turn to the next client
                assert peer is not None
                peer.close()
            except BaseException:
                assert peer is not None
                peer.close()
                raise
            if loop.time() >= end:
                raise self._busy()
            await asyncio.sleep(DIAL_AGAIN)

    def _dial(self, path: str) -> socket.socket | None:
        """A connection to whoever listens; None where the queue of clients is full (a unix socket tells so at once)."""
        peer = socket.socket(socket.AF_UNIX)
        peer.setblocking(False)
        try:
            peer.connect(path)
        except BlockingIOError:
            peer.close()
            return None
        except OSError as error:
            peer.close()
            raise QmpLost(f"{self._name}: nobody listens at the QMP socket {path}: {error.strerror}") from error
        return peer

    async def use(self, peer: socket.socket, *, timeout: float = GREETING) -> None:
        """Use a socket that is connected; it stays the caller's when this fails. Raises ``QmpLost``, ``QmpBusy``."""
        try:
            self.peer_pid = _peer_pid(peer)
            await asyncio.wait_for(self._qmp.connect(peer), timeout)
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise self._busy() from None
            if isinstance(error, QMPError | OSError | EOFError):
                raise QmpLost(f"{self._name}: the monitor ended the connection: {error}") from error
            raise
        self._watcher = asyncio.create_task(self._watch_end(), name=f"end of {self._name}")

    def _busy(self) -> QmpBusy:
        return QmpBusy(
            f"{self._name}: its monitor does not answer. A QMP monitor serves one client at a time, and another program"
            " seems to hold this one: end that, or give vmbackupd a monitor of its own (-qmp"
            " unix:PATH,server=on,wait=off; a QEMU may have several)")

    async def close(self) -> None:
        """Let go of it. Can be called again."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
        try:
            if self._qmp.runstate is not Runstate.IDLE:
                await asyncio.wait_for(self._qmp.disconnect(), CLOSE)
        except (QMPError, OSError, EOFError, TimeoutError):
            pass  # what there is to say about a connection that is being closed is of no use
        if watcher is not None:
            await asyncio.wait({watcher})

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND,
                      about: str = "") -> Any:
        """The ``return`` value of a command; ``about`` is what it works on, for messages.

        Raises ``QmpRefused``, ``QmpLost``, and ``HypervisorError`` where there is no answer in time.
        """
        prefix = f"{self._name}: {command}" + (f" ({about})" if about else "")
        try:
            return await asyncio.wait_for(self._qmp.execute(command, arguments), timeout)
        except ExecuteError as error:
            raise QmpRefused(f"{prefix}: {error}", reason=str(error), kind=error.error.error.class_) from error
        except TimeoutError:
            raise HypervisorError(f"{prefix}: no answer within {timeout:g} s") from None
        except (QMPError, OSError, EOFError) as error:
            raise QmpLost(f"{prefix}: it is gone") from error

    @contextmanager
    def listen(self, *names: str) -> Iterator[QmpEvents]:
        """The events of these names from now on."""
        events = QmpEvents(names)
        self._receivers.append(events.put)
        try:
            yield events
        finally:
            self._receivers.remove(events.put)

    def subscribe(self, receive: Callable[[Mapping[str, Any]], None]) -> None:
        """Give every event to ``receive`` from now on, and an empty mapping when the connection has ended."""
        self._receivers.append(receive)

    async def _watch_end(self) -> None:
        while self._qmp.runstate is Runstate.RUNNING:
            await self._qmp.runstate_changed()
        self._tell({})

    def _accept(self, event: Mapping[str, Any]) -> bool:
        """Called by the library with each event, instead of keeping it."""
        self._tell(event)
        return False

    def _tell(self, event: Mapping[str, Any]) -> None:
        for receive in list(self._receivers):
            receive(event)


def _peer_pid(peer: socket.socket) -> int | None:
    """Who made the other end: of a socket pair its maker, of a listening socket who listens."""
    pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid if pid > 0 else None
