"""Ctrl-C while we wait for a job: on a terminal it asks, elsewhere it lets the job go on without us."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from types import TracebackType


class Interrupts:
    """Turns signals, SIGINT if no others are named, into something to await, as a context manager."""

    def __init__(self, *signals: signal.Signals) -> None:
        self._count: asyncio.Queue[None] = asyncio.Queue()
        self._signals = signals or (signal.SIGINT,)

    def __enter__(self) -> Interrupts:
        for number in self._signals:
            asyncio.get_running_loop().add_signal_handler(number, self._count.put_nowait, None)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        for number in self._signals:
            asyncio.get_running_loop().remove_signal_handler(number)

    async def next(self) -> None:
        """Wait for a Ctrl-C."""
        await self._count.get()


def can_ask() -> bool:
    """Whether there is a person at a terminal."""
    return sys.stdin.isatty() and sys.stderr.isatty()


async def ask(question: str) -> str | None:
    """What the person answers, in lower case, None at the end of input. Cancellable."""
    loop = asyncio.get_running_loop()
    sys.stderr.write(question)
    sys.stderr.flush()
    ready = asyncio.Event()
    fd = sys.stdin.fileno()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
    # A terminal hands out whole lines; Python's own buffering must not take more than this one.
    line = os.read(fd, 1024)
    return line.decode(errors="replace").strip().lower() if line else None
