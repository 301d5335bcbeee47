"""A repository whose index is as large as wanted, without the chunks: index files, empty packs, and one whole tree.

``python -m tests.engine.scale DIRECTORY CHUNKS [WORK...]`` makes it (unless it is there) and measures every work in a
process of its own: seconds, and the memory it had at its peak.
"""

from __future__ import annotations

import array
import itertools
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.engine.index import encode_entries
from vmbackupd.engine.liveset import LiveSet
from vmbackupd.repository import LocalStorage, Repository, envelope
from vmbackupd.repository.catalog import index_name, pack_name
from vmbackupd.repository.gc import GcResult
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header
from vmbackupd.repository.repository import MANIFEST_MAGIC, MANIFESTS

ROOT = Path(__file__).resolve().parents[2]
CHUNK_SIZE = 65536
STORED = 30000  # bytes of a chunk in its pack
PER_PACK = 512  # chunks of a pack
NODES_PER_PACK = 2000
PARTS = 10  # index files


def column(values: Iterable[int]) -> bytes:
    """Numbers of 4 bytes, one after another."""
    made = array.array("I", values)
    assert made.itemsize == 4
    if sys.byteorder == "big":
        made.byteswap()
    return made.tobytes()


def random_entries(rng: random.Random, count: int) -> bytearray:
    """Entries of chunks with random names, ``PER_PACK`` in each pack."""
    entries = bytearray(48 * count)
    for at in range(32):
        entries[at::48] = rng.randbytes(count)
    last = CHUNK_SIZE | 1 << 24
    for at, values in (
        (32, column(number // PER_PACK for number in range(count))),
        (36, column(64 + number % PER_PACK * (48 + STORED) for number in range(count))),
        (40, column([STORED]) * count),
        (44, column([last]) * count),
    ):
        for byte in range(4):
            entries[at + byte :: 48] = values[byte::4]
    return entries


class Scale:
    """Makes the repository."""

    def __init__(self, path: Path, chunks: int, fanout: int) -> None:
        self.path = path
        self.rng = random.Random(chunks)
        self.storage = LocalStorage(path)
        self.storage.create()
        self.header = Header.new(chunk_size=CHUNK_SIZE, fanout=fanout)
        assert self.storage.put_if_absent(HEADER_NAME, [self.header.encode()])
        self.chunks = chunks
        self.fanout = fanout
        self.nodes = bytearray()  # entries of nodes
        self.pack = bytearray()  # records of the open pack
        self.node_packs: list[bytes] = []

    def make(self) -> str:
        """The id of the tree."""
        leaves: list[bytes] = []
        rest = b""
        share = self.chunks // PARTS
        for part in range(PARTS):
            count = share if part < PARTS - 1 else self.chunks - share * (PARTS - 1)
            entries = random_entries(self.rng, count)
            packs = [self.pack_id(part, number) for number in range(-(-count // PER_PACK))]
            for pack_id in packs:
                self.empty_pack(pack_id)
            names = b"".join([rest, *(entries[at : at + 32] for at in range(0, len(entries), 48))])
            whole = len(names) // (32 * self.fanout) * 32 * self.fanout
            leaves += self.put_nodes(0, names[:whole])
            rest = names[whole:]
            self.put_index(entries, packs)
        names = b"".join([*leaves, *self.put_nodes(0, rest)])
        level = 1
        while len(names) > 32:
            names = b"".join(self.put_nodes(level, names))
            level += 1
        root = struct.pack(
            "<8sHBBIIIQ32s", b"VMBKTREE", 1, level, 0, CHUNK_SIZE, self.fanout, 0, self.chunks * CHUNK_SIZE, names
        )
        tree = self.put_record(3, root)
        self.end_pack()
        self.put_index(self.nodes, self.node_packs)
        return tree.hex()

    @staticmethod
    def pack_id(part: int, number: int) -> bytes:
        return bytes([part + 1]) * 12 + number.to_bytes(4, "little")

    def empty_pack(self, pack_id: bytes) -> None:
        place = self.path / pack_name(pack_id)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()

    def put_index(self, entries: bytearray, packs: list[bytes]) -> None:
        index_id = self.rng.randbytes(16)
        parts = encode_entries(entries, self.header.keys.seal, self.header.id, index_id, packs)
        place = self.path / index_name(index_id)
        place.parent.mkdir(exist_ok=True)
        with place.open("wb") as file:
            for buffer in parts:
                file.write(buffer)

    def put_nodes(self, level: int, names: bytes) -> list[bytes]:
        """Names of the nodes that hold these names."""
        made = []
        for at in range(0, len(names), 32 * self.fanout):
            below = names[at : at + 32 * self.fanout]
            made.append(self.put_record(2, struct.pack("<4sBBHQ", b"NODE", level, 0, len(below) // 32, 0) + below))
        return made

    def put_record(self, kind: int, content: bytes) -> bytes:
        name = keyed_hash(self.header.keys.node, content)
        fields = struct.pack("<II", len(content), len(content) | kind << 24)
        place = struct.pack("<II", len(self.node_packs), 64 + len(self.pack))
        self.nodes += name + place + fields
        self.pack += name + fields + bytes(8) + content
        if len(self.pack) > NODES_PER_PACK * 32 * self.fanout:
            self.end_pack()
        return name

    def end_pack(self) -> None:
        pack_id = self.pack_id(PARTS, len(self.node_packs))
        place = self.path / pack_name(pack_id)
        place.parent.mkdir(parents=True, exist_ok=True)
        head = struct.pack("<8sH6x16s16s16x", b"VMBKPACK", 1, self.header.id, pack_id)
        place.write_bytes(head + self.pack)
        self.node_packs.append(pack_id)
        self.pack = bytearray()


# ---- works: each gets the repository's path and the tree's id, and prints what it likes


def opened(path: Path) -> Repository:
    return Repository.open(LocalStorage(path))


def work_open(path: Path, tree: str) -> None:
    opened(path)


def work_list_packs(path: Path, tree: str) -> None:
    repository = opened(path)
    timed("with sizes", repository.catalog.list_packs)
    timed("names only", repository.catalog.pack_ids)


def work_writer(path: Path, tree: str) -> None:
    repository = opened(path)

    def begin() -> None:
        present = repository.catalog.pack_ids()
        index = repository.catalog.for_writer(present, set(sorted(present)[:100]))
        assert index.lookup(bytes.fromhex(tree)) is not None

    timed("for_writer", begin)

    def write() -> None:
        with repository.writer("one") as writer:
            writer.blob(b"a" * 100000)

    timed("a writer's start and end", write)


def work_lookup(path: Path, tree: str) -> None:
    repository = opened(path)
    index = repository.catalog.current
    rng = random.Random(1)
    count = min(100000, len(index) // 40)
    known = []
    for file in index.files:
        known += [name for name, _, _ in itertools.islice(file.names(), count // len(index.files))]
    rng.shuffle(known)
    unknown = [rng.randbytes(32) for _ in range(count)]
    for label, names in (("known, neighbours", known), ("unknown", unknown), ("unknown again", unknown)):
        timed(f"{len(names)} {label}", lambda names=names: [index.lookup(name) for name in names])  # type: ignore[misc]


def work_liveset(path: Path, tree: str) -> None:
    repository = opened(path)
    index = repository.catalog.current
    live = LiveSet(index)
    reader = repository.reader(index)
    timed("walk", lambda: live.add_tree(reader, bytes.fromhex(tree)))
    timed("walk again", lambda: live.add_tree(reader, bytes.fromhex(tree)))
    timed("look up the rest", live.finish)
    usage = timed("pack_usage", live.pack_usage)
    assert live.missing_count == 0
    assert sum(figures[0] for figures in usage.values()) == len(index) == sum(figures[1] for figures in usage.values())


def work_gc(path: Path, tree: str) -> None:
    """All of a collection but the removing: a backup of the tree is published first."""
    from tests.unit.repository.repository_support import manifest, volume  # not in the memory of the other works

    repository = opened(path)
    name = f"{MANIFESTS}/{repository.header.manifest_name('scale')}"
    if repository.storage.stat(name) is None:
        size = repository.image(tree).size
        data = manifest("scale", volume("vda", tree, size), writer=bytes(12).hex()).encode()
        repository.storage.put_if_absent(name, [envelope.seal(MANIFEST_MAGIC, repository.header, data)])
    result = timed("gc --dry-run", lambda: repository.gc(dry_run=True))
    assert isinstance(result, GcResult)
    assert result.condemned_packs == 0


def work_merge(path: Path, tree: str) -> None:
    repository = opened(path)
    files = repository.catalog.current.files
    timed("merge all", lambda: repository.catalog._merged(files, lambda pack_id: True, None))


WORKS: dict[str, Callable[[Path, str], None]] = {
    name.removeprefix("work_"): value for name, value in list(globals().items()) if name.startswith("work_")
}


def timed(label: str, call: Callable[[], object]) -> object:
    start = time.perf_counter()
    result = call()
    print(f"    {label}: {time.perf_counter() - start:.2f} s")
    return result


def peak() -> int:
    """Bytes this process had in memory at most; not getrusage's, which is inherited from whoever started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def tree_of(path: Path, chunks: int, fanout: int = 256) -> str:
    """The tree of the repository at ``path``, which is made if there is none."""
    note = path / "tree"
    if not note.exists():
        tree = Scale(path, chunks, fanout).make()
        note.write_text(tree)
    return note.read_text()


def measure(path: Path, tree: str, work: str) -> int:
    """Run a work in a process of its own; its peak memory in bytes."""
    argv = [sys.executable, "-m", "tests.engine.scale", "--work", str(path), tree, work]
    done = subprocess.run(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    print("\n".join(lines))
    return int(last)


def main() -> None:
    if sys.argv[1] == "--work":
        path, tree, work = Path(sys.argv[2]), sys.argv[3], sys.argv[4]
        start = time.perf_counter()
        WORKS[work](path, tree)
        print(f"    whole process: {time.perf_counter() - start:.2f} s", peak(), sep="\n")
        return
    path, chunks = Path(sys.argv[1]), int(sys.argv[2])
    tree = tree_of(path, chunks)
    for work in sys.argv[3:] or WORKS:
        print(work, flush=True)
        print(f"    peak {measure(path, tree, work) / 2**20:.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
