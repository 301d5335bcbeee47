"""The parts of ``./dev bench volumes``, and what their rows shall show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.bench.measure import Sample
from tests.bench.table import Rows, Target, faster
from tests.bench.volumes import freeze, increments, slowdown
from tests.bench.volumes.machine import Machine
from tests.bench.works import OURS


@dataclass(frozen=True, slots=True)
class Part:
    """Works that are measured together: a round yields (work, tool, sample), each tool having its turn."""

    runs: int
    works: Sequence[str]
    one_round: Callable[[Machine], Iterator[tuple[str, str, Sample]]]


PARTS = {
    "freeze": Part(20, [freeze.WORK], freeze.one_round),
    "increments": Part(3, increments.WORKS, increments.one_round),
    "writer": Part(4, ["writer-disk", "writer-lun"], slowdown.one_round),
}
WORKS = [work for part in PARTS.values() for work in part.works]


def _iops(volume: str, state: str) -> Callable[[Rows], float | None]:
    """Writes in a second, as a share of those of an undisturbed writer."""

    def figure(rows: Rows) -> float | None:
        alone, beside = rows.get((f"writer-{volume}", slowdown.NONE)), rows.get((f"writer-{volume}", state))
        return beside.figures["iops"] / alone.figures["iops"] if alone and beside else None

    return figure


def _read(work: str) -> Callable[[Rows], float | None]:
    """Bytes that a backup read, as a share of those of a full one."""

    def figure(rows: Rows) -> float | None:
        full, row = rows.get((increments.FULL, OURS)), rows.get((work, OURS))
        return row.bytes_in / full.bytes_in if full and row else None

    return figure


TARGETS = [
    Target("freeze, against virsh: freeze, snapshot, thaw", faster(freeze.WORK, "virsh"), 1.0),
    *(
        Target(f"writer on the {volume} with a tracker: IOPS of those without", _iops(volume, slowdown.TRACKED), 0.9)
        for volume in ("disk", "lun")
    ),
    Target("unchanged guest: bytes read of a full backup's", _read(increments.UNCHANGED), 0.05, at_least=False),
    Target("1 % changed: bytes read of a full backup's", _read(increments.CHANGED), 0.1, at_least=False),
    *(
        Target(
            f"{work}, virtual disks, against virtnbdbackup", faster(work, increments.PEER, ours=increments.DISKS), 1.0
        )
        for work in increments.WORKS
    ),
]
