"""The connection to one configured QEMU: made when it is needed, let go when it is not, looked after while somebody
watches."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

from vmbackupd.config import MachineConfig
from vmbackupd.errors import NotRunning
from vmbackupd.hypervisor import events
from vmbackupd.hypervisor.base import HypervisorLost
from vmbackupd.hypervisor.events import Event, EventHub
from vmbackupd.hypervisor.qmpclient import COMMAND, GREETING, QmpBusy, QmpClient, QmpEvents, QmpLost

log = logging.getLogger("hypervisor.qmp")

IDLE = 10.0  # the monitor serves nobody else while we hold it, but a job asks again soon
LOOK_AGAIN = 1.0  # nobody tells when a QEMU begins to listen


class Machine:
    """One QEMU of the configuration, running or not."""

    def __init__(self, name: str, config: MachineConfig) -> None:
        self.name = name
        self.config = config
        self.hub = EventHub()
        self._qmp = QmpClient(f"VM {name}")
        self._qmp.subscribe(self._heard)
        self._connecting = asyncio.Lock()
        self._users = 0
        self._idle: asyncio.TimerHandle | None = None
        self._closing: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._find_agent: Callable[[Machine], Awaitable[str | None]]
        self._agent_port: str | None = None

    async def close(self) -> None:
        """Let go of QEMU. Can be called again."""
        if self._idle is not None:
            self._idle.cancel()
        for task in (self._keeper, self._closing):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await self._qmp.close()

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None, *, timeout: float = COMMAND,
                      about: str = "") -> Any:
        """The ``return`` value of a QMP command. Raises ``NotRunning`` besides what :class:`QmpClient` raises."""
        async with self.held():
            return await self._qmp.execute(command, arguments, timeout=timeout, about=about)

    @asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """A block in which the monitor stays ours. Raises ``NotRunning`` where nobody listens."""
        self._users += 1
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        try:
            await self._connect()
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._idle = asyncio.get_running_loop().call_later(IDLE, self._let_go)

    async def running(self) -> bool:
        """Whether there is a QEMU. Raises ``QmpBusy`` where that cannot be found out."""
        try:
            async with self.held():
                return True
        except NotRunning:
            return False

    def listen(self, *names: str) -> AbstractContextManager[QmpEvents]:
        """QEMU's events of these names, as long as somebody holds the monitor (:meth:`held`)."""
        return self._qmp.listen(*names)

    @property
    def process(self) -> Path | None:
        """``/proc`` directory of the QEMU process we are connected to, where it can be told."""
        if self._qmp.peer_pid is None or not self._qmp.connected:
            return None
        path = Path("/proc", str(self._qmp.peer_pid))
        return path if path.exists() else None

    def watch(self, callback: Callable[[str], None],
              find_agent: Callable[[Machine], Awaitable[str | None]]) -> Callable[[], None]:
        """See :meth:`Hypervisor.watch`. ``find_agent`` tells the id of the guest agent's port."""
        self._find_agent = find_agent
        unsubscribe = self.hub.watch(self.name, lambda event: callback(event.kind))
        if self._keeper is None or self._keeper.done():
            self._keeper = asyncio.create_task(self._keep(), name=f"watch of VM {self.name}")
        return unsubscribe

    async def _connect(self) -> None:
        async with self._connecting:
            if self._qmp.connected:
                return
            await self._qmp.close()
            self._ended.clear()
            try:
                await self._qmp.connect(str(self.config.qmp), timeout=GREETING)
            except QmpLost as error:
                raise NotRunning(f"{error}: the VM is not running") from error

    def _let_go(self) -> None:
        self._closing = asyncio.create_task(self._close_idle(), name=f"idle connection to VM {self.name}")

    async def _close_idle(self) -> None:
        async with self._connecting:
            if not self._users and not self.hub.watched:
                await self._qmp.close()

    def _heard(self, event: Mapping[str, Any]) -> None:
        if not event:
            self._ended.set()
        elif event.get("event") == "VSERPORT_CHANGE" and event["data"]["id"] == self._agent_port:
            kind = events.AGENT_CONNECTED if event["data"]["open"] else events.AGENT_DISCONNECTED
            self.hub.dispatch(Event(kind, None))

    async def _keep(self) -> None:
        """While anybody watches: hold the monitor, and tell of the ends and starts of QEMU."""
        was: int | None = None
        known = lost = False
        while self.hub.watched:
            now: int | None = None
            try:
                await self._connect()
                now = self._qmp.peer_pid
                self._agent_port = await self._find_agent(self)
            except (NotRunning, HypervisorLost):
                pass  # it ended before we came, or right after
            except QmpBusy as error:
                if not lost:
                    log.warning("%s", error)
                    self.hub.dispatch(Event(events.LOST, None))
                lost = True
                await asyncio.sleep(LOOK_AGAIN)
                continue
            if known:
                self._tell(was, now, lost)
            was, known, lost = now, True, False
            if now is None:
                await asyncio.sleep(LOOK_AGAIN)
            else:
                await self._ended.wait()

    def _tell(self, was: int | None, now: int | None, lost: bool) -> None:
        if was is not None and was == now and not lost:
            self.hub.dispatch(Event(events.LOST, None))
        if was is not None and was != now:
            self.hub.dispatch(Event(events.STOPPED, None))
        if now is not None and was != now:
            self.hub.dispatch(Event(events.STARTED, None))
