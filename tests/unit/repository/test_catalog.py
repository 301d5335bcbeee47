"""Index files are merged, rewritten, made again: every chunk stays known, nothing is told of packs that are gone."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    FaultyStorage,
    make,
    manifest,
    objects,
    reopen,
    sparse_image,
    store,
    volume,
)
from vmbackupd.engine.index import IndexSet
from vmbackupd.errors import ObjectLocked, RepositoryFull, StorageError
from vmbackupd.repository import LocalStorage, Repository
from vmbackupd.repository.catalog import INDEXES, MOST_FILES, MOST_KEPT, PACKS, Catalog, kept_files, pack_name
from vmbackupd.repository.sessions import SESSIONS

Places = dict[bytes, set[tuple[bytes, int, int, int, int]]]


def filled(path: Path, count: int, *, copies: bool = False) -> list[tuple[str, bytes]]:
    """(tree, image) of ``count`` backups, each with an index of its own; ``copies``: some chunks are stored twice."""
    rng = random.Random(count)
    repository = make(path)
    repository.catalog.merge_soon = lambda: None  # type: ignore[method-assign]
    made = []
    for number in range(count):
        image = sparse_image(rng, (20 + 10 * (number % 3)) * CHUNK)
        with repository.writer(f"backup-{number}") as early:
            if copies and number % 2:
                made.append((store(repository, f"copy-{number}", image), image))
            sink = early.image(len(image))
            sink.write(0, image)
            made.append((sink.finish(), image))
            early.publish(manifest(f"backup-{number}", volume("vda", made[-1][0], len(image))))
    repository.close()
    return made


def places(repository: Repository, index: IndexSet) -> Places:
    """Every record of every pack, as far as ``index`` knows it."""
    found: Places = {}
    for pack_id, size in repository.catalog.list_packs().items():
        entries, _ = repository.catalog.read_pack_entries(pack_id, size)
        for at in range(0, len(entries), 48):
            name = entries[at : at + 32]
            found[name] = set(index.copies(name))
    return found


def index_files(path: Path) -> list[str]:
    return sorted(name for name in objects(path) if name.startswith(f"{INDEXES}/"))


def read_all(path: Path, made: list[tuple[str, bytes]]) -> None:
    with reopen(path) as repository:
        for tree, image in made:
            assert repository.image(tree).read(0, len(image)) == image


def test_merge_keeps_every_copy(tmp_path: Path) -> None:
    made = filled(tmp_path, 12, copies=True)
    with reopen(tmp_path) as repository, reopen(tmp_path) as other:
        before = places(repository, repository.catalog.current)
        assert any(len(where) > 1 for where in before.values())
        assert all(where for where in before.values())
        merged = repository.catalog.merge()
        assert merged > MOST_KEPT
        assert len(repository.catalog.current.files) <= MOST_FILES
        assert places(repository, repository.catalog.current) == before
        # who had opened the files before has them still, and finds the new one when looking again
        assert places(other, other.catalog.current) == before
        assert places(other, other.catalog.refresh()) == before
        assert repository.catalog.merge() == 0
    read_all(tmp_path, made)


def test_number_of_files_stays_small(tmp_path: Path) -> None:
    """Commit after commit, merged in the background."""
    with make(tmp_path) as repository:
        rng = random.Random(1)
        for number in range(3 * MOST_FILES):
            store(repository, f"backup-{number}", rng.randbytes(3 * CHUNK))
            merger = repository.catalog._merger
            if merger is not None:
                merger.join()
            assert len(index_files(tmp_path)) <= MOST_FILES
    assert not [thread for thread in threading.enumerate() if thread.name == "vmbackup-merge"]


@pytest.mark.parametrize(
    ("counts", "kept"),
    [
        ([], 0),
        ([5] * MOST_FILES, MOST_FILES),
        ([5] * (MOST_FILES + 1), 0),
        ([1000] + [5] * MOST_FILES, 1),
        ([1000, 100] + [5] * MOST_FILES, 2),
        ([1000, 900] + [5] * MOST_FILES, 0),
        ([3**number for number in range(20, 0, -1)], MOST_KEPT),
    ],
)
def test_what_a_merge_leaves_alone(counts: list[int], kept: int) -> None:
    assert kept_files(counts) == kept


def test_merging_costs_little() -> None:
    """Over 1000 commits each entry is written few times, and the number of files stays bounded."""
    rng = random.Random(1)
    files: list[int] = []
    written = added = 0
    for _ in range(1000):
        files = sorted([*files, rng.randrange(1, 200)], reverse=True)
        added += files[-1]
        kept = kept_files(files)
        if len(files) - kept > 1:
            files, rest = files[:kept], files[kept:]
            files = sorted([*files, sum(rest)], reverse=True)
            written += sum(rest)
        assert len(files) <= MOST_FILES
    assert written < 10 * sum(files)


def test_merge_drops_what_is_gone(tmp_path: Path) -> None:
    filled(tmp_path, 10)
    with reopen(tmp_path) as repository:
        before = places(repository, repository.catalog.current)
        gone = set(random.Random(1).sample(sorted(repository.catalog.list_packs()), 3))
        for pack_id in gone:
            (tmp_path / pack_name(pack_id)).unlink()
        assert repository.catalog.merge() > 0
        assert repository.catalog.covered() == repository.catalog.list_packs().keys()
        after = {name: repository.catalog.current.copies(name) for name in before}
        assert {name: set(where) for name, where in after.items()} == {
            name: {one for one in where if one[0] not in gone} for name, where in before.items()
        }


def test_only_files_that_tell_of_packs_that_are_gone_are_replaced(tmp_path: Path) -> None:
    filled(tmp_path, 6)
    with reopen(tmp_path) as repository:
        before = places(repository, repository.catalog.current)
        files = index_files(tmp_path)
        packs = sorted(repository.catalog.list_packs())
        told = [set(file.pack_ids()) for file in repository.catalog.current.files]
        assert repository.catalog.drop_gone() == 0
        gone = {packs[0], *max(told, key=len)}
        for pack_id in gone:
            (tmp_path / pack_name(pack_id)).unlink()
        assert repository.catalog.drop_gone() == sum(not own.isdisjoint(gone) for own in told)
        assert repository.catalog.covered() == set(packs) - gone
        after = {name: set(repository.catalog.current.copies(name)) for name in before}
        assert after == {name: {one for one in where if one[0] not in gone} for name, where in before.items()}
        assert repository.catalog.drop_gone() == 0
        kept = index_files(tmp_path)
        for pack_id in repository.catalog.list_packs():
            (tmp_path / pack_name(pack_id)).unlink()
        assert repository.catalog.drop_gone() == len(kept)
        assert index_files(tmp_path) == []
        assert set(kept) & set(files)


def test_damaged_blocks_are_never_merged_away(tmp_path: Path) -> None:
    made = filled(tmp_path, 10)
    victim = tmp_path / index_files(tmp_path)[3]
    data = bytearray(victim.read_bytes())
    data[100] ^= 1
    victim.write_bytes(data)
    with reopen(tmp_path) as repository:
        packs = repository.catalog.list_packs().keys()
        assert repository.catalog.merge() == 0  # it finds the damage
        assert victim.exists()
        repository.catalog.merge()
        assert victim.exists()
        (tmp_path / PACKS).rename(tmp_path / "aside")
        (tmp_path / PACKS).mkdir()
        assert repository.catalog.drop_gone() > 0
        assert index_files(tmp_path) == [victim.relative_to(tmp_path).as_posix()]
        (tmp_path / PACKS).rmdir()
        (tmp_path / "aside").rename(tmp_path / PACKS)
        assert repository.catalog.covered() <= packs
        repository.rebuild_index()
        assert not victim.exists()  # all it could tell is told by others now
        assert repository.catalog.covered() == packs
    read_all(tmp_path, made)


def test_an_index_that_cannot_be_opened_goes_when_it_is_replaced(tmp_path: Path) -> None:
    made = filled(tmp_path, 3)
    victim = tmp_path / index_files(tmp_path)[0]
    victim.write_bytes(b"VMBKINDX")
    with reopen(tmp_path) as repository:
        assert repository.catalog.damaged == frozenset()
        assert not victim.exists()
    read_all(tmp_path, made)


def test_rebuild_leaves_condemned_packs_and_those_of_living_writers(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    for name in index_files(tmp_path):
        (tmp_path / name).unlink()
    with reopen(tmp_path) as repository:
        order = []

        class Storage:
            def __getattr__(self, name: str) -> object:
                return getattr(repository.storage, name)

            def list(self, prefix: str, *, sizes: bool = True) -> object:
                order.append(prefix)
                return repository.storage.list(prefix, sizes=sizes)

        catalog = Catalog(Storage(), repository.header)  # type: ignore[arg-type]
        packs = sorted(repository.catalog.list_packs())
        condemned, living = packs[0], packs[-1][:12]

        def sessions():
            order.append("sessions")
            yield living

        def condemnations():
            order.append("condemned")
            yield condemned

        made = catalog.rebuild(sessions(), condemnations())
        wanted = {pack_id for pack_id in packs if pack_id != condemned and pack_id[:12] != living}
        assert made == len(wanted)
        assert catalog.covered() == wanted
        assert [name for number, name in enumerate(order) if name not in order[:number]] == [
            "packs/",
            "sessions",
            "indexes/",
            "condemned",
        ]


def test_a_pack_that_cannot_be_read_hides_no_other(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    for name in index_files(tmp_path):
        (tmp_path / name).unlink()
    storage = FaultyStorage(LocalStorage(tmp_path))
    repository = Repository.open(storage)
    packs = sorted(repository.catalog.list_packs())
    storage.always = (f"get {pack_name(packs[1])}", StorageError("bad sector"))
    assert repository.rebuild_index() == len(packs) - 1
    assert repository.catalog.covered() == set(packs) - {packs[1]}
    for name in index_files(tmp_path):
        (tmp_path / name).unlink()
    repository.catalog.refresh()
    storage.always = ("get packs/", StorageError("gone"))
    with pytest.raises(StorageError, match="gone"):
        repository.rebuild_index()
    storage.always = None
    assert repository.rebuild_index() == len(packs)
    repository.close()


def test_a_merge_that_fails_leaves_everything(tmp_path: Path) -> None:
    filled(tmp_path, 10)
    storage = FaultyStorage(LocalStorage(tmp_path))
    repository = Repository.open(storage)
    before = objects(tmp_path)
    storage.always = ("put indexes/", RepositoryFull("full"))
    with pytest.raises(RepositoryFull):
        repository.catalog.merge()
    assert objects(tmp_path) == before
    storage.always = None
    storage.put_if_absent = lambda name, parts: True  # type: ignore[method-assign]  # one that lies
    with pytest.raises(StorageError, match="not there"):
        repository.catalog.merge()
    assert objects(tmp_path) == before
    assert repository.catalog.merge(lambda: True) == 0
    assert objects(tmp_path) == before


def test_a_merged_file_that_cannot_be_removed(tmp_path: Path) -> None:
    """It stays, which hurts nobody, and goes with the next merge."""
    made = filled(tmp_path, 10)
    storage = FaultyStorage(LocalStorage(tmp_path))
    repository = Repository.open(storage)
    wanted = places(repository, repository.catalog.current)
    stays = index_files(tmp_path)[4]
    storage.always = (f"delete {stays}", ObjectLocked("locked"))
    assert repository.catalog.merge() == 10
    assert len(index_files(tmp_path)) == 2
    assert stays in index_files(tmp_path)
    assert places(repository, repository.catalog.current).keys() == wanted.keys()
    storage.always = None
    repository.catalog._replace(list(repository.catalog.current.files), repository.catalog.pack_ids(), None)
    assert places(repository, repository.catalog.current) == wanted
    repository.close()
    read_all(tmp_path, made)


def test_mergers_on_two_hosts(tmp_path: Path) -> None:
    """Both at once, many times: nothing is forgotten."""
    made = filled(tmp_path, 20, copies=True)
    with reopen(tmp_path) as one, reopen(tmp_path) as two:
        wanted = places(one, one.catalog.current)
        errors: list[BaseException] = []

        def work(repository: Repository, seed: int) -> None:
            rng = random.Random(seed)
            try:
                for _ in range(10):
                    files = list(repository.catalog.refresh().files)
                    chosen = rng.sample(files, rng.randrange(1, len(files) + 1))
                    repository.catalog._replace(chosen, repository.catalog.pack_ids(), None)
                    assert places(repository, repository.catalog.refresh()) == wanted
            except BaseException as reason:
                errors.append(reason)

        threads = [threading.Thread(target=work, args=(one, 1)), threading.Thread(target=work, args=(two, 2))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
    read_all(tmp_path, made)


def test_a_listing_that_misses_files_that_are_being_replaced(tmp_path: Path) -> None:
    """As a directory's may that is read while files come and go: the catalog looks again."""
    filled(tmp_path, 3)
    storage = FaultyStorage(LocalStorage(tmp_path))
    repository = Repository.open(storage)
    listed = storage.list
    answers = [iter(())]
    storage.list = lambda prefix: answers.pop() if answers and prefix == "indexes/" else listed(prefix)  # type: ignore
    assert len(repository.catalog.refresh().files) == 3


def test_a_writer_whose_index_was_merged_and_removed_keeps_its_packs(tmp_path: Path) -> None:
    """It fails after its index was visible: another writer may have built on its packs meanwhile."""
    repository = make(tmp_path)
    other = reopen(tmp_path)
    image = random.Random(1).randbytes(40 * CHUNK)
    writer = repository.writer("one")
    sink = writer.image(len(image))
    sink.write(0, image)
    tree = sink.finish()
    put = repository.storage.put_if_absent

    def put_or_fail(name: str, parts: object) -> bool:
        if not name.startswith("manifests/"):
            return put(name, parts)  # type: ignore[arg-type]
        other.catalog._replace(list(other.catalog.refresh().files), other.catalog.pack_ids(), None)
        store(other, "other", image)
        raise StorageError("gone")

    repository.storage.put_if_absent = put_or_fail  # type: ignore[method-assign]
    with pytest.raises(StorageError), writer:
        writer.publish(manifest("one", volume("vda", tree, len(image))))
    del repository.storage.put_if_absent
    assert not [name for name in objects(tmp_path) if name.startswith(SESSIONS)]
    read_all(tmp_path, [(tree, image)])
    other.close()
    repository.close()
