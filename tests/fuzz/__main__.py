"""``./dev fuzz [TARGET...] [--seconds N]``: find inputs that a parser cannot take."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import variant
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
KEPT = 96 << 10
FILES = 80
"""Most bytes and files of the saved corpus of one target."""
STATUS = re.compile(r"#(\d+)\s+\w+\s+cov: (\d+) ft: (\d+) corp: (\d+)")
NATIVE = re.compile(r"INFO: Loaded (\d+) modules\s+\((\d+) inline 8-bit counters\)")


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one target: edges and features covered, inputs tried, and how it failed, if it did."""

    target: str
    executions: int
    edges: int
    features: int
    counters: int
    failure: str


def tree() -> Path:
    """The tree with the engine that clang built."""
    return variant.build("fuzz", {"VMBACKUPD_FUZZ": "1"})


def fuzz(root: Path, name: str, seconds: int, *, corpus: Path | None = None) -> Result:
    """Fuzz one target for so long; new inputs go to ``corpus``."""
    work = root / "found" / name
    work.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(TARGETS[name].seeds()):
        (work / f"seed-{number}").write_bytes(seed)
    words = [
        f"-max_total_time={seconds}", f"-max_len={TARGETS[name].longest}", f"-artifact_prefix={root}/crash-{name}-",
        "-timeout=20", "-rss_limit_mb=2048", str(corpus or work), str(work),
    ]  # fmt: skip
    if (CORPUS / name).is_dir():
        words.append(str(CORPUS / name))
    done = inside(root, name, words)
    said = done.stderr + done.stdout
    statuses = STATUS.findall(said)
    last = [int(value) for value in statuses[-1]] if statuses else [0, 0, 0, 0]
    counters = sum(int(count) for _, count in NATIVE.findall(said))
    return Result(name, last[0], last[1], last[2], counters, said[-6000:] if done.returncode else "")


def keep(root: Path, name: str) -> int:
    """Add what the fuzzer found to the saved corpus, the smallest inputs first, up to KEPT bytes; how many it has now.

    The fuzzer saves an input when it covers something new; its own merging starts programs, which Python is none of.
    """
    target = CORPUS / name
    target.mkdir(parents=True, exist_ok=True)
    size = sum(path.stat().st_size for path in target.iterdir())
    for path in sorted((root / "found" / name).iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        if size + path.stat().st_size > KEPT or len(list(target.iterdir())) >= FILES:
            break
        if not path.name.startswith("seed-") and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
            size += path.stat().st_size
    return len(list(target.iterdir()))


def inside(root: Path, name: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """One target in its process, with the fuzzer's library."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(variant.python_packages()) / "asan_with_fuzzer.so"),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:handle_sigill=1",
        "PYTHONPATH": str(root),
    }
    argv = [sys.executable, "-m", "tests.fuzz.inside", name, *words]
    return subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, check=False)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="dev fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; all unless given")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="add what covers something new to the saved corpus")
    args = parser.parse_args(words)
    for name in args.targets:
        if name not in TARGETS:
            parser.error(f"no target {name!r}; there are {', '.join(TARGETS)}")
    root = tree()
    bad = 0
    for name in args.targets or TARGETS:
        result = fuzz(root, name, args.seconds)
        print(
            f"{name:10} {result.executions:9} inputs, {result.edges:6} edges of {result.counters} in C and those in "
            f"Python, {result.features:6} features{', FAILED' if result.failure else ''}",
            flush=True,
        )
        if result.failure:
            bad += 1
            print(result.failure)
            print(f"the input: {root}/crash-{name}-*")
        elif args.keep:
            print(f"{'':10} {keep(root, name)} inputs in the saved corpus")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
