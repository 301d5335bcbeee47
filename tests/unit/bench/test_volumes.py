"""The parts of ``./dev bench volumes`` that need no guest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import chart
from tests.bench.__main__ import arguments
from tests.bench.measure import Sample
from tests.bench.table import Row
from tests.bench.volumes import churn
from tests.bench.volumes.table import PARTS, TARGETS, WORKS

CHUNK = churn.CHUNK


def chunks(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[at : at + CHUNK] for at in range(0, len(data), CHUNK)]


def test_one_chunk_in_a_hundred_changes_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "data"
    churn.write(str(path), 200, seed=1)
    before = chunks(path)
    assert len(set(before)) == 200
    assert churn.change(str(path), 100, seed=2) == 2
    after = chunks(path)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 2
    assert len(set(before) & set(after)) == 198


def row(work: str, tool: str, seconds: float, **figures: float) -> Row:
    return Row(work, tool, [Sample(seconds, figures=figures), Sample(seconds, figures=figures)])


def test_figures_of_a_work_stand_beside_the_common_ones() -> None:
    told = row("writer-lun", "none", 0.01, iops=100.0).to_json()
    assert told["figures"] == {"iops": [100.0, 100.0]}
    assert set(told) - {"figures"} == set(Row("freeze", "virsh", [Sample(1.0)]).to_json())


def test_the_slow_down_is_a_share_of_the_undisturbed_writer() -> None:
    rows = [row("writer-lun", "none", 0.01, iops=100.0), row("writer-lun", "tracked", 0.0125, iops=80.0)]
    found = {target.text: target.figure({(row.work, row.tool): row for row in rows}) for target in TARGETS}
    assert [figure for figure in found.values() if figure is not None] == [pytest.approx(0.8)]


def test_the_chart_shows_the_shorter_time_first() -> None:
    drawn = chart.draw([row("freeze", "virsh", 2.0), row("freeze", "vmbackupd", 0.5)], {}, "", by_time=WORKS)
    assert drawn.index(">vmbackupd<") < drawn.index(">virsh<")
    assert ">500 ms<" in drawn and ">2 s<" in drawn


def test_a_part_can_be_asked_for_by_name() -> None:
    for name in ("volumes", *PARTS):
        assert arguments([name]).works == [name]
    with pytest.raises(SystemExit):
        arguments(["no-such-work"])
