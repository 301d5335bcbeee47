"""Verifying: what is damaged is found, told by backup, volume and range, and no more than that."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    FaultyStorage,
    keys_of,
    make,
    manifest,
    objects,
    reopen,
    sparse_image,
    volume,
)
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import Cancelled, InvalidArgument, NotFound, RepositoryCorrupt, StorageError
from vmbackupd.repository import LocalStorage, ObjectInfo, Repository
from vmbackupd.repository.condemned import packs_in
from vmbackupd.repository.verify import VerifyReport, verify

IMAGES = {"vda": 700, "vdb": 300}  # chunks


@pytest.fixture(autouse=True)
def no_threads_left() -> object:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("vmbackup-verify")] == []


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "encrypted"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three backups of two volumes; the second changes a little of the first, the third is the second again."""
    path = tmp_path_factory.mktemp("sound") / "repository"
    rng = random.Random(1)
    repository = make(path, encrypted=request.param)
    images = {name: bytearray(sparse_image(rng, count * CHUNK + 77, density=0.8)) for name, count in IMAGES.items()}
    for number in range(3):
        if number == 1:
            images["vda"][CHUNK * 30 : CHUNK * 40] = rng.randbytes(CHUNK * 10)
        with repository.writer(f"backup-{number}") as writer:
            volumes = []
            for name, image in images.items():
                sink = writer.image(len(image))
                sink.write(0, image)
                volumes.append(volume(name, sink.finish(), len(image)))
            blob = writer.blob(b"<domain/>" * 100)
            writer.publish(manifest(f"backup-{number}", *volumes, config={"domain.xml": blob}))
    repository.close()
    return path


@pytest.fixture
def path(tmp_path: Path, sound: Path) -> Path:
    shutil.copytree(sound, tmp_path / "repository")
    return tmp_path / "repository"


def opened(storage: FaultyStorage) -> Repository:
    return Repository.open(storage, keys=keys_of(storage))


def condemned(path: Path) -> set[str]:
    """The packs that later backups do not rely on."""
    with reopen(path) as repository:
        return {pack.hex() for pack in packs_in(repository.verdicts.listed())}


def packs_of(path: Path) -> list[Path]:
    return sorted(path.glob("packs/*/*"))


def packs_of_the_first(path: Path) -> list[Path]:
    """Those that the first backup's writer made: all backups need what is in them."""
    with reopen(path) as repository:
        writer = repository.manifest("backup-0").writer
    return [pack for pack in packs_of(path) if pack.name.startswith(writer)]


def unreadable(repository: Repository) -> set[tuple[str, str, int]]:
    """(backup, volume, number) of every chunk that cannot be read, found by reading all of them."""
    found = set()
    for summary in repository.backups():
        for item in repository.manifest(summary.id).volumes:
            assert item.tree is not None
            for number in range(-(-item.size // CHUNK)):
                start = number * CHUNK
                try:
                    repository.image(item.tree).read(start, min(CHUNK, item.size - start))
                except RepositoryCorrupt:
                    found.add((summary.id, item.id, number))
    return found


def chunks_in(report: VerifyReport) -> set[tuple[str, str, int]]:
    found = set()
    for item in report.damage:
        if item.volume in IMAGES:
            first = item.offset // CHUNK
            found |= {(item.backup, item.volume, first + n) for n in range(-(-item.length // CHUNK))}
    return found


@pytest.mark.parametrize("data", [False, True])
def test_a_sound_repository(path: Path, data: bool) -> None:
    progress, before = Progress(), objects(path)
    with reopen(path) as repository:
        report = verify(repository, data=data, progress=progress)
        assert report.sound and report.as_dict()["sound"] is True
        assert report.backups == ["backup-0", "backup-1", "backup-2"] and not report.condemned
        sizes = [pack.stat().st_size for pack in packs_of(path)]
        if data:
            assert report.packs == len(sizes) and report.bytes_read >= sum(sizes)
            assert progress.bytes_done == progress.bytes_total == sum(sizes)
        else:
            assert (report.packs, report.bytes_read) == (0, 0)
            assert (
                progress.bytes_done
                >= progress.bytes_total
                == sum(
                    item.size
                    for backup in ("backup-0", "backup-1")  # the third has the second's trees: looked at once
                    for item in repository.manifest(backup).volumes
                    if (backup, item.id) != ("backup-1", "vdb")
                )
            )
        # what trees share is looked at once
        assert report.chunks < 2 * 1000
    assert objects(path) == before


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("seed", range(10))
def test_damage_is_told_exactly(path: Path, seed: int, descriptors: bool) -> None:
    """Whatever happened to the packs: the ranges that are told are those that cannot be read."""
    rng = random.Random(seed)
    victims = rng.sample(packs_of(path), rng.randrange(1, 4))
    for victim in victims:
        data = bytearray(victim.read_bytes())
        way = rng.random()
        if way < 0.15:
            victim.unlink()
            continue
        if way < 0.4:
            data = data[: rng.randrange(len(data))]
        else:
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
    gone = {victim.name for victim in victims if not victim.exists()}
    with opened(FaultyStorage(LocalStorage(path), descriptors=descriptors)) as repository:
        report = verify(repository, data=True)
        assert chunks_in(report) == unreadable(repository)
    assert {pack for pack in report.damaged_packs if pack not in gone} == {victim.name for victim in victims} - gone
    assert condemned(path) == set(report.condemned) == {victim.name for victim in victims} - gone
    assert not report.sound
    text = str(report.as_dict())
    assert all(victim.name in text for victim in victims if victim.name not in gone)


def test_the_structure_tells_of_packs_that_are_gone_or_short(path: Path) -> None:
    first, second = packs_of_the_first(path)[:2]
    first.unlink()
    os.truncate(second, second.stat().st_size // 2)
    with reopen(path) as repository:
        report = verify(repository)
        assert chunks_in(report) == unreadable(repository)
    assert report.damaged_packs == {first.name: "missing", second.name: "the pack is truncated"}
    assert condemned(path) == {second.name}
    assert {item.reason for item in report.damage} <= {"the pack is missing", "the pack is truncated"}


def test_a_bit_that_flipped_is_found_in_the_data_only(path: Path) -> None:
    victim = packs_of_the_first(path)[0]
    data = bytearray(victim.read_bytes())
    data[200] ^= 1  # in the content of the first record: chunk 0 of vda
    victim.write_bytes(data)
    with reopen(path) as repository:
        assert verify(repository).sound
        report = verify(repository, data=True)
        assert chunks_in(report) == unreadable(repository)
    assert condemned(path) == {victim.name}
    assert "1 of its" in report.damaged_packs[victim.name]
    assert {item.backup for item in report.damage} == {"backup-0", "backup-1", "backup-2"}
    assert {item.pack for item in report.damage} == {victim.name}


def test_what_another_pack_holds_is_no_damage(path: Path) -> None:
    """With no index the writer stores everything again: every record has a sound copy."""
    kept = {name: data for name, data in objects(path).items() if name.startswith("indexes")}
    old = packs_of(path)
    for name in kept:
        (path / name).unlink()
    with reopen(path) as repository:
        trees = {
            item.id: item for backup in ("backup-0", "backup-2") for item in repository.manifest(backup).volumes
        } | {"old": repository.manifest("backup-0").volumes[0]}
        images = {name: repository.image(item.tree or "").read(0, item.size) for name, item in trees.items()}
        for name in {name for name in objects(path) if name.startswith("indexes")}:
            (path / name).unlink()
    with reopen(path) as repository, repository.writer("again") as writer:
        volumes = []
        for name, image in images.items():
            sink = writer.image(len(image))
            sink.write(0, image)
            volumes.append(volume(name, sink.finish(), len(image)))
        writer.publish(manifest("again", *volumes, config={"domain.xml": writer.blob(b"<domain/>" * 100)}))
    for name, data in kept.items():
        (path / name).write_bytes(data)
    for pack in old:
        data = bytearray(pack.read_bytes())
        for at in range(0, len(data), 3000):
            data[at] ^= 0xFF
        pack.write_bytes(data)
    with reopen(path) as repository:
        report = verify(repository, data=True)
    assert report.damage == [] and set(report.damaged_packs) == {pack.name for pack in old}
    assert condemned(path) == set(report.damaged_packs)


def test_a_part_of_the_backups(path: Path) -> None:
    """Only packs that the named backups need are read."""
    with reopen(path) as repository:
        every = verify(repository, data=True)
        first = verify(repository, data=True, backups=["backup-0"])
        assert first.backups == ["backup-0"] and 0 < first.packs < every.packs
        with pytest.raises(NotFound):
            verify(repository, backups=["never"])
        with pytest.raises(InvalidArgument):
            verify(repository, data=True, rate=0)


def test_an_unreadable_manifest_hides_no_other(path: Path) -> None:
    with reopen(path) as repository:
        victim = path / "manifests" / repository.header.manifest_name("backup-1")
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.write_bytes(data)
    with reopen(path) as repository:
        report = verify(repository)
        assert list(report.unreadable) == [victim.name] and report.backups == ["backup-0", "backup-2"]
        assert not report.sound and not report.damage
        assert list(verify(repository, backups=["backup-1"]).unreadable) == ["backup-1"]


def test_a_damaged_index_is_told_and_made_again(path: Path) -> None:
    victim = sorted((path / "indexes").iterdir())[0]
    data = bytearray(victim.read_bytes())
    data[100] ^= 1  # in its first block: what lies there counts as not known
    victim.write_bytes(data)
    with reopen(path) as repository:
        report = verify(repository, data=True)
    assert report.damaged_indexes == [f"indexes/{victim.name}"]
    assert not report.damage and not report.damaged_packs and not report.sound


def test_a_verification_goes_on_where_it_was(tmp_path: Path, path: Path) -> None:
    state = tmp_path / "state"
    packs = packs_of(path)
    victims = [packs[0], packs[-1]]
    for victim in victims:
        data = bytearray(victim.read_bytes())
        data[300] ^= 1
        victim.write_bytes(data)
    storage = FaultyStorage(LocalStorage(path), descriptors=False)
    progress, asked = Progress(), set[str]()

    def get(name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name.startswith("packs") and threading.current_thread().name.startswith("vmbackup-verify"):
            asked.add(name)
            while name.endswith(packs[-1].name) and not progress.cancelled:
                if progress.bytes_done >= sum(pack.stat().st_size for pack in packs[:-1]):
                    progress.cancel()
                time.sleep(0.001)
        return storage.storage.get(name, offset, length)

    storage.get = get  # type: ignore[method-assign]
    with opened(storage) as repository:
        with pytest.raises(Cancelled):
            verify(repository, data=True, state=state, progress=progress)
        assert state.exists() and not condemned(path)
        asked.clear()
        again = Progress()
        report = verify(repository, data=True, state=state, progress=again)
        assert report.resumed and not state.exists()
        assert len(asked) < len(packs) and report.packs == len(packs)
        assert again.bytes_done == again.bytes_total
        assert set(report.damaged_packs) == {victim.name for victim in victims}
        assert chunks_in(report) == unreadable(repository)
        # the state of another verification is none
        for other in ("", "{}", '{"version": 1, "scope": {}, "after": "zz", "damaged": {}}', "[" * 100_000):
            state.write_text(other)
            assert not verify(repository, data=True, state=state).resumed


def test_a_storage_that_fails_condemns_nothing(tmp_path: Path, path: Path) -> None:
    storage = FaultyStorage(LocalStorage(path), descriptors=False)
    with opened(storage) as repository:
        storage.always = ("get packs", StorageError("the network is down"))
        with pytest.raises(StorageError, match="the network is down"):
            verify(repository, data=True, state=tmp_path / "state")
    assert condemned(path) == set()


def test_a_bad_sector_is_damage(path: Path) -> None:
    """Reading it is EIO, as reading the unmapped first page of a process's memory is."""
    victim = packs_of(path)[0]
    storage = FaultyStorage(LocalStorage(path))

    def open_object(name: str) -> int | None:
        bad = name.endswith(victim.name) and threading.current_thread().name.startswith("vmbackup-verify")
        return os.open("/proc/self/mem", os.O_RDONLY) if bad else storage.storage.open(name)

    storage.open = open_object  # type: ignore[method-assign]
    with opened(storage) as repository:
        report = verify(repository, data=True)
    assert "Input/output error" in report.damaged_packs[victim.name]
    assert condemned(path) == {victim.name}


def test_the_rate_is_kept(path: Path) -> None:
    """A read waits for those before it, so all but the last one, which may be any pack, takes its time."""
    sizes = [pack.stat().st_size for pack in packs_of(path)]
    with reopen(path) as repository:
        began = time.monotonic()
        verify(repository, data=True, rate=sum(sizes) * 4)
        assert time.monotonic() - began > (sum(sizes) - max(sizes)) / (sum(sizes) * 4) > 0
        progress = Progress()
        caught: list[type[Exception]] = []

        def slow() -> None:
            try:
                verify(repository, data=True, rate=1, progress=progress)
            except Cancelled as error:
                caught.append(type(error))

        thread = threading.Thread(target=slow)
        thread.start()
        while progress.bytes_total == 0:
            assert thread.is_alive()
        progress.cancel()
        thread.join(10)
        assert caught == [Cancelled]


def test_packs_and_backups_that_go_meanwhile_are_no_damage(path: Path) -> None:
    """They were forgotten, and gc was there."""
    storage = FaultyStorage(LocalStorage(path), descriptors=False)
    done = threading.Event()

    def during(call: Callable[[], bytes]) -> bytes:
        if not done.is_set() and threading.current_thread().name.startswith("vmbackup-verify"):
            done.set()
            for name in objects(path):
                if name.startswith(("manifests", "packs")):
                    (path / name).unlink()
        return call()

    def get(name: str, offset: int = 0, length: int | None = None) -> bytes:
        return during(lambda: storage.storage.get(name, offset, length))

    storage.get = get  # type: ignore[method-assign]
    with opened(storage) as repository:
        report = verify(repository, data=True)
    assert report.damage == [] and report.condemned == [] and condemned(path) == set()


def test_what_gc_moves_meanwhile_is_no_damage(path: Path) -> None:
    """Everything is in new packs, and the old ones are gone, when the listing of packs has just been made."""
    old = {name for name in objects(path) if name.startswith(("packs", "indexes"))}
    moved = path.with_name("moved")
    shutil.copytree(path, moved)
    for name in old:
        if name.startswith("indexes"):
            (moved / name).unlink()
    with reopen(path) as repository:
        images = {
            f"{backup} {item.id}": repository.image(item.tree or "").read(0, item.size)
            for backup in ("backup-0", "backup-1")
            for item in repository.manifest(backup).volumes
        }
    for name in {name for name in objects(moved) if name.startswith("packs")}:
        (moved / name).unlink()
    with reopen(moved) as repository, repository.writer("all") as writer:
        for image in images.values():
            sink = writer.image(len(image))
            sink.write(0, image)
            sink.finish()
        writer.publish(manifest("all", config={"domain.xml": writer.blob(b"<domain/>" * 100)}))
    storage = FaultyStorage(LocalStorage(path), descriptors=False)
    listings = 0

    def listed(prefix: str, *, sizes: bool = True) -> Iterator[ObjectInfo]:
        nonlocal listings
        found = list(storage.storage.list(prefix))
        if prefix == "packs/":
            listings += 1
        if listings == 2:  # the first was that of rebuilding indexes
            listings += 1
            for name in old:
                (path / name).unlink()
            for name in objects(moved):
                if name.startswith(("packs", "indexes")):
                    (path / name).parent.mkdir(exist_ok=True)
                    shutil.copy(moved / name, path / name)
        yield from found

    storage.list = listed  # type: ignore[method-assign]
    with opened(storage) as repository:
        report = verify(repository)
    assert listings > 3
    assert report.damage == [] and report.damaged_packs == {} and condemned(path) == set()


def test_a_later_backup_heals(path: Path) -> None:
    """What a condemned pack held is stored again by the next backup that meets it; gc then removes the pack."""
    with reopen(path) as repository:
        images = {
            item.id: repository.image(item.tree or "").read(0, item.size)
            for item in repository.manifest("backup-2").volumes
        }
    for victim in packs_of(path):
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    with reopen(path) as repository:
        assert verify(repository, data=True).damage
        with repository.writer("heals") as writer:
            volumes = []
            for name, image in images.items():
                sink = writer.image(len(image))
                sink.write(0, image)
                volumes.append(volume(name, sink.finish(), len(image)))
            blob = writer.blob(b"<domain/>" * 100)
            writer.publish(manifest("heals", *volumes, config={"domain.xml": blob}))
        report = verify(repository, data=True)
        assert {item.backup for item in report.damage} <= {"backup-0"}  # what only it had is lost
        assert len(repository.verdicts.listed()) == 1  # nothing is condemned twice
        for backup in ("backup-1", "backup-2"):
            for item in repository.manifest(backup).volumes:
                assert repository.image(item.tree or "").read(0, item.size) == images[item.id]
        repository.forget(["backup-0"])
        repository.gc()
        after = verify(repository, data=True)
        assert after.sound and set(after.backups) == {"backup-1", "backup-2", "heals"}


def test_a_repository_that_cannot_be_written(path: Path) -> None:
    victim = packs_of_the_first(path)[0]
    data = bytearray(victim.read_bytes())
    data[200] ^= 1
    victim.write_bytes(data)
    storage = FaultyStorage(LocalStorage(path))
    with opened(storage) as repository:
        storage.always = ("put", StorageError("read-only file system"))
        report = verify(repository, data=True)
    assert report.damage and report.condemned == [] and report.not_condemned == "read-only file system"
