"""Repositories from outside: made, opened, written by several at once, listed, and repaired from their packs."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    SETTINGS,
    FaultyStorage,
    keys_of,
    make,
    manifest,
    objects,
    reference_image,
    reopen,
    sparse_image,
    store,
    volume,
)
from vmbackupd.errors import InvalidArgument, NotFound, RepositoryCorrupt, RepositoryMissing, StorageError
from vmbackupd.repository import LocalStorage, Repository
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.sessions import SESSIONS

pytestmark = pytest.mark.usefixtures("both_sorts")


def test_create_and_open(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "new")
    with pytest.raises(RepositoryMissing, match="repository init"):
        Repository.open(storage)
    storage.create()
    with pytest.raises(RepositoryMissing, match="repository init"):
        Repository.open(storage)
    with Repository.create(storage) as made:
        assert (made.header.chunk_size, made.backups()) == (65536, [])
        assert Repository.open(LocalStorage(tmp_path / "new")).id == made.id
    with pytest.raises(InvalidArgument, match="already"):
        Repository.create(LocalStorage(tmp_path / "new"))
    for size in (0, 4095, 4097, 2**23):
        with pytest.raises(InvalidArgument):
            Repository.create(LocalStorage(tmp_path / "other"), chunk_size=size)


def test_damaged_header(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / HEADER_NAME
    good = path.read_bytes()
    fields = json.loads(good)
    rng = random.Random(1)
    wrong = [good[:length] for length in range(0, len(good) - 2, 7)]
    wrong += [
        json.dumps({**fields, **change}).encode() for change in ({"chunk_size": 8192}, {"version": 2}, {"hash": 2})
    ]
    for _ in range(100):
        damaged = bytearray(good)
        damaged[rng.randrange(len(good) - 2)] ^= 1 << rng.randrange(8)
        wrong.append(bytes(damaged))
    for data in wrong:
        path.write_bytes(data)
        try:
            same = reopen(tmp_path).header  # white space may change
        except RepositoryCorrupt as reason:
            assert HEADER_NAME in str(reason) or "header was changed" in str(reason)
        else:
            assert json.loads(data) == fields
            assert same.id.hex() == fields["id"]
            assert same.encrypted or same.hash_key.hex() == fields["hash_key"]


def test_backups_and_blobs(tmp_path: Path) -> None:
    repository = make(tmp_path)
    image = sparse_image(random.Random(2), 100 * CHUNK)
    with repository.writer("one") as writer:
        blobs = {
            "domain.xml": writer.blob(b"<domain/>"),
            "nvram": writer.blob(bytes(70_000)),
            "empty": writer.blob(b""),
        }
        sink = writer.image(len(image))
        sink.write(0, image)
        tree = sink.finish()
        one = replace(manifest("one", volume("vda", tree, len(image))), config=blobs)
        writer.publish(one)
    for opened in (repository, reopen(tmp_path)):
        assert [summary.id for summary in opened.backups()] == ["one"]
        assert replace(opened.manifest("one"), writer="") == one
        assert opened.blob(blobs["domain.xml"]) == b"<domain/>"
        assert opened.blob(blobs["nvram"]) == bytes(70_000)
        assert opened.blob(blobs["empty"]) == b""
        assert opened.image(tree).read(0, len(image)) == image
    with pytest.raises(NotFound):
        repository.manifest("two")
    for bad in ("", "../one", "a/b", ".x"):
        with pytest.raises(InvalidArgument):
            repository.manifest(bad)
    info = repository.info()
    assert (info["backups"], info["packs"]) == (1, 1)


def test_a_backup_appears_with_its_manifest_only(tmp_path: Path) -> None:
    repository = make(tmp_path)
    writer = repository.writer("one")
    sink = writer.image(CHUNK)
    sink.write(0, b"x" * CHUNK)
    tree = sink.finish()
    assert reopen(tmp_path).backups() == []
    with pytest.raises(RepositoryCorrupt, match=tree):
        reopen(tmp_path).image(tree)
    writer.abort()
    writer.abort()
    assert objects(tmp_path) == {}
    with pytest.raises(InvalidArgument, match="ended"):
        writer.image(5)
    with pytest.raises(InvalidArgument, match="ended"):
        writer.publish(manifest("one"))


def test_refused_manifests(tmp_path: Path) -> None:
    repository = make(tmp_path)
    tree = store(repository, "one", b"x" * CHUNK)
    before = objects(tmp_path)
    for wrong, message in [
        (manifest("one", volume("vda", tree, CHUNK)), "made for backup two"),
        (manifest("two", volume("vda", "ab" * 32, CHUNK)), "neither of this writer nor"),
        (manifest("two", volume("vda", tree, CHUNK)), "neither of this writer nor"),  # nobody promised that it stays
        (replace(manifest("two"), freeze_ms=float("nan")), "manifest two"),
    ]:
        with repository.writer("two") as writer:
            writer.blob(b"something new")
            with pytest.raises(InvalidArgument, match=message):
                writer.publish(wrong)
        assert objects(tmp_path) == before
    for taken in ("one", "../two", ""):
        with pytest.raises(InvalidArgument, match="backup"):
            repository.writer(taken)
    assert objects(tmp_path) == before


def test_writers_at_once(tmp_path: Path) -> None:
    """Three writers of three repositories objects, images in threads of their own, content in common."""
    make(tmp_path)
    images = [sparse_image(random.Random(seed // 2), 400 * CHUNK) for seed in range(6)]
    trees: dict[int, str] = {}
    failures: list[BaseException] = []

    def backup(number: int) -> None:
        try:
            with reopen(tmp_path) as repository, repository.writer(f"backup-{number}") as writer:
                mine = [2 * number, 2 * number + 1]

                def one(index: int) -> None:
                    sink = writer.image(len(images[index]))
                    sink.write(0, images[index])
                    trees[index] = sink.finish()

                threads = [threading.Thread(target=one, args=(index,)) for index in mine]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                volumes = [volume(f"vd{index}", trees[index], len(images[index])) for index in mine]
                writer.publish(manifest(f"backup-{number}", *volumes))
        except BaseException as reason:
            failures.append(reason)

    writers = [threading.Thread(target=backup, args=(number,)) for number in range(3)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert not failures
    repository = reopen(tmp_path)
    assert [summary.error for summary in repository.backups()] == [None] * 3
    for index, image in enumerate(images):
        assert repository.image(trees[index]).read(0, len(image)) == image
        assert reference_image(repository, tmp_path, trees[index]) == image
    assert trees[0] == trees[1] != trees[2]


def test_many_chunks_leave_memory(tmp_path: Path) -> None:
    """Entries that no longer fit the table are searched in temporary index files, by dedup and by read-back."""
    rng = random.Random(3)
    settings = replace(SETTINGS, segment_entries=50, pack_size=40 * 1024)
    repository = make(tmp_path, settings=settings)
    image = rng.randbytes(700 * CHUNK)
    with repository.writer("one") as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        tree = sink.finish()
        again = writer.image(len(image))
        again.write(0, image)
        assert again.finish() == tree
        assert again.bytes_stored == 0
        assert writer.source(tree).read(0, len(image)) == image
        update = writer.update(tree)
        update.write(CHUNK * 333, bytes(CHUNK))
        other = update.finish()
        writer.publish(manifest("one", volume("vda", tree, len(image)), volume("vdb", other, len(image))))
    assert len(list((tmp_path / "indexes").iterdir())) > 10
    repository = reopen(tmp_path)
    assert repository.image(tree).read(0, len(image)) == image
    assert (
        repository.image(other).read(332 * CHUNK, 3 * CHUNK)
        == image[332 * CHUNK :][:CHUNK] + bytes(CHUNK) + image[334 * CHUNK :][:CHUNK]
    )
    assert reference_image(repository, tmp_path, tree) == image


def test_scattered_writes_leave_memory(tmp_path: Path) -> None:
    """More leaves than are kept in memory, each touched several times."""
    rng = random.Random(4)
    repository = make(tmp_path)
    count = 16 * 1500
    with repository.writer("one") as writer:
        sink = writer.image(count * CHUNK)
        content = {}
        for round_number in range(3):
            for _ in range(2500):
                index = rng.randrange(count)
                content[index] = bytes([round_number + 1, index & 255, index >> 8]) + bytes(CHUNK - 3)
                sink.write(index * CHUNK, content[index])
        tree = sink.finish()
        writer.publish(manifest("one", volume("vda", tree, count * CHUNK)))
    source = reopen(tmp_path).image(tree)
    assert all(source.read(index * CHUNK, CHUNK) == data for index, data in content.items())
    assert source.data_bytes() == len(content) * CHUNK


def test_lost_index_is_made_again(tmp_path: Path) -> None:
    rng = random.Random(5)
    repository = make(tmp_path)
    images = [sparse_image(rng, 100 * CHUNK) for _ in range(3)]
    trees = [store(repository, f"backup-{number}", image) for number, image in enumerate(images)]
    indexes = sorted((tmp_path / "indexes").iterdir())
    for change in ("lost", "truncated", "damaged block", "all lost"):
        victim = indexes[1]
        data = victim.read_bytes()
        if change == "lost":
            victim.unlink()
        elif change == "truncated":
            victim.write_bytes(data[:-100])
        elif change == "damaged block":
            victim.write_bytes(data[:64] + bytes(4096) + data[64 + 4096 :])
        else:
            for index in indexes:
                index.unlink(missing_ok=True)
        opened = reopen(tmp_path)
        for tree, image in zip(trees, images, strict=True):
            assert opened.image(tree).read(0, len(image)) == image
        assert opened.rebuild_index() == 0  # it was done
        for extra in set((tmp_path / "indexes").iterdir()) - set(indexes):
            extra.unlink()
        victim.write_bytes(data)


def test_index_is_made_from_a_pack_without_trailer(tmp_path: Path) -> None:
    repository = make(tmp_path)
    image = sparse_image(random.Random(6), 60 * CHUNK)
    tree = store(repository, "one", image)
    for index in (tmp_path / "indexes").iterdir():
        index.unlink()
    (pack,) = (tmp_path / "packs").glob("*/*")
    pack.write_bytes(pack.read_bytes()[:-40])
    assert reopen(tmp_path).image(tree).read(0, len(image)) == image


def test_rebuilt_index_leaves_out_writers_at_work(tmp_path: Path) -> None:
    repository = make(tmp_path)
    store(repository, "one", b"x" * CHUNK)
    with repository.writer("two") as writer:
        sink = writer.image(200 * CHUNK)
        sink.write(0, random.Random(7).randbytes(200 * CHUNK))  # several packs
        tree = sink.finish()
        assert len(repository.catalog.list_packs()) > 1
        for index in (tmp_path / "indexes").iterdir():
            index.unlink()
        assert reopen(tmp_path).rebuild_index() == 1
        writer.publish(manifest("two", volume("vda", tree, 200 * CHUNK)))
    assert reopen(tmp_path).rebuild_index() == 0


def test_unwritable_repository_is_still_read(tmp_path: Path) -> None:
    repository = make(tmp_path)
    image = sparse_image(random.Random(8), 60 * CHUNK)
    tree = store(repository, "one", image)
    for index in (tmp_path / "indexes").iterdir():
        index.unlink()
    storage = FaultyStorage(LocalStorage(tmp_path))
    storage.always = ("put", StorageError("read-only file system"))
    opened = Repository.open(storage, keys=keys_of(storage))
    assert opened.image(tree).read(0, len(image)) == image
    assert list((tmp_path / "indexes").iterdir()) == []


def test_storage_without_files(tmp_path: Path) -> None:
    repository = make(tmp_path)
    image = sparse_image(random.Random(9), 60 * CHUNK)
    tree = store(repository, "one", image)
    storage = FaultyStorage(LocalStorage(tmp_path), descriptors=False)
    opened = Repository.open(storage, settings=SETTINGS, keys=keys_of(storage))
    assert opened.image(tree).read(0, len(image)) == image
    second = store(opened, "two", image + b"x")
    assert opened.image(second).read(0, len(image) + 1) == image + b"x"


def test_foreign_objects_are_left_alone(tmp_path: Path) -> None:
    repository = make(tmp_path)
    tree = store(repository, "one", b"x" * CHUNK)
    for name in (
        "packs/README",
        "packs/zz/zz",
        "indexes/README",
        f"{SESSIONS}/README",
        "lost+found/x",
        "manifests/odd",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    opened = reopen(tmp_path)
    assert opened.image(tree).read(0, CHUNK) == b"x" * CHUNK
    assert [(summary.id, summary.error is None) for summary in opened.backups()] == [("odd", False), ("one", True)]
    store(opened, "two", b"y" * CHUNK)
    assert (tmp_path / "packs/README").exists()
