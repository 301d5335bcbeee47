"""How the work tells the job what it is doing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PROGRESS_INTERVAL = 0.25  # seconds between two notifications of progress


class JobObserver:
    """Where the work reports its step, its bytes and its warnings. Call it in the event loop only.

    ``notify`` gets the names of what changed (``step``, ``progress``, ``warnings``). Steps and warnings are passed on
    at once, progress at most every :data:`PROGRESS_INTERVAL`; the last figure is never lost.
    """

    def __init__(self, notify: Callable[[set[str]], None]) -> None:
        self.current_step = ""
        self.bytes_done = 0
        self.bytes_total = 0
        self.warnings: list[str] = []
        self._notify = notify
        self._last = float("-inf")
        self._timer: asyncio.TimerHandle | None = None

    def step(self, name: str) -> None:
        """The work begins step ``name``."""
        self.current_step = name
        self._flush({"step"})

    def expect(self, total: int) -> None:
        """The work will be ``total`` bytes in all."""
        self.progress(self.bytes_done, total)

    def progress(self, done: int, total: int | None = None) -> None:
        """``done`` bytes are done, of ``total`` where that is newly known."""
        new_total = self.bytes_total if total is None else total
        if (done, new_total) == (self.bytes_done, self.bytes_total):
            return
        self.bytes_done, self.bytes_total = done, new_total
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        wait = self._last + PROGRESS_INTERVAL - loop.time()
        if wait <= 0:
            self._flush({"progress"})
        else:
            self._timer = loop.call_later(wait, self._flush, {"progress"})

    def warning(self, text: str) -> None:
        """Something an administrator should know that does not fail the job."""
        self.warnings.append(text)
        self._flush({"warnings"})

    def close(self) -> set[str]:
        """No more notifications; returns what had not been passed on yet."""
        pending = {"progress"} if self._timer is not None else set()
        self._stop_timer()
        return pending

    def _flush(self, changed: set[str]) -> None:
        if self._timer is not None:
            changed = changed | {"progress"}
        self._stop_timer()
        if "progress" in changed:
            self._last = asyncio.get_running_loop().time()
        self._notify(changed)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
