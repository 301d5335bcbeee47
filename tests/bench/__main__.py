"""``./dev bench``: measure, print the table, write JSON and a chart."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.bench import chart
from tests.bench.measure import Failed
from tests.bench.table import COMPANIONS, GROUPS, TARGETS, WORKS, Entry, Row
from tests.bench.works import LIMIT, OURS, Bench, prepared

MiB = 1 << 20
LIMITS = {"full-backup": "limit-compress", "second-backup-scan": "limit-read-hash", "verify": "limit-verify"}


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev bench", description=__doc__, epilog=f"works: {', '.join(WORKS)}")
    parser.add_argument("works", nargs="*", metavar="WORK", help="rows to measure; all of them unless given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the samples")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="write a chart (SVG)")
    parser.add_argument("--size", type=int, default=2048, metavar="MIB", help="of the image (%(default)s)")
    parser.add_argument(
        "--chunks", type=int, default=16_000_000, help="already in the repository of the tracked backup (%(default)s)"
    )
    parser.add_argument("--runs", type=int, default=3, help="of each tool (%(default)s)")
    parser.add_argument("--directory", type=Path, help="where to work (memory, /dev/shm, if there is room)")
    parser.add_argument("--check", action="store_true", help="exit with 3 if a target is missed")
    parser.add_argument("--ours-only", action="store_true", help="no peers")
    args = parser.parse_args(words)
    for work in args.works:
        if work not in WORKS:
            parser.error(f"no work {work!r}; there are {', '.join(WORKS)}")
    return args


def workplace(given: Path | None, size: int) -> Path:
    """A directory for this run. In memory by default: the programs are compared, not the disk below them."""
    if given is None:
        shared = Path("/dev/shm")
        room = shutil.disk_usage(shared).free if shared.is_dir() else 0
        given = shared if room > 6 * size else Path("/var/tmp")
    return Path(tempfile.mkdtemp(prefix="vmbackupd-bench-", dir=given))


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


def measure(bench: Bench, groups: Sequence[Sequence[Entry]], runs: int) -> dict[tuple[str, str], Row]:
    """All samples: within a group every tool has its turn before any has its second."""
    rows: dict[tuple[str, str], Row] = {}
    for group in groups:
        for turn in range(runs):
            for entry in group:
                if entry.tool not in (OURS, LIMIT) and shutil.which(entry.tool) is None:
                    if turn == 0:
                        print(f"{entry.work:22} {entry.tool:13} is not installed", flush=True)
                    continue
                sample = entry.measure(bench)
                rows.setdefault((entry.work, entry.tool), Row(entry.work, entry.tool, [])).samples.append(sample)
                print(
                    f"{entry.work:22} {entry.tool:13} {sample.seconds:9.3f} s  {sample.peak_rss / MiB:6.0f} MiB peak  "
                    f"{sample.bytes_stored / MiB:8.1f} MiB stored",
                    flush=True,
                )
    return rows


def show(rows: dict[tuple[str, str], Row]) -> bool:
    """Print both tables; whether every target that could be looked at holds."""
    print(f"\n{'work':22} {'tool':13} {'median':>10} {'MiB/s':>8} {'stored':>10} {'peak':>9}")
    for row in rows.values():
        speed = f"{chart.speed(row):8.0f}" if row.seconds > 0 and row.bytes_in else f"{'':8}"
        print(
            f"{row.work:22} {row.tool:13} {row.seconds:8.3f} s {speed} {row.bytes_stored / MiB:6.1f} MiB "
            f"{row.peak_rss / MiB:5.0f} MiB"
        )
    print(f"\n{'target':58} {'bound':>10} {'measured':>10}")
    good = True
    for target in TARGETS:
        figure = target.figure(rows)
        if figure is None:
            continue
        bound = f"{'≥' if target.at_least else '≤'} {target.bound:g}{target.unit}"
        holds = target.holds(figure)
        good = good and holds
        print(f"{target.text:58} {bound:>10} {figure:7.2f}{target.unit:4} {'' if holds else 'MISSED'}")
    return good


def main(words: Sequence[str]) -> int:
    args = arguments(words)
    size = args.size * MiB
    directory = workplace(args.directory, size)
    try:
        with prepared(directory / "run", size, args.chunks) as bench:
            caption = (
                f"{size / 2**30:.1f} GiB image, {bench.data_bytes / 2**30:.2f} GiB of data; "
                f"{len(os.sched_getaffinity(0))} cores; median of {args.runs}; {directory.parent}"
            )
            print(caption, flush=True)
            rows = measure(bench, chosen(args.works, args.ours_only), args.runs)
    except Failed as reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(directory)
    good = show(rows)
    if args.json:
        args.json.write_text(json.dumps({"rows": [row.to_json() for row in rows.values()]}, indent=1) + "\n")
    if args.chart:
        args.chart.write_text(chart.draw(list(rows.values()), LIMITS, caption))
    return 3 if args.check and not good else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
