"""Tables, sizes, times and progress lines."""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Callable

import pytest

from vmbackupd.cli.client import JobView
from vmbackupd.cli.options import count, seconds, share, size
from vmbackupd.cli.progress import LINE_INTERVAL, Bar, Lines
from vmbackupd.cli.table import fields, table
from vmbackupd.cli.text import amount, moment, precise_moment, word


def view(step: str = "copy", done: int = 0, total: int = 1000, state: str = "running",
         warnings: tuple[str, ...] = ()) -> JobView:
    return JobView("j00000001", "backup", "web", state, step, done, total, warnings, {}, None, 0.0, 0.0)


def test_a_table_has_straight_columns() -> None:
    assert table(["A", "SIZE"], [["long name", "1"], ["b", "100 MiB"]], right=frozenset({"SIZE"})) == (
        "A             SIZE\nlong name        1\nb          100 MiB")
    assert fields([("a", "1"), ("longer", "2"), ("empty", "")]) == "a:      1\nlonger: 2"


def test_values_for_people() -> None:
    assert moment(0) == "1970-01-01 00:00:00Z"
    assert precise_moment(1.5) == "1970-01-01 00:00:01.500Z"
    assert moment("2026-01-01T00:00:00Z") == "2026-01-01T00:00:00Z"
    assert moment(1e300) == "1e+300"
    assert moment(None) == amount(None) == word(None) == ""
    assert word(["a", {"b": True}]) == "a, b=yes"
    assert word("a\x1b[0m\nb") == "a\\x1b[0m\\nb"
    assert seconds("2s") == 2.0
    assert [size(text) for text in ("7", "50MiB", "1.5 GiB", "2K")] == [7, 50 << 20, 3 << 29, 2048]
    assert (share("30%"), share("0.5"), count("12")) == (0.3, 0.5, 12)


@pytest.mark.parametrize(("read", "text"), [
    (size, "0"), (size, "-1"), (size, "5 apples"), (size, "1e9"), (share, "101%"), (share, "nan"), (count, "-1"),
    (count, "1.5"), (count, "١"), (size, "٣MiB"),
])
def test_wrong_values_are_refused(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        read(text)


def test_lines_are_few() -> None:
    now = 0.0
    stream = io.StringIO()
    lines = Lines(stream, lambda: now)
    for second in range(25):
        now = float(second)
        lines.show(view(done=second * 10, warnings=("careful",) if second > 20 else ()))
    lines.show(view(step="seal", done=1000))
    lines.show(view(step="seal", done=1000, state="succeeded"))
    assert LINE_INTERVAL == 10
    assert stream.getvalue().splitlines() == [
        "backup web: copy", "backup web: copy:  10 %  100 B of 1000 B", "backup web: copy:  20 %  200 B of 1000 B",
        "warning: careful", "backup web: seal"]


def test_a_bar_shows_the_rate_of_the_step() -> None:
    now = 0.0
    stream = io.StringIO()
    bar = Bar(stream, lambda: now)
    bar.show(view(done=0))
    now = 2.0
    bar.show(view(done=500))
    assert stream.getvalue().split("\r\x1b[K")[-1] == (
        "backup web: copy [############............]   50 %  500 B of 1000 B  250 B/s")
    bar.show(view(done=2000, total=0, state="cancelling"))
    assert stream.getvalue().endswith("backup web: cancelling [........................]  2.0 KiB  1000 B/s")
    bar.clear()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_the_progress_of_a_gc_is_in_things_and_not_in_bytes() -> None:
    now = 0.0
    stream = io.StringIO()
    bar = Bar(stream, lambda: now)
    gc = dataclasses.replace(view(step="mark", done=0, total=8), kind="gc", vm="")
    bar.show(gc)
    now = 2.0
    bar.show(dataclasses.replace(gc, done=2))
    assert stream.getvalue().split("\r\x1b[K")[-1] == "gc: mark [######..................]   25 %  2 of 8"
