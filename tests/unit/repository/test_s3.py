"""What only an object store has: leases, versions, object locks, uploads in parts, a cache, and places by URL."""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.unit.repository.stores import Store, make_store
from vmbackupd.errors import InvalidArgument, ObjectLocked, StorageError, StorageUnsuitable
from vmbackupd.repository import LocalStorage, S3Options, storage_from_url
from vmbackupd.repository.s3 import S3Storage
from vmbackupd.repository.s3client import Body
from vmbackupd.repository.s3objects import DAY, PlainObjects, VersionedObjects

MIB = 2**20


@pytest.fixture(scope="module", params=["plain", "versioned", "locked"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with make_store(request.param, tmp_path_factory.mktemp(request.param), request) as made:
        yield made


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with make_store("plain", tmp_path_factory.mktemp("plain"), request) as made:
        yield made


@pytest.fixture(scope="module")
def locked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with make_store("locked", tmp_path_factory.mktemp("locked"), request) as made:
        yield made


def fresh(directory: str) -> str:
    return f"{directory}/{secrets.token_hex(12)}"


def pack() -> str:
    return f"packs/ab/{secrets.token_hex(16)}"


def until(done: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.05)


# ---- places


def test_urls(tmp_path: Path) -> None:
    for url in (str(tmp_path), f"file://{tmp_path}", f"file://localhost{tmp_path}"):
        storage = storage_from_url(url)
        assert isinstance(storage, LocalStorage)
        assert storage.place == str(tmp_path)
    for url, place in [("s3://bucket", "s3://bucket"), ("s3://bucket/a/b/", "s3://bucket/a/b")]:
        storage = storage_from_url(url, S3Options(endpoint="http://127.0.0.1:1"))
        assert storage.place == place
        storage.close()
    for url in (
        "",
        "relative/path",
        "http://x/y",
        "s3://",
        "s3:///x",
        "s3://user@bucket/x",
        "file://host/x",
        "s3://b/a//b",
    ):
        with pytest.raises(InvalidArgument):
            storage_from_url(url)


def test_options_out_of_bounds() -> None:
    wrong: list[dict[str, Any]] = [
        {"timeout": 0},
        {"attempts": 0},
        {"part_size": 1},
        {"lock_mode": "x"},
        {"addressing": "x"},
        {"lock_days": -1},
    ]
    for options in wrong:
        with pytest.raises(InvalidArgument, match=next(iter(options))):
            S3Options(**options)


def test_options_that_boto3_refuses(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    for options in ({"endpoint": "no url"}, {"profile": "nobody", "credentials_file": empty}):
        with pytest.raises(InvalidArgument, match="s3://bucket"):
            S3Storage("bucket", "", S3Options(**options))


def test_a_body_is_read_like_a_file() -> None:
    rng = random.Random(1)
    parts = [rng.randbytes(rng.randrange(50)) for _ in range(20)]
    whole, body = b"".join(parts), Body(parts)
    assert len(body) == len(whole)
    for _ in range(200):
        at, amount = rng.randrange(len(whole) + 1), rng.randrange(-1, 100)
        assert body.seek(at) == at
        expected = whole[at:] if amount < 0 else whole[at : at + amount]
        assert body.read(amount) == expected
        assert body.tell() == at + len(expected)
    assert body.seek(0, 2) == len(whole)
    assert body.read() == b""
    body.deadline = 0
    with pytest.raises(TimeoutError):
        body.read()


# ---- what a bucket must be


def test_a_bucket_that_does_not_exist(plain: Store) -> None:
    with pytest.raises(StorageError, match="no bucket"):
        S3Storage("does-not-exist", "", plain.options()).create()


def test_a_bucket_whose_versioning_is_suspended(plain: Store) -> None:
    assert plain.ceph is not None
    bucket = plain.ceph.make_bucket("versioned")
    client = plain.ceph.client()
    client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Suspended"})
    client.close()
    with pytest.raises(StorageUnsuitable, match="suspended"):
        S3Storage(bucket, "", plain.options()).create()


def test_locks_are_refused_where_there_are_none(plain: Store) -> None:
    with pytest.raises(StorageUnsuitable, match="no object lock"):
        S3Storage(plain.bucket, "elsewhere", plain.options(lock_days=3)).create()


def test_a_store_that_ignores_the_condition_is_refused(plain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = plain.open()
    honest = storage.client.call

    def forgetful(*words: Any, headers: object = None, **more: Any) -> Any:
        return honest(*words, **more)

    monkeypatch.setattr(storage.client, "call", forgetful)
    with pytest.raises(StorageUnsuitable, match="ignores If-None-Match"):
        storage.create()


def test_versioning_that_is_switched_on_later(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A host that has the bucket open notices when it writes; one that opens it afterwards goes by versions."""
    with make_store("plain", tmp_path, request) as place:
        before = place.open()
        assert before.put_if_absent("manifests/old", [b"old"])
        assert place.ceph is not None
        client = place.ceph.client()
        client.put_bucket_versioning(Bucket=place.bucket, VersioningConfiguration={"Status": "Enabled"})
        client.close()
        with pytest.raises(StorageError, match="switched on"):
            before.put_if_absent("manifests/new", [b"new"])
        after = place.open()
        assert isinstance(after.objects, VersionedObjects)
        assert after.get("manifests/old") == b"old"
        assert not after.put_if_absent("manifests/old", [b"other"])
        assert after.delete("manifests/old")
        assert after.put_if_absent("manifests/old", [b"again"])


# ---- uploads in parts


def test_large_objects_go_in_parts(each: Store) -> None:
    storage = each.open(multipart_threshold=5 * MIB, part_size=5 * MIB)
    data = random.Random(2).randbytes(12 * MIB + 7)
    name = pack()
    assert storage.put_if_absent(name, [data[:MIB], data[MIB:]])
    assert storage.client.requests["upload_part"] == 3
    assert storage.get(name, 5 * MIB - 3, 6) == data[5 * MIB - 3 : 5 * MIB + 3]
    assert storage.get(name) == data
    assert storage.stat(name).size == len(data)
    if each.kind == "locked":
        with pytest.raises(ObjectLocked):
            storage.delete(name)


def test_large_objects_with_names_of_their_own_are_exclusive_too(each: Store) -> None:
    """Where the store ignores the condition on uploads in parts, only names that nobody else uses go in parts."""
    storage = each.open(multipart_threshold=5 * MIB, part_size=5 * MIB)
    data, name = bytes(6 * MIB), fresh("waits")
    assert storage.put_if_absent(name, [data])
    assert not storage.put_if_absent(name, [data + b"x"])
    parts = storage.client.requests["upload_part"]
    assert parts == 0 or not isinstance(storage.objects, PlainObjects) or storage.capabilities.conditional_parts
    assert storage.stat(name).size == len(data)


def test_an_upload_that_fails_in_the_middle_leaves_nothing(plain: Store) -> None:
    storage = plain.open(multipart_threshold=5 * MIB, part_size=5 * MIB)
    name = pack()

    def parts() -> Iterator[bytes]:
        yield bytes(11 * MIB)
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError):
        storage.put_if_absent(name, parts())
    assert storage.stat(name) is None
    assert list(storage._uploads()) == []


def test_abandoned_uploads_are_removed_and_young_ones_are_not(plain: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = plain.open()
    storage.client.call("create_multipart_upload", "x", Key=f"{plain.prefix}/packs/ab/left")
    assert storage.remove_temporaries() == 0
    now = storage.client.server_time
    monkeypatch.setattr(storage.client, "server_time", lambda: now() + 2 * DAY)
    assert storage.remove_temporaries() == 1
    assert list(storage._uploads()) == []


# ---- leases


@pytest.fixture
def leases(each: Store) -> Iterator[tuple[Any, Any]]:
    """Two hosts that believe in leases of two seconds."""
    hosts = each.open(), each.open()
    for host in hosts:
        host.objects.capabilities = dataclasses.replace(host.objects.capabilities, lease_seconds=2)
    yield hosts


def test_a_lease_is_renewed(leases: tuple[Any, Any]) -> None:
    mine, theirs = leases
    name = fresh("sessions")
    claim = mine.claim(name, b"me")
    puts = mine.client.requests["put_object"]
    until(lambda: mine.client.requests["put_object"] >= puts + 3)
    assert not claim.lost
    assert not theirs.abandoned(name)
    assert theirs.get(name) == b"me"
    claim.release()
    assert theirs.stat(name) is None
    assert list(theirs.list("leases/")) == []


def test_a_claim_whose_maker_is_gone_runs_out(leases: tuple[Any, Any]) -> None:
    mine, theirs = leases
    name = fresh("sessions")
    claim = mine.claim(name, b"me")
    claim._stop.set()  # as if killed: nothing is renewed, nothing removed
    assert not theirs.abandoned(name)
    until(lambda: theirs.abandoned(name))
    assert claim.lost
    assert theirs.delete(name)
    assert not theirs.abandoned(name)


def test_a_holder_that_cannot_renew_knows_it_before_others_do(
    leases: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = leases
    name = fresh("sessions")
    claim = mine.claim(name, b"me")

    def fail(*_: object) -> None:
        raise StorageError("no connection")

    with monkeypatch.context() as patch:
        patch.setattr(mine.objects, "touch", fail)
        until(lambda: claim.lost or theirs.abandoned(name))
        assert claim.lost
        until(lambda: theirs.abandoned(name))
    claim.release()
    assert theirs.stat(name) is None


def test_leases_without_a_claim_are_removed(leases: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = leases
    name = fresh("sessions")
    mine.objects.touch(f"leases/{name}", b"x", None)
    assert mine.remove_temporaries() == 0
    now = theirs.client.server_time
    monkeypatch.setattr(theirs.client, "server_time", lambda: now() + 3600)
    assert theirs.remove_temporaries() == 1
    assert list(mine.list("leases/")) == []


# ---- versions: only the first one counts


def test_a_later_version_replaces_nothing(locked: Store) -> None:
    """Whoever steals a host's keys can put versions and delete markers on top; the backups stay as they were."""
    storage = locked.open()
    name = fresh("manifests")
    storage.put_if_absent(name, [b"backup"])
    assert locked.ceph is not None
    client, key = locked.ceph.client(), f"{locked.prefix}/{name}"
    client.put_object(Bucket=locked.bucket, Key=key, Body=b"ransom")
    client.delete_object(Bucket=locked.bucket, Key=key)
    client.put_object(Bucket=locked.bucket, Key=key, Body=b"ransom")
    client.close()
    for host in (storage, locked.open()):
        assert host.get(name) == b"backup"
        assert host.stat(name).size == 6
        assert [info.size for info in host.list(name)] == [6]
        assert not host.put_if_absent(name, [b"other"])


def test_a_lock_that_has_run_out_lets_go(locked: Store) -> None:
    storage = locked.open()
    storage.objects.capabilities = dataclasses.replace(storage.capabilities, lock_days=4 / DAY)
    name = fresh("manifests")
    storage.put_if_absent(name, [b"backup"])
    with pytest.raises(ObjectLocked) as caught:
        storage.delete(name)
    assert caught.value.until is not None

    def deleted() -> bool:
        try:
            return bool(storage.delete(name))
        except ObjectLocked:
            return False

    until(deleted)
    assert storage.stat(name) is None
    assert locked.ceph is not None
    assert locked.ceph.versions(locked.bucket, f"{locked.prefix}/{name}") == ([], [])


def test_locks_are_renewed_when_half_of_their_time_is_over(locked: Store) -> None:
    storage = locked.open()
    name = pack()
    storage.put_if_absent(name, [b"pack"])
    assert storage.renew([name, pack()]) == 0
    storage.objects.capabilities = dataclasses.replace(storage.capabilities, lock_days=5.0)
    assert storage.renew([name]) == 1
    assert storage.renew([name]) == 0
    with pytest.raises(ObjectLocked) as caught:
        storage.delete(name)
    left = datetime.fromtimestamp(caught.value.until or 0, UTC) - datetime.now(UTC)
    assert left > timedelta(days=4)


def test_a_bucket_that_locks_by_itself_lets_sessions_go(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    with make_store("retaining", tmp_path, request) as place:
        storage = place.open()
        assert storage.capabilities.lock_days == 1
        claim = storage.claim(fresh("sessions"), b"who")
        claim.release()
        assert list(storage.list("sessions/")) == []
        name = fresh("manifests")
        storage.put_if_absent(name, [b"backup"])
        with pytest.raises(ObjectLocked, match="until 20"):
            storage.delete(name)


# ---- the cache


def test_the_cache_is_shared_and_follows_the_list(plain: Store, tmp_path: Path) -> None:
    one, two = plain.open(cache_directory=tmp_path), plain.open(cache_directory=tmp_path)
    name = f"indexes/{secrets.token_hex(16)}"
    one.put_if_absent(name, [b"index"])
    gets = two.client.requests["get_object"]
    for storage in (one, two, two):
        descriptor = storage.open(name)
        assert os.pread(descriptor, 10, 0) == b"index"
        os.close(descriptor)
    assert two.client.requests["get_object"] == gets
    copy = next(path for path in tmp_path.rglob("*") if path.is_file())
    assert copy.stat().st_mode & 0o077 == 0
    plain.open().delete(name)  # a host with another cache
    list(two.list("indexes/"))
    assert copy.exists()  # young: the list may be older than it
    os.utime(copy, (1, 1))
    list(two.list("indexes/"))
    assert not copy.exists()


def test_without_a_cache_nothing_stays(plain: Store, tmp_path: Path) -> None:
    storage = plain.open()
    name = f"indexes/{secrets.token_hex(16)}"
    storage.put_if_absent(name, [b"index"])
    descriptor = storage.open(name)
    assert os.pread(descriptor, 10, 0) == b"index"
    assert os.fstat(descriptor).st_nlink == 0
    os.close(descriptor)
    assert storage.open(pack()) is None


def test_a_cache_that_cannot_be_written(plain: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    storage = plain.open(cache_directory=tmp_path / "file")
    name = f"indexes/{secrets.token_hex(16)}"
    storage.put_if_absent(name, [b"index"])
    with pytest.raises(StorageError, match="cache"):
        storage.open(name)
