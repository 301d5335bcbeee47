"""Chunk size, fan-out and pack size: what each choice costs, measured on one image.

``python -m tests.bench.choices IMAGE DIRECTORY [GROUP...]``: a repository is made in DIRECTORY for every choice, each
by a process of its own. Times are CPU seconds of all threads, since those do not change with what else a machine does;
bytes are those of all objects. docs/performance.md has the table.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from vmbackupd.engine.zstd import Codec
from vmbackupd.model import Consistency, Method, RevertMode, VolumeKind, VolumeRecord
from vmbackupd.repository import LocalStorage, Manifest, Repository, RepositoryWriter, Settings, VmIdentity
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header

ROOT = Path(__file__).resolve().parents[2]
PIECE = 2**20  # bytes written at once; no chunk is larger
BLOCK = 4096
KIB = 1024

GROUPS = {
    "chunk size": [(size * KIB, 64, 16 * 2**20) for size in (16, 32, 64, 128, 256, 512, 1024)],
    "fan-out": [(64 * KIB, fanout, 16 * 2**20) for fanout in (16, 32, 64, 128, 256, 512, 1024)],
    "pack size": [(64 * KIB, 64, size * 2**20) for size in (4, 8, 16, 32, 64)],
}


def data_pieces(image: Path) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of all that is no hole, in pieces at borders of ``PIECE``."""
    size = image.stat().st_size
    with image.open("rb") as file:
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // PIECE * PIECE
            except OSError:
                return
            yield at, os.pread(file.fileno(), PIECE, at)
            at += PIECE


class Choice:
    """One repository with one choice, and everything that is done with it."""

    def __init__(self, image: Path, path: Path, chunk: int, fanout: int, pack: int) -> None:
        self.image, self.path, self.chunk = image, path, chunk
        self.size = image.stat().st_size
        storage = LocalStorage(path)
        storage.create()
        storage.put_if_absent(HEADER_NAME, [Header.new(chunk_size=chunk, fanout=fanout).encode()])
        self.repository = Repository.open(storage, settings=Settings(workers=2, pack_size=pack))
        self.figures: dict[str, float] = {"chunk": chunk, "fanout": fanout, "pack": pack}
        self.backups = 0
        self.tree = ""

    def run(self) -> dict[str, float]:
        self.timed("full", lambda: self.backup(self.fill))
        self.figures["packs"] = stored(self.path / "packs")
        self.figures["index"] = stored(self.path / "indexes")
        self.figures["peak"] = peak()
        self.timed("scan", lambda: self.backup(self.fill))
        self.timed("read", self.read)
        used = self.used()
        self.figures["chunks"] = len(used)
        self.one_percent(random.Random(1), used)
        self.small_writes(random.Random(2), used)
        return self.figures

    def timed(self, label: str, work: object) -> None:
        start = time.process_time()
        work()  # type: ignore[operator]
        self.figures[label] = time.process_time() - start

    def fill(self, writer: RepositoryWriter) -> str:
        sink = writer.image(self.size)
        for at, piece in data_pieces(self.image):
            sink.write(at, piece)
        return sink.finish()

    def backup(self, fill: object) -> None:
        self.backups += 1
        name = f"backup-{self.backups}"
        with self.repository.writer(name) as writer:
            if self.backups > 1:
                writer.base(f"backup-{self.backups - 1}")
            self.tree = fill(writer)  # type: ignore[operator]
            volume = VolumeRecord(
                "vda", VolumeKind.VIRTUAL, Method.GUEST_SNAPSHOT, Consistency.APPLICATION, self.size, self.tree
            )
            vm = VmIdentity("bench", "6f1d1c1e-0000-4000-8000-000000000001")
            writer.publish(Manifest(name, vm, 1.0, 1.0, 1.0, 0.0, RevertMode.BACKUP, (volume,)))

    def read(self) -> None:
        image = self.repository.image(self.tree)
        for offset, length in image.extents():
            for at in range(offset, offset + length, PIECE):
                image.read(at, min(PIECE, offset + length - at))

    def used(self) -> list[int]:
        """Chunks that are not zeros."""
        found = []
        for at, piece in data_pieces(self.image):
            for cut in range(0, len(piece), self.chunk):
                if any(piece[cut : cut + self.chunk]):
                    found.append((at + cut) // self.chunk)
        return found

    def one_percent(self, rng: random.Random, used: list[int]) -> None:
        """Chunks become those of other places, shifted: new content that compresses as the old did."""
        codec = Codec(1, self.chunk)
        changes = {}
        limit = 0
        with self.image.open("rb") as file:
            for number in rng.sample(used, max(len(used) // 100, 1)):
                content = os.pread(file.fileno(), self.chunk, rng.choice(used) * self.chunk)
                cut = rng.randrange(1, self.chunk)
                changes[number * self.chunk] = content[cut:] + content[:cut]
                limit += len(codec.compress(changes[number * self.chunk]) or content)
        self.update("one percent", changes)
        self.figures["one percent ratio"] = self.figures["one percent stored"] / limit

    def small_writes(self, rng: random.Random, used: list[int]) -> None:
        """A tenth of a percent of the image's 4 KiB blocks, at random: what a database does."""
        per = self.chunk // BLOCK
        changes = {}
        for _ in range(len(used) * per // 1000):
            changes[(rng.choice(used) * per + rng.randrange(per)) * BLOCK] = rng.randbytes(BLOCK // 2) * 2
        self.update("small writes", changes)
        self.figures["small writes ratio"] = self.figures["small writes stored"] / (len(changes) * BLOCK // 2)

    def update(self, label: str, changes: dict[int, bytes]) -> None:
        before = stored(self.path)

        def fill(writer: RepositoryWriter) -> str:
            sink = writer.update(self.tree)
            source = writer.source(self.tree)
            whole: dict[int, bytearray] = {}
            for at, content in changes.items():
                number = at // self.chunk
                if number not in whole:
                    whole[number] = bytearray(source.read(number * self.chunk, self.chunk))
                whole[number][at % self.chunk : at % self.chunk + len(content)] = content
            for number, chunk in sorted(whole.items()):
                sink.write(number * self.chunk, chunk)
            return sink.finish()

        self.timed(label, lambda: self.backup(fill))
        self.figures[f"{label} stored"] = stored(self.path) - before


def stored(path: Path) -> int:
    """Bytes of all files below ``path``."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def peak() -> int:
    """Bytes this process had in memory at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


TREE_CHUNKS = 163840  # of 64 KiB: 10 GiB


def tree_costs(path: Path, fanout: int) -> dict[str, float]:
    """Bytes that each changed chunk adds beside its own content, for three shares of chunks changed at random. A tree
    does not know how large its chunks are: here they are small."""
    storage = LocalStorage(path)
    storage.create()
    storage.put_if_absent(HEADER_NAME, [Header.new(chunk_size=BLOCK, fanout=fanout).encode()])
    repository = Repository.open(storage, settings=Settings(workers=2))
    rng = random.Random(1)
    figures: dict[str, float] = {"fanout": fanout}
    with repository.writer("one") as writer:
        sink = writer.image(TREE_CHUNKS * BLOCK)
        for at in range(0, TREE_CHUNKS, 256):
            sink.write(at * BLOCK, b"".join(rng.randbytes(16) * (BLOCK // 16) for _ in range(256)))
        tree = sink.finish()
        before = writer.bytes_stored
        for share in (0.0001, 0.001, 0.01):
            changed = rng.sample(range(TREE_CHUNKS), int(TREE_CHUNKS * share))
            sink = writer.update(tree)
            contents = [rng.randbytes(BLOCK) for _ in changed]
            for number, content in zip(changed, contents, strict=True):
                sink.write(number * BLOCK, content)
            sink.finish()
            figures[str(share)] = (writer.bytes_stored - before) / len(changed) - BLOCK
            before = writer.bytes_stored
    repository.close()
    return figures


COLUMNS = {
    "chunk": ("chunk", lambda f: f"{f['chunk'] // KIB} KiB"),
    "fan-out": ("fan-out", lambda f: str(f["fanout"])),
    "pack": ("pack", lambda f: f"{f['pack'] >> 20} MiB"),
    "full": ("full backup, CPU s", lambda f: f"{f['full']:.2f}"),
    "scan": ("nothing changed, CPU s", lambda f: f"{f['scan']:.2f}"),
    "read": ("read back, CPU s", lambda f: f"{f['read']:.2f}"),
    "packs": ("packs, MB", lambda f: f"{f['packs'] / 1e6:.1f}"),
    "index": ("index, MB", lambda f: f"{f['index'] / 1e6:.2f}"),
    "one": ("1 % changed: stored / compressed", lambda f: f"{f['one percent ratio']:.3f}"),
    "small": ("4 KiB writes: stored / compressed", lambda f: f"{f['small writes ratio']:.1f}"),
    "peak": ("peak memory, MiB", lambda f: f"{f['peak'] / 2**20:.0f}"),
}


def tree_table(image: Path, directory: Path) -> None:
    print("\n**tree**: bytes beside each changed chunk, of 163840 chunks\n")
    print("| fan-out | 0.01 % changed | 0.1 % | 1 % | nodes of 1 TiB at 64 KiB |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for fanout in (16, 32, 64, 128, 256, 512, 1024):
        path = directory / "choice"
        argv = [sys.executable, "-m", "tests.bench.choices", str(image), str(path), "--tree", str(fanout)]
        figures = json.loads(subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout)
        shutil.rmtree(path)
        nodes, count = 0, 2**24
        while count > 1:
            count = -(-count // fanout)
            nodes += count
        shares = " | ".join(f"{figures[str(share)]:.0f}" for share in (0.0001, 0.001, 0.01))
        print(f"| {fanout} | {shares} | {nodes} |", flush=True)


def main() -> None:
    image, directory = Path(sys.argv[1]), Path(sys.argv[2])
    if sys.argv[3:4] == ["--one"]:
        print(json.dumps(Choice(image, directory, *map(int, sys.argv[4:7])).run()))
        return
    if sys.argv[3:4] == ["--tree"]:
        print(json.dumps(tree_costs(directory, int(sys.argv[4]))))
        return
    directory.mkdir(parents=True, exist_ok=True)
    for group in sys.argv[3:] or [*GROUPS, "tree"]:
        if group == "tree":
            tree_table(image, directory)
            continue
        print(f"\n**{group}**\n")
        print("| " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
        print("| " + " | ".join("---:" for _ in COLUMNS) + " |", flush=True)
        for choice in GROUPS[group]:
            path = directory / "choice"
            argv = [sys.executable, "-m", "tests.bench.choices", str(image), str(path), "--one", *map(str, choice)]
            done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            figures = json.loads(done.stdout)
            shutil.rmtree(path)
            print("| " + " | ".join(show(figures) for _, show in COLUMNS.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
