"""One measurement: a process of its own, its wall time and its peak memory, everything around it the same."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

CHUNK = 64 * 1024
"""Bytes of a chunk in the repositories that are measured: the default."""


@dataclass(frozen=True, slots=True)
class Sample:
    """``seconds`` of wall time, ``peak_rss`` in bytes; ``bytes_in`` and ``bytes_stored`` where they apply; ``figures``
    that only this work has, by name."""

    seconds: float
    peak_rss: int = 0
    bytes_in: int = 0
    bytes_stored: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that ended well."""

    seconds: float
    peak_rss: int
    output: str


class Failed(Exception):
    """A tool ended with an error; the message has its last words."""


def program(name: str, *libraries: str) -> Path:
    """A C program of this directory, compiled when it or the hash kernel changed."""
    source, made = Path(__file__).parent / f"{name}.c", ROOT / "build/bench" / name
    engine = ROOT / "vmbackupd/engine"
    newest = max(path.stat().st_mtime for path in (source, *engine.glob("blake3*.h")))
    if not made.exists() or made.stat().st_mtime < newest:
        made.parent.mkdir(parents=True, exist_ok=True)
        words = ["gcc", "-O3", "-Wno-psabi", "-pthread", f"-I{engine}", str(source), *libraries, "-o", str(made)]
        subprocess.run(words, check=True)
    return made


def run(argv: Sequence[object], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None) -> Finished:
    """Run a program to its end. ``peak_rss`` is the kernel's figure for this process alone (wait4)."""
    words = [str(word) for word in argv]
    reading, writing = os.pipe()
    with open(reading, "rb") as told:
        try:
            done = subprocess.run(
                [str(program("meter")), str(writing), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                cwd=cwd,
                pass_fds=[writing],
                check=False,
            )
        finally:
            os.close(writing)
        figures = told.read().split()
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        raise Failed(f"{' '.join(words[:6])}: exit status {done.returncode}: {output.strip()[-2000:]}")
    return Finished(float(figures[0]), int(figures[1]) * 1024, output)


def settle(*paths: Path) -> None:
    """The state before every measurement: nothing dirty, what will be read in the page cache."""
    os.sync()
    buffer = bytearray(1 << 20)
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                with file.open("rb", buffering=0) as reader:
                    _touch(reader.fileno(), buffer)


def _touch(descriptor: int, buffer: bytearray) -> None:
    """Read the parts of a file that are no holes."""
    at, size = 0, os.fstat(descriptor).st_size
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            return
        end = os.lseek(descriptor, at, os.SEEK_HOLE)
        while at < end:
            at += os.preadv(descriptor, [buffer], at)


def stored_below(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; of a sparse file what it occupies."""
    if path.is_file():
        return path.stat().st_blocks * 512
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """A file or a whole directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
