"""Showing how far a job is, on stderr: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from vmbackupd.cli.client import JobView
from vmbackupd.cli.text import amount, printable

LINE_INTERVAL = 10.0  # seconds between two lines of progress inside a step
BAR = 24  # characters
COUNTING = frozenset({"gc"})  # kinds of jobs whose progress is in things (trees, packs), and not in bytes


class Display(Protocol):
    """Where progress is shown."""

    def show(self, view: JobView) -> None:
        """The job is now like this."""

    def clear(self) -> None:
        """Make room for other output."""


class Silent:
    """No progress, only warnings."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._warned = 0

    def show(self, view: JobView) -> None:
        for warning in view.warnings[self._warned:]:
            self.clear()
            print(f"warning: {printable(warning)}", file=self._stream, flush=True)
        self._warned = max(self._warned, len(view.warnings))

    def clear(self) -> None:
        pass


class Lines(Silent):
    """A line for each step, and inside a long step at most one every :data:`LINE_INTERVAL`."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._step = ""
        self._last = 0.0

    def show(self, view: JobView) -> None:
        super().show(view)
        now = self._clock()
        if not view.step:
            return
        if view.step != self._step:
            self._step = view.step
            line = f"{_title(view)}: {view.step}"
        elif now - self._last >= LINE_INTERVAL and view.done and not view.final:
            line = f"{_title(view)}: {view.step}: {_bytes(view)}"
        else:
            return
        self._last = now
        print(printable(line), file=self._stream, flush=True)


class Bar(Silent):
    """One line that is drawn again and again: step, bar, bytes, rate."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._drawn = False
        self._step = ""
        self._begin = (0.0, 0)  # of the step: when, and at how many bytes

    def show(self, view: JobView) -> None:
        super().show(view)
        if view.final:
            self.clear()
            return
        if view.step != self._step:
            self._step = view.step
            self._begin = (self._clock(), view.done)
        self._stream.write("\r\x1b[K" + printable(self._line(view))[:self._width() - 1])
        self._stream.flush()
        self._drawn = True

    def clear(self) -> None:
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False

    def _width(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80  # 0: a terminal that does not know
        except OSError:
            return 80

    def _line(self, view: JobView) -> str:
        part = min(1.0, view.done / view.total) if view.total else 0.0
        bar = "#" * int(part * BAR)
        doing = "cancelling" if view.state == "cancelling" else view.step or view.state
        pieces = [f"{_title(view)}: {doing} [{bar:.<{BAR}}]"]
        if view.total or view.done:
            pieces.append(_bytes(view))
        elapsed = self._clock() - self._begin[0]
        if elapsed > 1 and view.done > self._begin[1] and view.kind not in COUNTING:
            pieces.append(f"{amount((view.done - self._begin[1]) / elapsed)}/s")
        return "  ".join(pieces)


def _title(view: JobView) -> str:
    return f"{view.kind} {view.vm}".strip()


def _bytes(view: JobView) -> str:
    if not view.total:
        return figure(view, view.done)
    return f"{100 * min(1.0, view.done / view.total):3.0f} %  {figure(view, view.done)} of {figure(view, view.total)}"


def figure(view: JobView, value: int) -> str:
    """A figure of a job's progress: bytes, or for some kinds of jobs a number of things."""
    return str(value) if view.kind in COUNTING else amount(value)
