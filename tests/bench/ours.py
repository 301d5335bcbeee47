"""The project's side of a measurement: one work in this process, timed from the moment it has its arguments.

A daemon does this work in the product, so the start of the interpreter and the imports (about 0.2 s) do not count;
opening the repository, publishing and closing do. Prints a line of JSON: ``seconds`` and ``bytes_in``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.bench.measure import CHUNK
from tests.bench.sources import fill_from_file, fill_from_nbd
from vmbackupd.engine.fileout import write_file
from vmbackupd.engine.image import ImageSink
from vmbackupd.engine.index import encode_entries
from vmbackupd.engine.progress import Progress
from vmbackupd.model import Consistency, Method, RevertMode, VolumeKind, VolumeRecord
from vmbackupd.repository import LocalStorage, Manifest, Repository, RepositoryWriter, VmIdentity
from vmbackupd.repository.catalog import index_name, pack_name
from vmbackupd.repository.keys import KeyFile
from vmbackupd.repository.verify import verify as verify_repository

TRACKED_SIZE = 2**40
TRACKED_USED = 10 * 2**30


def publish(writer: RepositoryWriter, images: Sequence[tuple[str, int]]) -> None:
    """End the backup with these (tree, size) as its volumes."""
    volumes = tuple(
        VolumeRecord(f"vd{number}", VolumeKind.VIRTUAL, Method.GUEST_SNAPSHOT, Consistency.APPLICATION, size, tree)
        for number, (tree, size) in enumerate(images)
    )
    now = time.time()
    vm = VmIdentity("bench", "6f1d1c1e-0000-4000-8000-000000000001")
    writer.publish(Manifest(writer.backup_id, vm, now, now, now, 0.0, RevertMode.BACKUP, volumes))


def new_id() -> str:
    """The id of a backup that is about to begin."""
    return f"bench-{time.time_ns()}"


def create(path: Path, key: Path | None = None) -> Repository:
    """A new repository, encrypted if there is a key file."""
    storage = LocalStorage(path)
    storage.create()
    return Repository.create(storage, keys=[] if key is None else [KeyFile(key)])


def latest(repository: Repository, writer: RepositoryWriter | None = None) -> tuple[str, int]:
    """(tree, size) of the first volume of the newest backup; ``writer`` is going to build on it."""
    backup_id = repository.backups()[-1].id
    manifest = repository.manifest(backup_id) if writer is None else writer.base(backup_id)
    record = manifest.volumes[0]
    assert record.tree is not None
    return record.tree, record.size


def backup(repository: Repository, size: int, fill: Callable[[ImageSink], None]) -> None:
    """One backup of one image."""
    with repository.writer(new_id()) as writer:
        sink = writer.image(size)
        fill(sink)
        publish(writer, [(sink.finish(), size)])


# ---- the works


def full(args: argparse.Namespace) -> int:
    size = args.image.stat().st_size
    with create(args.repository, args.key) as repository:
        backup(repository, size, lambda sink: fill_from_file(sink, args.image))
    return args.image.stat().st_blocks * 512


def scan(args: argparse.Namespace) -> int:
    size = args.image.stat().st_size
    with Repository.open(LocalStorage(args.repository)) as repository:
        backup(repository, size, lambda sink: fill_from_file(sink, args.image))
    return args.image.stat().st_blocks * 512


def tracked(args: argparse.Namespace) -> int:
    """Change tracking says that nothing changed."""
    with Repository.open(LocalStorage(args.repository)) as repository, repository.writer(new_id()) as writer:
        tree, size = latest(repository, writer)
        publish(writer, [(writer.update(tree).finish(), size)])
    return 0


def changed(args: argparse.Namespace) -> int:
    """Change tracking says which chunks changed: those in the file of changes."""
    numbers = json.loads(args.changes.read_text())
    with Repository.open(LocalStorage(args.repository)) as repository, repository.writer(new_id()) as writer:
        tree, size = latest(repository, writer)
        sink = writer.update(tree)
        with args.image.open("rb") as file:
            for number in numbers:
                sink.write(number * CHUNK, os.pread(file.fileno(), CHUNK, number * CHUNK))
        publish(writer, [(sink.finish(), size)])
    return len(numbers) * CHUNK


def restore(args: argparse.Namespace) -> int:
    with Repository.open(LocalStorage(args.repository)) as repository:
        tree, _ = latest(repository)
        image = repository.image(tree)
        with args.image.open("w+b") as file:
            write_file(image, file.fileno(), Progress(), label=str(args.image))
        return image.data_bytes()


def verify(args: argparse.Namespace) -> int:
    with Repository.open(LocalStorage(args.repository)) as repository:
        report = verify_repository(repository, data=True)
        assert report.sound
        tree, _ = latest(repository)
        return repository.image(tree).data_bytes()


def parallel(args: argparse.Namespace) -> int:
    """As many backups at once as there are sockets, into one repository."""
    with create(args.repository) as repository, repository.writer(new_id()) as writer:
        made: list[tuple[str, int]] = [("", 0)] * len(args.sockets)

        def one(number: int, size: int) -> None:
            sink = writer.image(size)
            fill_from_nbd(sink, args.sockets[number])
            made[number] = (sink.finish(), size)

        size = args.image.stat().st_size // len(args.sockets)
        threads = [threading.Thread(target=one, args=(number, size)) for number in range(len(args.sockets))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        publish(writer, made)
    return args.image.stat().st_blocks * 512


def prepare_tracked(args: argparse.Namespace) -> int:
    """A 1 TiB image with 10 GiB in use, spread over all of it in runs of 16 MiB."""
    rng = random.Random(1)
    run = 256
    with create(args.repository) as repository, repository.writer(new_id()) as writer:
        sink = writer.image(TRACKED_SIZE)
        pattern = bytearray(rng.randbytes(64) * (CHUNK // 64))
        for first in sorted(rng.sample(range(0, TRACKED_SIZE // CHUNK, run), TRACKED_USED // CHUNK // run)):
            for number in range(first, first + run):
                pattern[:8] = number.to_bytes(8, "little")
                sink.write(number * CHUNK, pattern)
        publish(writer, [(sink.finish(), TRACKED_SIZE)])
    return TRACKED_USED


def enlarge(args: argparse.Namespace) -> int:
    """Index files with millions of chunks that are nowhere, as other backups would have left them, and their packs."""
    from tests.engine.scale import PARTS, PER_PACK, random_entries

    rng = random.Random(args.chunks)
    with Repository.open(LocalStorage(args.repository)) as repository:
        header = repository.header
        for part in range(PARTS):
            entries = random_entries(rng, args.chunks // PARTS)
            packs = [rng.randbytes(12) + bytes(4) for _ in range(-(-args.chunks // PARTS // PER_PACK))]
            for pack_id in packs:
                place = args.repository / pack_name(pack_id)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.touch()
            index_id = rng.randbytes(16)
            parts = encode_entries(entries, header.keys.seal, header.id, index_id, packs)
            with (args.repository / index_name(index_id)).open("wb") as file:
                file.writelines(bytes(part) for part in parts)
    return args.chunks


WORKS: dict[str, Callable[[argparse.Namespace], int]] = {
    "full": full,
    "scan": scan,
    "tracked": tracked,
    "changed": changed,
    "restore": restore,
    "verify": verify,
    "parallel": parallel,
    "prepare-tracked": prepare_tracked,
    "enlarge": enlarge,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ours")
    parser.add_argument("work", choices=sorted(WORKS))
    parser.add_argument("--repository", type=Path, required=True)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--changes", type=Path)
    parser.add_argument("--chunks", type=int)
    parser.add_argument("--sockets", nargs="*", default=[])
    args = parser.parse_args()
    began = time.monotonic()
    bytes_in = WORKS[args.work](args)
    print(json.dumps({"seconds": time.monotonic() - began, "bytes_in": bytes_in}))


if __name__ == "__main__":
    main()
