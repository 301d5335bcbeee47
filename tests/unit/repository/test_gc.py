"""Forgetting, pruning and garbage collection, one at a time and beside others at work."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    SETTINGS,
    FaultyStorage,
    keys_of,
    make,
    manifest,
    namer,
    objects,
    reopen,
    store,
    volume,
)
from vmbackupd.errors import InvalidArgument, NotFound, Protected, RepositoryCorrupt, RepositoryFull, SessionLost
from vmbackupd.repository import LocalStorage, Repository
from vmbackupd.repository.catalog import Catalog, pack_name
from vmbackupd.repository.retention import KeepPolicy

pytestmark = pytest.mark.usefixtures("both_sorts")

RECORD = 48  # bytes of a record before its payload
SMALL = replace(SETTINGS, pack_size=16 * CHUNK)


def noise(seed: int, chunks: int) -> bytes:
    return random.Random(seed).randbytes(chunks * CHUNK)


def read(repository: Repository, backup: str) -> bytes:
    image = repository.image(repository.manifest(backup).volumes[0].tree or "")
    return image.read(0, image.size)


def kinds(path: Path) -> set[str]:
    return {name.partition("/")[0] for name in objects(path)}


@pytest.fixture
def repository(both_sorts: str, tmp_path: Path) -> Iterator[Repository]:
    with make(tmp_path / "r", settings=SMALL) as repository:
        yield repository


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r"


def test_what_is_forgotten_is_gone_and_its_space_is_freed(repository: Repository, path: Path) -> None:
    one, two = noise(1, 100), noise(2, 60)
    store(repository, "one", one + two)
    store(repository, "two", two)
    assert repository.gc().removed_packs == 0
    before = sum(map(len, objects(path).values()))
    assert repository.forget(["one"]).waiting == []
    assert [item.id for item in repository.backups()] == ["two"]
    with pytest.raises(NotFound):
        repository.manifest("one")
    with pytest.raises(NotFound):
        repository.forget(["one"])
    foretold = repository.gc(dry_run=True)
    result = repository.gc()
    assert foretold.dry_run and foretold.condemned_packs == result.condemned_packs
    assert result.removed_packs == result.condemned_packs > 3
    assert abs(foretold.freed_bytes - result.freed_bytes) < 5 * CHUNK
    assert before - sum(map(len, objects(path).values())) > 95 * CHUNK
    assert kinds(path) == {"packs", "indexes", "manifests"}
    assert read(repository, "two") == two
    assert read(reopen(path), "two") == two
    assert repository.gc().condemned_packs == 0
    repository.forget(["two"])
    repository.gc()
    assert objects(path) == {}


@pytest.mark.parametrize("seed", range(12))
def test_a_collection_leaves_nothing_to_the_next(repository: Repository, seed: int) -> None:
    dice = random.Random(seed)
    store(repository, "all", noise(seed, 120))
    kept = [noise(seed, 120)[at * CHUNK :][:CHUNK] for at in range(120) if dice.random() < 0.75]
    store(repository, "most", b"".join(kept))
    repository.forget(["all"])
    repository.gc()
    assert repository.gc().condemned_packs == 0


def test_a_collector_was_killed_once_it_had_removed_packs(
    repository: Repository, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its indexes still tell of them: the next collection sees to that, too."""
    store(repository, "one", noise(5, 40))
    store(repository, "two", noise(6, 10))
    repository.forget(["one"])

    def killed(self: Catalog) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Catalog, "drop_gone", killed)
        repository.gc()
    with reopen(path, SMALL) as other:
        assert other.catalog.refresh()
        assert other.catalog.covered() > other.catalog.pack_ids()
        other.gc()
        assert other.catalog.covered() == other.catalog.pack_ids()
        assert read(other, "two") == noise(6, 10)
        other.forget(["two"])
        other.gc()
    assert objects(path) == {}


def test_live_parts_of_mostly_unused_packs_are_copied(repository: Repository, path: Path) -> None:
    """Every fourth chunk is needed: no pack is dead, all are repacked."""
    image = noise(3, 400)
    store(repository, "one", image)
    kept = b"".join(image[at : at + CHUNK] for at in range(0, len(image), 4 * CHUNK))
    store(repository, "two", kept)
    repository.forget(["one"])
    result = repository.gc()
    assert result.repacked_bytes >= len(kept)
    assert result.reasons.keys() <= {"nothing in them is needed", "little in them is needed"}
    assert sum(map(len, objects(path).values())) < 1.2 * len(kept)
    assert read(reopen(path), "two") == kept
    assert repository.gc().condemned_packs == 0


def test_records_stored_twice_are_kept_once(repository: Repository, path: Path) -> None:
    image = noise(4, 50)
    with repository.writer("early") as early:
        store(reopen(path, SMALL), "two", image)
        sink = early.image(len(image))
        sink.write(0, image)
        early.publish(manifest("early", volume("vda", sink.finish(), len(image))))
    assert sum(map(len, objects(path).values())) > 2 * len(image)
    repository.gc()
    assert sum(map(len, objects(path).values())) < 1.1 * len(image)
    assert read(reopen(path), "two") == read(reopen(path), "early") == image


def test_protected_backups(repository: Repository) -> None:
    store(repository, "one", noise(1, 2))
    repository.protect("one", True)
    repository.protect("one", True)
    assert repository.protected() == {"one"}
    with pytest.raises(Protected, match="unprotect one"):
        repository.forget(["one"])
    assert [item.reason for item in repository.prune(KeepPolicy(keep_last=1))] == ["protected"]
    repository.protect("one", False)
    repository.protect("one", False)
    repository.forget(["one"])
    with pytest.raises(NotFound):
        repository.protect("one", True)
    for bad in ("../x", ""):
        with pytest.raises(InvalidArgument):
            repository.forget([bad])


def test_prune(repository: Repository) -> None:
    for number in range(3):
        with repository.writer(f"backup-{number}") as writer:
            image = volume("vda", writer.blob(noise(number, 1)), CHUNK)
            writer.publish(replace(manifest(f"backup-{number}", image), t1=1e9 + number * 86400))
    policy = KeepPolicy(keep_daily=2)
    assert [item.keep for item in repository.prune(policy, vm="other")] == []
    foretold = repository.prune(policy, vm="web1", dry_run=True)
    assert [item.keep for item in foretold] == [False, True, True]
    assert len(repository.backups()) == 3
    assert repository.prune(policy, vm="web1") == foretold
    assert [item.id for item in repository.backups()] == ["backup-1", "backup-2"]


def test_a_writer_keeps_what_it_relies_on(repository: Repository, path: Path) -> None:
    """Garbage that a writer found before it was condemned is copied when it turned out to be needed."""
    image = noise(5, 60)
    store(repository, "one", image)
    repository.forget(["one"])
    with reopen(path, SMALL) as other, other.writer("two") as writer:
        result = repository.gc()
        assert (result.removed_packs, len(result.waiting_for)) == (0, 1)
        assert result.waiting_packs == result.condemned_packs > 0
        sink = writer.image(len(image))
        sink.write(0, image)
        assert sink.chunks_new == 0
        writer.publish(manifest("two", volume("vda", sink.finish(), len(image))))
    result = repository.gc()
    assert result.repacked_bytes >= len(image)
    assert result.removed_packs > 0
    assert read(reopen(path), "two") == image
    assert kinds(path) == {"packs", "indexes", "manifests"}


def test_a_writer_does_not_rely_on_what_is_condemned(repository: Repository, path: Path) -> None:
    image = noise(6, 60)
    store(repository, "one", image)
    with repository.reading("one"):  # holds the packs that are condemned
        repository.condemn(repository.catalog.list_packs(), reason="test")
        with repository.writer("two") as writer:
            sink = writer.image(len(image))
            sink.write(0, image)
            tree = sink.finish()
            assert sink.chunks_new == 60
            writer.publish(manifest("two", volume("vda", tree, len(image))))
        assert repository.gc().removed_packs == 0
    result = repository.gc()
    assert (result.removed_packs > 0, result.repacked_bytes) == (True, 0)
    assert read(reopen(path), "one") == read(reopen(path), "two") == image


def test_a_base_stays_while_a_writer_builds_on_it(repository: Repository, path: Path) -> None:
    """The base's packs were condemned before the writer began and the base is forgotten after: it still counts."""
    image = noise(7, 200)
    with reopen(path, SMALL) as other, other.writer("base") as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        tree = sink.finish()
        writer._output.finish()
        repository.condemn(repository.catalog.list_packs(), reason="test")
        repository.gc()  # notes whom the verdict waits for
        writer.publish(manifest("base", volume("vda", tree, len(image))))
    with reopen(path, SMALL) as other, other.writer("two") as writer:
        assert writer.base("base").trees() == [tree]
        result = repository.forget(["base"])
        assert len(result.waiting) == 1
        with pytest.raises(NotFound):
            writer.base("base")
        repository.gc()
        sink = writer.update(tree)
        sink.write(0, bytes(CHUNK))
        changed = sink.finish()
        writer.publish(manifest("two", volume("vda", changed, len(image))))
    repository.gc()
    assert read(reopen(path), "two") == bytes(CHUNK) + image[CHUNK:]
    assert kinds(path) == {"packs", "indexes", "manifests"}
    assert len(list((path / "manifests").iterdir())) == 1


def test_what_is_being_read_stays(repository: Repository, path: Path) -> None:
    image = noise(8, 100)
    store(repository, "one", image)
    other = reopen(path, SMALL)
    with other.reading("one") as found:
        source = other.image(found.volumes[0].tree or "")
        assert source.read(0, CHUNK) == image[:CHUNK]
        assert len(repository.forget(["one"]).waiting) == 1
        assert repository.gc().removed_packs == 0
        assert source.read(0, len(image)) == image
    result = repository.gc()
    assert result.removed_packs > 3
    assert objects(path) == {}
    with pytest.raises(NotFound), other.reading("one"):
        pass
    assert objects(path) == {}


def test_a_damaged_pack_heals(repository: Repository, path: Path) -> None:
    """Condemned, it is not relied upon: the next backup stores the content again, and the pack goes."""
    image = noise(9, 12)
    store(repository, "one", image)
    (pack,) = repository.catalog.list_packs()
    victim = path / pack_name(pack)
    data = bytearray(victim.read_bytes())
    found = repository.catalog.current.lookup(namer(repository).name(1, image[5 * CHUNK : 6 * CHUNK]))
    assert found is not None
    data[found[1] + RECORD] ^= 1
    victim.write_bytes(data)
    repository = reopen(path, SMALL)
    with pytest.raises(RepositoryCorrupt):
        read(repository, "one")
    repository.condemn([pack], reason="damaged")
    for _ in range(2):
        result = repository.gc()
        assert (result.removed_packs, result.damaged_packs) == (0, [pack.hex()])
    assert victim.exists()
    store(repository, "two", image)
    assert repository.gc().removed_packs == 1
    assert not victim.exists()
    assert read(reopen(path), "one") == read(reopen(path), "two") == image
    assert kinds(path) == {"packs", "indexes", "manifests"}


def test_missing_content_stops_everything(repository: Repository, path: Path) -> None:
    store(repository, "one", noise(10, 40))
    store(repository, "two", noise(11, 40))
    store(repository, "three", noise(12, 40))
    repository.forget(["three"])
    tree = repository.manifest("two").volumes[0].tree or ""
    lost = repository.catalog.current.lookup(bytes.fromhex(tree))
    assert lost is not None
    (path / pack_name(lost[0])).unlink()
    damaged = reopen(path, SMALL)
    before = {name for name in objects(path) if name.startswith("packs")}
    with pytest.raises(RepositoryCorrupt, match="two"):
        damaged.gc()
    assert {name for name in objects(path) if name.startswith("packs")} == before
    damaged.forget(["two"])
    assert damaged.gc().removed_packs > 0
    assert read(damaged, "one") == noise(10, 40)


def test_an_unreadable_manifest_stops_everything(repository: Repository, path: Path) -> None:
    store(repository, "one", noise(10, 40))
    store(repository, "two", noise(11, 40))
    repository.forget(["one"])
    (path / repository.manifest_object("two")).write_bytes(b"?" * 500)
    with pytest.raises(RepositoryCorrupt, match=repository.header.manifest_name("two")):
        repository.gc()
    repository.forget(["two"])
    repository.gc()
    assert objects(path) == {}


@pytest.mark.parametrize("lost", ["all", "some", "damaged"])
def test_lost_indexes(repository: Repository, path: Path, lost: str) -> None:
    images = {f"backup-{number}": noise(number, 30) for number in range(6)}
    for name, image in images.items():
        store(repository, name, image)
    repository.forget(["backup-1", "backup-4"])
    repository.condemn([next(iter(repository.catalog.list_packs()))], reason="test")
    for number, index in enumerate(sorted((path / "indexes").iterdir())):
        if lost == "damaged":
            data = bytearray(index.read_bytes())
            data[100] ^= 1
            index.write_bytes(data)
        elif lost == "all" or number % 2:
            index.unlink()
    repository = reopen(path, SMALL)
    repository.gc()
    for name in ("backup-0", "backup-2", "backup-3", "backup-5"):
        assert read(reopen(path), name) == images[name]
    assert sum(map(len, objects(path).values())) < 1.3 * 120 * CHUNK


def test_verdicts_that_cannot_be_read(repository: Repository, path: Path) -> None:
    """Nobody knows what is condemned: nothing new is built, but everything can be read."""
    store(repository, "one", noise(1, 3))
    with repository.reading("one"):
        repository.condemn(repository.catalog.list_packs(), reason="test")
    (verdict,) = (path / "condemned").iterdir()
    good = verdict.read_bytes()
    verdict.write_bytes(good[:-1])
    for work in (lambda: reopen(path).gc(), lambda: reopen(path).writer("two")):
        with pytest.raises(RepositoryCorrupt, match=verdict.name):
            work()
    assert read(reopen(path), "one") == noise(1, 3)
    verdict.unlink()
    with reopen(path).writer("two") as writer:
        verdict.write_bytes(good[:-1])
        with pytest.raises(RepositoryCorrupt, match=verdict.name):
            writer.base("one")  # it could be what was forgotten
    verdict.unlink()
    reopen(path).gc()
    assert kinds(path) == {"packs", "indexes", "manifests"}


def test_many_packs_at_once(repository: Repository, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbackupd.repository.repository.VERDICT", 4)
    monkeypatch.setattr("vmbackupd.repository.gc.BATCH", 3)
    store(repository, "one", noise(1, 200))
    packs = repository.catalog.list_packs()
    with repository.reading("one"):
        repository.condemn(packs, reason="test")
    assert len(list((path / "condemned").iterdir())) == -(-len(packs) // 4) > 2
    assert repository.gc().removed_packs == len(packs)
    assert read(reopen(path), "one") == noise(1, 200)
    assert kinds(path) == {"packs", "indexes", "manifests"}


def test_no_room_for_copies(repository: Repository, path: Path) -> None:
    """What needs no room is removed before it is told."""
    image = noise(3, 400)
    store(repository, "one", image + noise(4, 100))
    store(repository, "two", b"".join(image[at : at + CHUNK] for at in range(0, len(image), 4 * CHUNK)))
    repository.forget(["one"])
    storage = FaultyStorage(LocalStorage(path))
    storage.always = ("put packs", RepositoryFull("no space left"))
    full = Repository.open(storage, settings=SMALL, keys=keys_of(storage))
    before = len(repository.catalog.list_packs())
    with pytest.raises(RepositoryFull):
        full.gc()
    assert before - len(repository.catalog.list_packs()) >= 5
    assert [name for name in objects(path) if name.startswith("sessions")] == []
    repository.gc()
    assert sum(map(len, objects(path).values())) < 1.2 * 100 * CHUNK


class Full(FaultyStorage):
    """A disk on which not a byte is free, but for what was removed since."""

    def __init__(self, path: Path) -> None:
        super().__init__(LocalStorage(path))
        self.free = 0

    def put_if_absent(self, name: str, parts: Iterable[Any]) -> bool:
        data = b"".join(bytes(part) for part in parts)
        if len(data) > self.free:
            raise RepositoryFull("no space left")
        self.free -= len(data)
        return super().put_if_absent(name, [data])

    def claim(self, name: str, data: bytes) -> Any:
        if len(data) > self.free:
            raise RepositoryFull("no space left")
        return super().claim(name, data)

    def delete(self, name: str) -> bool:
        found = self.storage.stat(name)
        self.free += found.size if found is not None else 0
        return super().delete(name)


def test_a_disk_that_is_full_to_the_last_byte(repository: Repository, path: Path) -> None:
    """An index makes room for the verdict: it can be made again."""
    image = noise(1, 60)
    store(repository, "one", noise(2, 100) + image)
    store(repository, "two", image)
    storage = Full(path)
    full = Repository.open(storage, settings=SMALL, keys=keys_of(storage))
    full.forget(["one"])
    result = full.gc()
    assert result.removed_packs > 5
    assert storage.free > 80 * CHUNK
    assert read(reopen(path), "two") == image
    repository.gc()
    assert kinds(path) == {"packs", "indexes", "manifests"}
    assert repository.catalog.covered() >= set(repository.catalog.list_packs())


class Lease(FaultyStorage):
    """A storage that only guesses who is dead: those that the test says."""

    def __init__(self, path: Path) -> None:
        super().__init__(LocalStorage(path))
        self.dead: set[str] = set()

    @property
    def certain_ends(self) -> bool:
        return False

    def abandoned(self, name: str) -> bool:
        return name.rpartition("/")[2] in self.dead

    def claim(self, name: str, data: bytes) -> Any:
        return Unaware(super().claim(name, data))


class Unaware:
    """The claim of a host that has not noticed yet that it was taken for dead."""

    lost = False

    def __init__(self, claim: Any) -> None:
        self.release = claim.release


def test_a_writer_taken_for_dead_cannot_publish(repository: Repository, path: Path) -> None:
    storage = Lease(path)
    slow = Repository.open(storage, settings=SMALL, keys=keys_of(storage))
    image = noise(5, 40)
    writer = slow.writer("two")
    sink = writer.image(len(image))
    sink.write(0, image)
    tree = sink.finish()
    storage.dead.add(writer.id.hex())
    slow.clean_up()
    assert [name for name in objects(path) if name.startswith("sessions")] == []
    assert len(objects(path)[repository.manifest_object("two")]) == (152 if repository.header.encrypted else 104)
    with pytest.raises(SessionLost, match="two"):
        writer.publish(manifest("two", volume("vda", tree, len(image))))
    assert slow.backups() == []
    with pytest.raises(NotFound):
        slow.manifest("two")
    with pytest.raises(InvalidArgument, match="was, a backup two"):
        slow.writer("two")
    # what it stored is whole, and good for others until it is collected
    with slow.writer("three") as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        assert sink.finish() == tree
        assert sink.chunks_new == 0
        writer.publish(manifest("three", volume("vda", tree, len(image))))
    slow.forget(["three"])
    slow.gc()
    assert set(objects(path)) == {repository.manifest_object(name) for name in ("two", "three")}  # tombstones


def test_a_writer_that_gives_up_leaves_its_packs_to_others(repository: Repository, path: Path) -> None:
    """Where nobody can be certain who is dead, its packs may be in use by now."""
    storage = Lease(path)
    slow = Repository.open(storage, settings=SMALL, keys=keys_of(storage))
    with slow.writer("two") as writer:
        sink = writer.image(20 * CHUNK)
        sink.write(0, noise(5, 20))
        sink.finish()
    assert kinds(path) == {"packs"}
    slow.gc()
    assert objects(path) == {}
