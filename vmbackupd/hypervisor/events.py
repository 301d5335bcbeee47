"""What a hypervisor tells on its own, handed to whoever waits for it. Everything here runs in the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

log = logging.getLogger("hypervisor.events")

STARTED, STOPPED = "started", "stopped"
AGENT_CONNECTED, AGENT_DISCONNECTED = "agent-connected", "agent-disconnected"
BLOCK_JOB = "block-job"
DEVICE_REMOVED, DEVICE_KEPT = "device-removed", "device-kept"
LOST = "hypervisor-lost"


@dataclass(frozen=True, slots=True)
class Event:
    """``subject`` is the disk target or the device alias it is about, ``detail`` the state that was reached (a block
    job's ``ready``, ``completed``, ``failed``, ``cancelled``). ``uuid`` is None for what concerns every domain."""

    kind: str
    uuid: str | None
    subject: str = ""
    detail: str = ""


class EventHub:
    """Gives events to subscribers. A subscriber of one domain also gets what concerns all."""

    def __init__(self) -> None:
        self._receivers: list[tuple[str, Callable[[Event], None]]] = []

    @property
    def watched(self) -> set[str]:
        """The domains somebody listens to."""
        return {uuid for uuid, _ in self._receivers}

    def dispatch(self, event: Event) -> None:
        for uuid, receive in list(self._receivers):
            if event.uuid is None or event.uuid == uuid:
                try:
                    receive(event)
                except Exception:  # one receiver's bug must not keep the event from the others
                    log.exception("a receiver of %s events failed", event.kind)

    def watch(self, uuid: str, receive: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``receive`` with each event of a domain until the returned function is called."""
        entry = (uuid, receive)
        self._receivers.append(entry)

        def unsubscribe() -> None:
            if entry in self._receivers:
                self._receivers.remove(entry)

        return unsubscribe

    @contextmanager
    def listen(self, uuid: str) -> Iterator[asyncio.Queue[Event]]:
        """A queue that fills with the events of a domain."""
        queue: asyncio.Queue[Event] = asyncio.Queue()
        unsubscribe = self.watch(uuid, queue.put_nowait)
        try:
            yield queue
        finally:
            unsubscribe()


async def next_event(queue: asyncio.Queue[Event], timeout: float) -> Event | None:
    """The next event, None when there is none within ``timeout`` seconds."""
    try:
        return await asyncio.wait_for(queue.get(), timeout)
    except TimeoutError:
        return None
