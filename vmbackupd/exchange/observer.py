"""Who is told how far an export, an import or a server is, and how work in a thread reports to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

INTERVAL = 0.2  # seconds between looks at the engine's counters

T = TypeVar("T")


class Observer(Protocol):
    """Called in the event loop only."""

    def step(self, name: str) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def warning(self, text: str) -> None: ...


class Stoppable(Protocol):
    """What ends work in a thread, soon: a ``Progress`` of the engine, for example."""

    def cancel(self) -> None: ...


async def in_thread(work: Callable[[], T], progress: Stoppable, report: Callable[[], None]) -> T:
    """Run ``work`` in a thread, and ``report`` every :data:`INTERVAL` meanwhile.

    A cancellation cancels ``progress``, and is passed on when the thread has ended: it works on buffers and files of
    ours until then.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        while not thread.done():
            await asyncio.wait({thread}, timeout=INTERVAL)
            report()
    except BaseException:
        progress.cancel()
        while not thread.done():
            try:
                await asyncio.wait({thread})
            except asyncio.CancelledError:
                continue
        if not thread.cancelled():
            thread.exception()  # retrieved: the first error is the one that counts
        raise
    return thread.result()
