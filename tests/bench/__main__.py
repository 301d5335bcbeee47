"""``./dev bench``: measure, print the table, write JSON and a chart."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.bench import chart, table
from tests.bench.measure import Failed, Sample
from tests.bench.table import COMPANIONS, GROUPS, WORKS, Entry, Row
from tests.bench.volumes import machine
from tests.bench.volumes import table as volumes
from tests.bench.works import LIMIT, OURS, Bench, prepared

MiB = 1 << 20
VOLUMES = "volumes"
"""Stands for all works that need a guest; without it and without their names none of them is measured."""
RUNS = 3
SIZE, VOLUME_SIZE = 2048, 384
LIMITS = {"full-backup": "limit-compress", "second-backup-scan": "limit-read-hash", "verify": "limit-verify"}


def arguments(words: Sequence[str]) -> argparse.Namespace:
    known = [*WORKS, VOLUMES, *volumes.PARTS]
    told = f"works: {', '.join(WORKS)}; on a guest: {VOLUMES}, which are {', '.join(volumes.PARTS)}"
    parser = argparse.ArgumentParser(prog="dev bench", description=__doc__, epilog=told)
    parser.add_argument("works", nargs="*", metavar="WORK", help="rows to measure; unless given all that need no guest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write a chart (SVG)")
    sizes = f"of the image ({SIZE}), or of each of the two volumes of a guest that are written to ({VOLUME_SIZE})"
    parser.add_argument("--size", type=int, metavar="MIB", help=sizes)
    parser.add_argument(
        "--chunks", type=int, default=16_000_000, help="already in the repository of the tracked backup (%(default)s)"
    )
    own = ", ".join(f"{part.runs} of {name}" for name, part in volumes.PARTS.items())
    parser.add_argument("--runs", type=int, help=f"of each tool ({RUNS}; on a guest {own})")
    parser.add_argument("--seconds", type=float, default=3.0, help="that a writer in the guest writes (%(default)s)")
    parser.add_argument("--directory", type=Path, help="where to work (memory, /dev/shm, if there is room)")
    parser.add_argument("--check", action="store_true", help="exit with 3 if a target is missed")
    parser.add_argument("--ours-only", action="store_true", help="no peers")
    args = parser.parse_args(words)
    for work in args.works:
        if work not in known:
            parser.error(f"no work {work!r}; there are {', '.join(known)}")
    return args


def place(given: Path | None, size: int) -> Path:
    """Where to work. In memory by default: the programs are compared, not the disk below them."""
    if given is not None:
        return given
    shared = Path("/dev/shm")
    room = shutil.disk_usage(shared).free if shared.is_dir() else 0
    return shared if room > 6 * size else Path("/var/tmp")


def chosen(works: Sequence[str], ours_only: bool) -> list[list[Entry]]:
    """The groups with the entries that were asked for, and those they are compared with."""
    wanted = set(works or WORKS)
    for work in works:
        wanted |= COMPANIONS.get(work, set())
    groups = [
        [entry for entry in group if entry.work in wanted and (not ours_only or entry.tool in (OURS, LIMIT))]
        for group in GROUPS
    ]
    return [group for group in groups if group]


class Collected(dict[tuple[str, str], Row]):
    """What has been measured, by work and tool; tells each sample as it comes."""

    def add(self, work: str, tool: str, sample: Sample) -> None:
        self.setdefault((work, tool), Row(work, tool, [])).samples.append(sample)
        print(
            f"{work:22} {tool:15} {sample.seconds:9.3f} s  {sample.peak_rss / MiB:6.0f} MiB peak  "
            f"{sample.bytes_stored / MiB:8.1f} MiB stored  {_figures(sample.figures)}",
            flush=True,
        )


def _figures(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in figures.items())


def measure(bench: Bench, groups: Sequence[Sequence[Entry]], runs: int, rows: Collected) -> None:
    """All samples: within a group every tool has its turn before any has its second."""
    for group in groups:
        for turn in range(runs):
            for entry in group:
                if entry.tool not in (OURS, LIMIT) and shutil.which(entry.tool) is None:
                    if turn == 0:
                        print(f"{entry.work:22} {entry.tool:15} is not installed", flush=True)
                    continue
                rows.add(entry.work, entry.tool, entry.measure(bench))


def on_image(args: argparse.Namespace, works: Sequence[str], rows: Collected) -> str:
    """Measure works that need no guest; the caption."""
    size, runs = (args.size or SIZE) * MiB, args.runs or RUNS
    directory = Path(tempfile.mkdtemp(prefix="vmbackupd-bench-", dir=place(args.directory, size)))
    try:
        with prepared(directory / "run", size, args.chunks) as bench:
            caption = (
                f"{size / 2**30:.1f} GiB image, {bench.data_bytes / 2**30:.2f} GiB of data; "
                f"{len(os.sched_getaffinity(0))} cores; median of {runs}; {directory.parent}"
            )
            print(caption, flush=True)
            measure(bench, chosen(works, args.ours_only), runs, rows)
    finally:
        shutil.rmtree(directory)
    return caption


def on_guest(args: argparse.Namespace, parts: Sequence[str], rows: Collected) -> str:
    """Measure parts that need a guest; the caption."""
    size = (args.size or VOLUME_SIZE) * MiB
    parent = place(args.directory, size)
    with machine.prepared(parent, size, args.seconds, peers=not args.ours_only) as guest:
        caption = (
            f"a guest with {len(guest.disks)} virtual disks and {len(guest.guest.luns)} LUNs, "
            f"{'KVM' if guest.lab.kvm else 'emulated CPU'}; {len(os.sched_getaffinity(0))} cores; {parent}"
        )
        print(caption, flush=True)
        for name in parts:
            for _ in range(args.runs or volumes.PARTS[name].runs):
                for work, tool, sample in volumes.PARTS[name].one_round(guest):
                    rows.add(work, tool, sample)
    return caption


def show(rows: Collected) -> bool:
    """Print both tables; whether every target that could be looked at holds."""
    print(f"\n{'work':22} {'tool':15} {'median':>10} {'MiB/s':>8} {'stored':>10} {'peak':>9}")
    for row in rows.values():
        speed = f"{chart.speed(row):8.0f}" if row.seconds > 0 and row.bytes_in else f"{'':8}"
        print(
            f"{row.work:22} {row.tool:15} {row.seconds:8.3f} s {speed} {row.bytes_stored / MiB:6.1f} MiB "
            f"{row.peak_rss / MiB:5.0f} MiB  {_figures(row.figures)}"
        )
    print(f"\n{'target':62} {'bound':>10} {'measured':>10}")
    good = True
    for target in [*table.TARGETS, *volumes.TARGETS]:
        figure = target.figure(rows)
        if figure is None:
            continue
        bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}{target.unit}"
        holds = target.holds(figure)
        good = good and holds
        print(f"{target.text:62} {bound:>10} {figure:7.2f}{target.unit:4} {'' if holds else 'MISSED'}")
    return good


def main(words: Sequence[str]) -> int:
    args = arguments(words)
    parts = [name for name in volumes.PARTS if name in args.works or VOLUMES in args.works]
    works = [work for work in args.works if work in WORKS]
    rows, captions = Collected(), []
    try:
        if works or not parts:
            captions.append(on_image(args, works, rows))
        if parts:
            captions.append(on_guest(args, parts, rows))
    except Failed as reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 1
    good = show(rows)
    if args.json:
        args.json.write_text(json.dumps({"rows": [row.to_json() for row in rows.values()]}, indent=1) + "\n")
    if args.chart:
        args.chart.write_text(chart.draw(list(rows.values()), LIMITS, "; ".join(captions), by_time=volumes.WORKS))
    return 3 if args.check and not good else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
