"""A repository at which several actors work, and what must be true of it after every storage operation."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.unit.repository.actors import Actor, Gate, Killed, Shared
from tests.unit.repository.repository_support import CHUNK, manifest, namer, volume
from vmbackupd.engine.reference_image import contents, image_of
from vmbackupd.engine.zstd import Codec
from vmbackupd.errors import BackupError
from vmbackupd.repository import Repository, Settings
from vmbackupd.repository.gc import SLACK, THRESHOLD
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header

SETTINGS = Settings(workers=1, pack_size=3 * CHUNK, segment_entries=64)
ALPHABET = [random.Random(number).randbytes(CHUNK) for number in range(7)]


class Model:
    """``published``: what each backup must read as, from the moment its manifest stands."""

    def __init__(self, *, certain: bool) -> None:
        self.shared = Shared(certain=certain)
        header = Header.new(chunk_size=CHUNK, fanout=16)
        self.shared.put_if_absent(HEADER_NAME, [header.encode()])
        self.repository = Repository.open(self.shared, settings=SETTINGS)
        self.actors: list[Actor] = []
        self.images: dict[str, bytes] = {}
        self.trees: dict[str, str] = {}
        self.needs: dict[str, set[bytes]] = {}
        self.held: dict[Actor, str] = {}
        self._packs: dict[str, dict[bytes, bytes]] = {}
        self._count = 0

    # ---- actors

    def start(self, kind: str, work: Callable[[Actor, Repository], None]) -> Actor:
        self._count += 1

        def run(actor: Actor, gate: Gate) -> None:
            repository = Repository.open(gate, settings=SETTINGS)
            repository.catalog.merge_soon = lambda: None  # type: ignore[method-assign]
            work(actor, repository)

        actor = Actor(f"{kind}-{self._count}", self.shared, run)
        self.actors.append(actor)
        return actor

    def writer(self, chunks: list[int], base: str | None = None) -> Actor:
        """A backup of these chunks of the alphabet (-1: a hole); with ``base`` only what differs from it is written."""
        backup = f"backup-{self._count + 1}"

        def work(_: Actor, repository: Repository) -> None:
            with repository.writer(backup) as writer:
                want = list(chunks)
                if base is None:
                    sink = writer.image(len(want) * CHUNK)
                else:
                    tree = writer.base(base).volumes[0].tree or ""
                    before = self.images[base]
                    want += [-1] * (len(before) // CHUNK - len(want))
                    del want[len(before) // CHUNK :]
                    sink = writer.update(tree)
                image = b"".join(ALPHABET[number] if number >= 0 else bytes(CHUNK) for number in want)
                for at in range(0, len(image), CHUNK):
                    piece = image[at : at + CHUNK]
                    if base is None or before[at : at + CHUNK] != piece:
                        sink.write(at, piece)
                self.images[backup] = image
                self.trees[backup] = sink.finish()
                writer.publish(manifest(backup, volume("vda", self.trees[backup], len(image))))

        return self.start("writer", work)

    def reader(self, backup: str) -> Actor:
        """Reads a backup, then again."""

        def work(actor: Actor, repository: Repository) -> None:
            with repository.reading(backup) as found:
                self.held[actor] = backup
                for _ in range(2):
                    source = repository.image(found.volumes[0].tree or "")
                    assert source.read(0, source.size) == self.images[backup], "the reader read something else"
                del self.held[actor]

        return self.start("reader", work)

    def forgetter(self, backup: str) -> Actor:
        return self.start("forget", lambda _, repository: void(repository.forget([backup])))

    def collector(self) -> Actor:
        return self.start("gc", lambda _, repository: void(repository.gc()))

    # ---- what must be true

    def backups(self) -> set[str]:
        """The backups that exist."""
        return {summary.id for summary in Repository.open(self.shared).backups()}

    def check(self) -> None:
        """Everything that a backup refers to is in a pack, whole: of every backup that exists, and of those that a
        living reader holds."""
        for actor in self.actors:
            if actor.error is not None and not isinstance(actor.error, BackupError | Killed):
                raise actor.error
        records = self._records()
        needed = self.backups() | {backup for actor, backup in self.held.items() if self._lives(actor)}
        for backup in needed:
            tree = self.trees[backup]
            if tree not in self.needs:
                used = Recorder(records)
                try:
                    assert image_of(tree, used) == self.images[backup], f"{backup} reads as something else"
                except KeyError:
                    raise AssertionError(f"{backup} was published and is not whole") from None
                self.needs[tree] = used.names
            missing = self.needs[tree] - records.keys()
            assert not missing, f"{len(missing)} chunks of {backup} are gone"

    def _lives(self, actor: Actor) -> bool:
        claimed = [name for name, owner in self.shared.owners.items() if owner is actor]
        return not actor.killed and not actor.done and not self.shared.suspected.intersection(claimed)

    def _records(self) -> dict[bytes, bytes]:
        """Everything in the packs that are there, each content checked against its name."""
        found: dict[bytes, bytes] = {}
        with self.shared.lock:
            packs = {name: data for name, data in self.shared.objects.items() if name.startswith("packs/")}
        for name, data in packs.items():
            if name not in self._packs:
                self._packs[name] = contents([data], namer(self.repository), Codec(1, 2**23).decompress)
            found.update(self._packs[name])
        return found

    def finish(self) -> None:
        """Let everybody end, then collect: nothing is lost, and no garbage stays that is worth removing."""
        for actor in self.actors:
            actor.finish()
            self.check()
        for name, data in self.shared.limbo:
            self.shared.put_if_absent(name, [data])
        self.shared.suspected.update(name for name in self.shared.objects if name.startswith("sessions/"))
        self.check()
        alive = self.backups()
        repository = Repository.open(self.shared, settings=SETTINGS)
        for _ in range(3):
            repository.gc()
            self.check()
        assert self.backups() == alive
        left = {name.partition("/")[0] for name in self.shared.objects}
        assert left <= {HEADER_NAME, "packs", "indexes", "manifests"}, f"left behind: {left}"
        repository.catalog.refresh()
        assert repository.catalog.covered() == repository.catalog.pack_ids(), "indexes tell of packs that are gone"
        self._check_waste()
        for name in [name for name in self.shared.objects if name.startswith("indexes/")]:
            self.shared.delete(name)
        fresh = Repository.open(self.shared, settings=SETTINGS)
        for backup in alive:
            source = fresh.image(fresh.manifest(backup).volumes[0].tree or "")
            assert source.read(0, source.size) == self.images[backup]

    def _check_waste(self) -> None:
        live = {name for backup in self.backups() for name in self.needs[self.trees[backup]]}
        records = self._records()
        needed = sum(len(records[name]) for name in live)
        packs = [self._packs[name] for name in self.shared.objects if name.startswith("packs/")]
        for pack in packs:
            size = sum(map(len, pack.values()))
            wasted = sum(len(data) for name, data in pack.items() if name not in live)
            # headers are not counted here, and nodes compress: a margin for both
            assert wasted <= (THRESHOLD + 0.1) * size + CHUNK // 2, f"{wasted} bytes of a pack of {size} are wasted"
        held = sum(len(data) for pack in packs for data in pack.values())
        assert held * (1 - SLACK - 0.1) <= needed + CHUNK, f"{held} bytes for {needed} that are needed"

    def end(self) -> None:
        """Leave no thread behind."""
        for actor in self.actors:
            if not actor.done:
                actor.kill()


def void(_: object) -> None:
    """Drops a result."""


class Recorder(dict[bytes, bytes]):
    """Remembers which names were asked for."""

    def __init__(self, records: dict[bytes, bytes]) -> None:
        super().__init__(records)
        self.names: set[bytes] = set()

    def __getitem__(self, name: bytes) -> bytes:
        self.names.add(name)
        return super().__getitem__(name)


def deterministic(seed: int) -> Callable[..., Any]:
    """What stands in for ``secrets.token_bytes``, so that a schedule that failed fails again."""
    rng = random.Random(seed)
    return lambda size=32: rng.randbytes(size)
