"""The rows of the table: what each tool does for each work, and in which order they take turns."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench import data
from tests.bench.measure import CHUNK, ROOT, Sample, program, remove, run, settle, stored_below
from tests.bench.sources import nbd_slices
from vmbackupd.engine.zstd import Codec

OURS = "vmbackupd"
LIMIT = "limit"
LEVEL = 1
CHANGED_SHARE = 100  # one chunk in so many


@dataclass
class Bench:
    """A directory with the image, what was made of it, and room for more."""

    directory: Path
    image: Path
    size: int
    data_bytes: int
    chunks: int
    """Chunks of others in the repository of the tracked backup."""

    def path(self, name: str) -> Path:
        """A file or directory of this run."""
        return self.directory / name

    def ours(self, work: str, *words: object) -> Sample:
        """A work of the project in a process of its own."""
        done = run([sys.executable, "-m", "tests.bench.ours", work, *words], cwd=ROOT)
        told = json.loads(done.output.splitlines()[-1])
        return Sample(told["seconds"], done.peak_rss, told["bytes_in"])

    def limit(self, work: str) -> Sample:
        """A limit of the machine; only its own figure counts, not what it prepares."""
        settle(self.image)
        done = run([program("limits", "-lzstd"), work, self.image, CHUNK, LEVEL])
        seconds, bytes_in, bytes_out = done.output.split()
        stored = bytes_in if work == "verify" else bytes_out
        return Sample(float(seconds), done.peak_rss, self.data_bytes, int(stored))

    def repository(self) -> Path:
        """A repository of the project with one backup of the image."""
        path = self.path("kept-vmbackupd")
        if not path.exists():
            self.ours("full", "--repository", path, "--image", self.image)
        return path


@contextmanager
def prepared(directory: Path, size: int, chunks: int) -> Iterator[Bench]:
    """The image, in a directory of its own that is removed in the end."""
    directory.mkdir(parents=True)
    try:
        image = directory / "image.raw"
        # in a process of its own: what it allocates would count for those that are started from here
        subprocess.run(
            [sys.executable, "-m", "tests.bench.data", str(image), str(size)],
            check=True,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        yield Bench(directory, image, size, image.stat().st_blocks * 512, chunks)
    finally:
        shutil.rmtree(directory)


# ---- what the project does


def full_backup(bench: Bench, *options: object) -> Sample:
    path = bench.path("new-repository")
    settle(bench.image)
    sample = bench.ours("full", "--repository", path, "--image", bench.image, *options)
    stored = stored_below(path)
    remove(path)
    return Sample(sample.seconds, sample.peak_rss, sample.bytes_in, stored)


def full_backup_encrypted(bench: Bench) -> Sample:
    key = bench.path("key")
    key.write_bytes(bytes(range(64)))
    key.chmod(0o600)
    return full_backup(bench, "--key", key)


def second_backup_scan(bench: Bench) -> Sample:
    path = bench.repository()
    settle(bench.image, path)
    before = stored_below(path)
    sample = bench.ours("scan", "--repository", path, "--image", bench.image)
    return Sample(sample.seconds, sample.peak_rss, sample.bytes_in, stored_below(path) - before)


def second_backup_tracked(bench: Bench) -> Sample:
    path = bench.path("tracked-repository")
    if not path.exists():
        bench.ours("prepare-tracked", "--repository", path)
        bench.ours("enlarge", "--repository", path, "--chunks", bench.chunks)
    settle(path)
    before = stored_below(path)
    sample = bench.ours("tracked", "--repository", path)
    return Sample(sample.seconds, sample.peak_rss, sample.bytes_in, stored_below(path) - before)


def parallel_16(bench: Bench) -> Sample:
    path = bench.path("new-repository")
    settle(bench.image)
    with nbd_slices(bench.image, bench.directory, 16) as sockets:
        sample = bench.ours("parallel", "--repository", path, "--image", bench.image, "--sockets", *sockets)
    stored = stored_below(path)
    remove(path)
    return Sample(sample.seconds, sample.peak_rss, sample.bytes_in, stored)


def restore(bench: Bench) -> Sample:
    path, target = bench.repository(), bench.path("restored.raw")
    settle(path)
    sample = bench.ours("restore", "--repository", path, "--image", target)
    check_same(bench.image, target)
    stored = stored_below(target)
    remove(target)
    return Sample(sample.seconds, sample.peak_rss, sample.bytes_in, stored)


def verify(bench: Bench) -> Sample:
    path = bench.repository()
    settle(path)
    sample = bench.ours("verify", "--repository", path)
    return Sample(sample.seconds, sample.peak_rss, bench.data_bytes, stored_below(path))


def check_same(image: Path, restored: Path) -> None:
    """A restore that is fast and wrong is not fast."""
    subprocess.run(["cmp", str(image), str(restored)], check=True)


# ---- one chunk in a hundred


def changes(bench: Bench) -> tuple[Path, Path]:
    """The image with one percent of its data chunks changed (each to the content of another place, shifted), and the
    file that tells which: made once."""
    image, told = bench.path("changed.raw"), bench.path("changes.json")
    if told.exists():
        return image, told
    rng = random.Random(data.SEED)
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(bench.image), str(image)], check=True)
    with image.open("rb+") as file:
        used = []
        for number in range(bench.size // CHUNK):
            file.seek(number * CHUNK)
            if any(file.read(CHUNK)):
                used.append(number)
        chosen = sorted(rng.sample(used, max(1, len(used) // CHANGED_SHARE)))
        for number in chosen:
            file.seek(rng.choice(used) * CHUNK)
            content = file.read(CHUNK)
            cut = rng.randrange(1, CHUNK)
            file.seek(number * CHUNK)
            file.write(content[cut:] + content[:cut])
    told.write_text(json.dumps(chosen))
    return image, told


def one_percent(bench: Bench) -> Sample:
    image, told = changes(bench)
    path = bench.path("changed-repository")
    shutil.copytree(bench.repository(), path)
    settle(image, path)
    before = stored_below(path)
    sample = bench.ours("changed", "--repository", path, "--image", image, "--changes", told)
    stored = stored_below(path) - before
    remove(path)
    return Sample(sample.seconds, sample.peak_rss, sample.bytes_in, stored)


def one_percent_limit(bench: Bench) -> Sample:
    """What the changed chunks alone are when they are compressed, each stored as it is where that is smaller."""
    image, told = changes(bench)
    codec = Codec(LEVEL, CHUNK)
    stored = 0
    numbers = json.loads(told.read_text())
    with image.open("rb") as file:
        for number in numbers:
            file.seek(number * CHUNK)
            stored += len(codec.compress(file.read(CHUNK)) or bytes(CHUNK))
    return Sample(0.0, 0, len(numbers) * CHUNK, stored)
