"""Whole repositories in a bucket of a real Ceph: two hosts, one set of chunks; what it costs in requests."""

from __future__ import annotations

import collections
import dataclasses
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.repository.repository_support import CHUNK, SETTINGS, manifest, sparse_image, volume
from tests.unit.repository.stores import Store, make_store
from vmbackupd.errors import BackupError, ObjectLocked, RepositoryMissing
from vmbackupd.repository import KeyFile, Repository
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header

SIZE = 150 * CHUNK


@pytest.fixture(params=["plain", "versioned", "locked"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with make_store(request.param, tmp_path, request) as made:
        yield made


@pytest.fixture
def plain(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with make_store("plain", tmp_path, request) as made:
        yield made


def make(place: Store) -> Repository:
    storage = place.open()
    assert storage.put_if_absent(HEADER_NAME, [Header.new(chunk_size=CHUNK, fanout=16).encode()])
    return Repository.open(storage, settings=SETTINGS)


def join(place: Store, **options: Any) -> Repository:
    """The same repository from another host: connections and a cache of its own."""
    return Repository.open(place.open(**options), settings=SETTINGS)


def back_up(repository: Repository, backup: str, image: bytes) -> tuple[str, int]:
    """Publish a backup of one image: its tree, and the bytes that were stored for it."""
    with repository.writer(backup) as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        tree = sink.finish()
        writer.publish(manifest(backup, volume("vda", tree, len(image))))
        return tree, writer.bytes_stored


def restored(repository: Repository, backup: str) -> bytes:
    record = repository.manifest(backup).volumes[0]
    return repository.image(record.tree or "").read(0, record.size)


def test_a_backup_made_on_one_host_is_restored_on_another(place: Store) -> None:
    image = sparse_image(random.Random(1), SIZE)
    with make(place) as one:
        back_up(one, "one", image)
    with join(place) as two:
        assert [summary.id for summary in two.backups()] == ["one"]
        assert restored(two, "one") == image


def test_two_hosts_share_their_chunks(place: Store) -> None:
    image = sparse_image(random.Random(2), SIZE)
    with make(place) as one, join(place) as two:
        _, first = back_up(one, "one", image)
        changed = bytearray(image)
        changed[: 3 * CHUNK] = random.Random(3).randbytes(3 * CHUNK)
        _, second = back_up(two, "two", bytes(changed))
        assert second < first / 5
        assert restored(one, "two") == bytes(changed)
        assert restored(two, "one") == image


def test_two_hosts_at_the_same_time(place: Store) -> None:
    make(place).close()
    images = {name: sparse_image(random.Random(name[-1]), SIZE) for name in ("host-a", "host-b")}
    failed: list[BaseException] = []

    def work(name: str) -> None:
        try:
            with join(place) as repository:
                back_up(repository, name, images[name])
                back_up(repository, f"{name}-again", images[name])
        except BaseException as reason:
            failed.append(reason)

    threads = [threading.Thread(target=work, args=(name,)) for name in images]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with join(place) as repository:
        assert {summary.id: summary.error for summary in repository.backups()} == {
            name + suffix: None for name in images for suffix in ("", "-again")
        }
        for name, image in images.items():
            assert restored(repository, name) == restored(repository, f"{name}-again") == image
        assert list(repository.storage.list("sessions/")) == list(repository.storage.list("leases/")) == []


def test_room_is_given_back_while_another_host_writes(place: Store) -> None:
    """What one host forgets and collects, the other's backup still has, though it was written at the same time."""
    images = [sparse_image(random.Random(seed), 60 * CHUNK) for seed in (11, 12)]
    with make(place) as one, join(place) as two:
        back_up(one, "old", images[0])
        with two.writer("new") as writer:
            sink = writer.image(len(images[0]))
            sink.write(0, images[0])  # its chunks are in the old backup's packs
            try:
                one.forget(["old"])
            except ObjectLocked:
                assert place.kind == "locked"
            one.gc()
            tree = sink.finish()
            writer.publish(manifest("new", volume("vda", tree, len(images[0]))))
        one.gc()
        assert restored(two, "new") == images[0]
        assert restored(one, "new") == images[0]
        if place.kind != "locked":
            assert [summary.id for summary in one.backups()] == ["new"]
            two.forget(["new"])
            two.gc()
            assert list(one.storage.list("packs/")) == []
        back_up(one, "last", images[1])
        assert restored(two, "last") == images[1]


def test_a_collection_renews_the_locks_of_what_backups_rely_on(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A new backup of an old disk relies on packs whose locks began long before its own."""
    with make_store("locked", tmp_path, request) as place, make(place) as repository:
        back_up(repository, "one", sparse_image(random.Random(13), 60 * CHUNK))
        assert repository.gc().locks_renewed == 0
        storage = repository.storage
        storage.objects.capabilities = dataclasses.replace(storage.objects.capabilities, lock_days=5.0)
        needed = {"repository.json", "manifests/one"} | {info.name for info in storage.list("packs/")}
        assert repository.gc().locks_renewed == len(needed)
        for name in needed:
            with pytest.raises(ObjectLocked) as caught:
                storage.delete(name)
            assert (caught.value.until or 0) - time.time() > 4 * 86400


def test_two_hosts_that_publish_the_same_id(plain: Store) -> None:
    """One of them has made the backup, the other is told that it has not."""
    make(plain).close()
    images = [sparse_image(random.Random(seed), 100 * CHUNK) for seed in (5, 6)]
    outcome: dict[int, BackupError | None] = {}
    start = threading.Barrier(2, timeout=60)

    def work(number: int) -> None:
        with join(plain) as repository:
            start.wait()
            try:
                back_up(repository, "same", images[number])
                outcome[number] = None
            except BackupError as reason:
                outcome[number] = reason

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, error in outcome.items() if error is None]
    assert len(winners) == 1
    with join(plain) as repository:
        assert restored(repository, "same") == images[winners[0]]


def test_an_encrypted_repository_in_a_bucket(place: Store) -> None:
    key = place.directory / "key"
    key.write_bytes(random.Random(7).randbytes(64))
    key.chmod(0o600)
    image = sparse_image(random.Random(8), 100 * CHUNK)
    with Repository.create(place.open(), chunk_size=CHUNK, settings=SETTINGS, keys=[KeyFile(key)]) as one:
        back_up(one, "one", image)
    with Repository.open(place.open(), keys=[KeyFile(key)]) as two:
        assert restored(two, "one") == image


def test_a_bucket_without_a_repository(plain: Store) -> None:
    with pytest.raises(RepositoryMissing, match="repository init"):
        Repository.open(plain.open())


# ---- requests


def requests_of(repository: Repository) -> collections.Counter[str]:
    """What this host has asked for so far."""
    return collections.Counter(repository.storage.client.requests)  # type: ignore[attr-defined]


def test_indexes_are_downloaded_once(plain: Store, tmp_path: Path) -> None:
    """With a cache a host that opens the repository again reads no index, however many there are."""
    image = sparse_image(random.Random(9), 50 * CHUNK)
    with make(plain) as one:
        for number in range(6):
            part = random.Random(number).randbytes(5 * CHUNK)
            back_up(one, f"backup-{number}", part + image[len(part) :])
        indexes = len(list(one.storage.list("indexes/")))
    assert indexes >= 1
    cache = tmp_path / "cache"
    with join(plain, cache_directory=cache) as first:
        opening = requests_of(first)
        assert restored(first, "backup-0")[5 * CHUNK :] == image[5 * CHUNK :]
    assert len([path for path in cache.rglob("*") if path.is_file()]) == indexes
    with join(plain, cache_directory=cache) as again:
        cheap = requests_of(again)
        assert restored(again, "backup-5")[5 * CHUNK :] == image[5 * CHUNK :]
    assert opening["get_object"] - cheap["get_object"] == indexes
    # versioning, capabilities, header, one list of indexes
    assert sum(cheap.values()) <= 6
    assert (cache.stat().st_mode & 0o077) == 0


def test_a_backup_without_news_costs_a_bounded_number_of_requests(plain: Store, tmp_path: Path) -> None:
    """However large the image and however many backups there are: no request for each chunk or each backup."""
    image = sparse_image(random.Random(10), 1000 * CHUNK)
    cache = tmp_path / "cache"
    with make(plain) as one:
        for number in range(4):
            back_up(one, f"backup-{number}", image)
    costs = []
    for number in range(2):
        with join(plain, cache_directory=cache) as host:
            before = requests_of(host)
            back_up(host, f"more-{number}", image)
            costs.append(sum((requests_of(host) - before).values()))
    assert max(costs) <= 40, costs
