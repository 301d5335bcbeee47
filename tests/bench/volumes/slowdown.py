"""What a writer in the guest feels of a backup: fio, writing at random places of a file on a LUN and of one on a
virtual disk, 4 KiB at a time, past the page cache, one write after the other."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.measure import Failed, Sample
from tests.bench.volumes.machine import FILES, Machine
from tests.integration.service import Pause

NONE, TRACKED, HELD, COPYING = "none", "tracked", "held", "copying"
STATES = (NONE, TRACKED, HELD, COPYING)
ENOUGH = 0.8
"""Share of a writer's time that has to be beside the copy for it to count."""


@dataclass(frozen=True)
class Turn:
    """One run of the writer, between two readings of the monotonic clock."""

    volume: str
    began: float
    ended: float
    sample: Sample


def one_round(machine: Machine) -> Iterator[tuple[str, str, Sample]]:
    """The writer's turns with nothing in its way; with T1 held; while LUNs are copied; with only the tracker left."""
    machine.untrack()
    yield from _told(NONE, _turns(machine))
    pause = Pause(machine.directory, "t1-snapshot:end")
    machine.service.restart(pause.fault)
    backup = machine.service.begin("backup", machine.guest.name, "--full")
    pause.wait(backup)
    if backup.poll() is not None:
        raise Failed(f"the backup ended before it held T1: {machine.service.end(backup)}")
    yield from _told(HELD, _turns(machine))
    began = time.monotonic()
    pause.go()
    turns = _turns(machine)
    result = machine.service.end(backup)
    copied = began + sum(step["seconds"] for step in result["timeline"] if step["step"] == "passthrough-copy")
    yield from _told(COPYING, [turn for turn in turns if _share(turn, copied) >= ENOUGH])
    pause.again()
    machine.service.restart()
    if machine.tracked():
        yield from _told(TRACKED, _turns(machine))


def _share(turn: Turn, end: float) -> float:
    """How much of a turn was before ``end``."""
    return min(1.0, max(0.0, end - turn.began) / (turn.ended - turn.began))


def _told(state: str, turns: list[Turn]) -> Iterator[tuple[str, str, Sample]]:
    for turn in turns:
        yield f"writer-{turn.volume}", state, turn.sample


def _turns(machine: Machine) -> list[Turn]:
    """A turn on each volume."""
    return [_turn(machine, volume, path) for volume, path in FILES.items()]


def _turn(machine: Machine, volume: str, path: str) -> Turn:
    words = [
        "fio",
        "--name=writer",
        f"--filename={path}",
        "--rw=randwrite",
        "--bs=4k",
        "--direct=1",
        "--ioengine=psync",
    ]
    words += ["--randrepeat=0", "--time_based", f"--runtime={machine.seconds:g}", "--output-format=json"]
    began = time.monotonic()
    told = json.loads(machine.guest.exec(words, timeout=machine.seconds + 60))
    ended = time.monotonic()
    write = told["jobs"][0]["write"]
    if not write["total_ios"]:
        raise Failed(f"fio wrote nothing to {path} in {machine.seconds:g} s")
    figures = {"iops": round(write["iops"], 1), "p99_ms": write["clat_ns"]["percentile"]["99.000000"] / 1e6}
    return Turn(volume, began, ended, Sample(1 / write["iops"], figures=figures))
