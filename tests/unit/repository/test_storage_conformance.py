"""What every storage promises, whatever it is made of: one suite for a directory and for each kind of bucket."""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.repository.stores import KINDS, Store, make_store
from vmbackupd.errors import ObjectLocked, RepositoryMissing, StorageError
from vmbackupd.repository import ObjectInfo, Repository, storage_from_url

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A place shared by the tests of a kind: each uses names of its own."""
    with make_store(request.param, tmp_path_factory.mktemp(request.param), request) as made:
        yield made


@pytest.fixture(scope="module")
def storage(store: Store) -> Any:
    return store.open()


@pytest.fixture(scope="module")
def other(store: Store) -> Any:
    """The same place as another host sees it."""
    return store.open()


def fresh(directory: str = "waits") -> str:
    """A name that no other test uses, of an object that a bucket with a default retention lets go soon."""
    return f"{directory}/{secrets.token_hex(12)}"


def names(storage: Any, prefix: str) -> set[str]:
    return {info.name for info in storage.list(prefix)}


def test_an_object_is_what_was_put(storage: Any) -> None:
    name = fresh()
    assert storage.put_if_absent(name, [b"one", bytearray(b"two"), memoryview(b"three")])
    assert storage.get(name) == b"onetwothree"
    assert storage.stat(name) == ObjectInfo(name, 11)
    assert list(storage.list(name)) == [ObjectInfo(name, 11)]


def test_a_name_is_taken_once(storage: Any) -> None:
    name = fresh()
    assert storage.put_if_absent(name, [b"first"])
    assert not storage.put_if_absent(name, [b"second"])
    assert not storage.put_if_absent(name, [b"first"])
    assert storage.get(name) == b"first"


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, None, b"0123456789"),
        (3, None, b"3456789"),
        (0, 4, b"0123"),
        (3, 4, b"3456"),
        (8, 100, b"89"),
        (10, 5, b""),
        (10, None, b""),
        (1000, 5, b""),
        (1000, None, b""),
        (4, 0, b""),
    ],
)
def test_ranges(storage: Any, offset: int, length: int | None, expected: bytes) -> None:
    storage.put_if_absent("waits/digits", [b"0123456789"])
    assert storage.get("waits/digits", offset, length) == expected


def test_an_empty_object(storage: Any) -> None:
    name = fresh()
    assert storage.put_if_absent(name, [])
    assert not storage.put_if_absent(name, [b"x"])
    assert storage.get(name) == storage.get(name, 0, 10) == storage.get(name, 5) == b""
    assert storage.stat(name) == ObjectInfo(name, 0)


def test_what_is_not_there(storage: Any) -> None:
    name = fresh()
    for get in (lambda: storage.get(name), lambda: storage.get(name, 1, 2), lambda: storage.get(name, 0, 0)):
        with pytest.raises(FileNotFoundError):
            get()
    assert storage.stat(name) is None
    assert not storage.delete(name)
    assert list(storage.list("nothing/")) == []
    assert not storage.abandoned(name)


def test_bytes_of_every_value_and_many_parts(storage: Any) -> None:
    rng = random.Random(3)
    data = rng.randbytes(3_000_001)
    cuts = sorted(rng.sample(range(len(data)), 50))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    buffer = bytearray(100_000)

    def reused() -> Iterator[memoryview]:
        for part in parts:
            for at in range(0, len(part), len(buffer)):
                piece = part[at : at + len(buffer)]
                buffer[: len(piece)] = piece
                yield memoryview(buffer)[: len(piece)]

    for given in (parts, reused()):
        name = fresh()
        assert storage.put_if_absent(name, given)
        assert storage.get(name) == data
        assert storage.get(name, 1_234_567, 7) == data[1_234_567:1_234_574]


def test_a_source_that_fails_leaves_nothing(storage: Any) -> None:
    name = fresh()

    def parts() -> Iterator[bytes]:
        yield b"one"
        raise RuntimeError("source failed")

    with pytest.raises(RuntimeError):
        storage.put_if_absent(name, parts())
    assert storage.stat(name) is None


def test_listing_by_prefix(storage: Any) -> None:
    made = {f"sessions/{first}{i:04x}" for first in ("aa", "ab") for i in range(3)}
    for name in made:
        storage.put_if_absent(name, [b"x" * 5])
    assert set(storage.list("sessions/")) == {ObjectInfo(name, 5) for name in made}
    assert {info.name for info in storage.list("sessions/", sizes=False)} == made
    assert names(storage, "sessions/ab") == {name for name in made if "/ab" in name}
    assert names(storage, "sessions/ab0001") == {"sessions/ab0001"}
    assert names(storage, "sessions/x") == set()
    with pytest.raises(ValueError):
        list(storage.list("../"))


def test_objects_in_directories_of_directories(storage: Any) -> None:
    pack = f"indexes/{secrets.token_hex(1)}/{secrets.token_hex(16)}"
    assert storage.put_if_absent(pack, [b"pack"])
    assert pack in names(storage, "indexes/")
    assert names(storage, pack[:-6]) == {pack}
    assert storage.delete(pack)
    assert pack not in names(storage, "indexes/")


def test_removed_is_gone_and_the_name_is_free(storage: Any, other: Any) -> None:
    name = fresh()
    for content in (b"first", b"second, longer", b"third"):
        assert storage.put_if_absent(name, [content])
        assert other.get(name) == content
        assert other.delete(name)
        assert not storage.delete(name)
        assert storage.stat(name) is None
        assert names(storage, name) == set()
        with pytest.raises(FileNotFoundError):
            storage.get(name)


def test_removing_many(storage: Any) -> None:
    several = [fresh() for _ in range(5)] + [fresh("indexes") for _ in range(5)]
    for name in several:
        storage.put_if_absent(name, [b"x"])
    assert storage.delete_many(several[:8]) == 8
    assert [storage.stat(name) is None for name in several] == [True] * 8 + [False] * 2
    storage.delete_many(several)
    assert all(storage.stat(name) is None for name in several)
    assert storage.delete_many([]) == 0


def test_a_removed_object_leaves_no_trace(store: Store, storage: Any) -> None:
    """Neither old versions nor delete markers may pile up in a bucket."""
    name = fresh()
    storage.put_if_absent(name, [b"x"])
    storage.put_if_absent(name, [b"y"])
    storage.delete(name)
    if store.ceph is not None:
        assert store.ceph.versions(store.bucket, f"{store.prefix}/{name}") == ([], [])


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "a//b", ".hidden", "a/b/c/d", "a\0b", "ü"])
def test_refused_names(storage: Any, name: str) -> None:
    for call in (storage.get, storage.stat, storage.delete, lambda name: storage.put_if_absent(name, [])):
        with pytest.raises(ValueError):
            call(name)


def test_an_index_can_be_opened_as_a_file(storage: Any) -> None:
    name, data = fresh("indexes"), secrets.token_bytes(100_000)
    storage.put_if_absent(name, [data])
    descriptor = storage.open(name)
    assert descriptor is not None
    try:
        assert os.pread(descriptor, len(data) + 1, 0) == data
    finally:
        os.close(descriptor)
    with pytest.raises(FileNotFoundError):
        storage.open(fresh("indexes"))


# ---- one winner


def test_of_many_threads_one_wins(storage: Any, other: Any) -> None:
    """Publishing and fencing rest on this."""
    hosts = [storage, other]
    for _ in range(5):
        name = fresh()
        won, failed = race(hosts, name, 10)
        assert failed == []
        assert len(won) == 1
        assert all(host.get(name) == won[0] for host in hosts)


def race(hosts: list[Any], name: str, racers: int) -> tuple[list[bytes], list[Exception]]:
    """Let threads put the same name at the same time; the contents of those that won, and what went wrong."""
    won, failed = list[bytes](), list[Exception]()
    start = threading.Barrier(racers)

    def put(number: int) -> None:
        content = b"%d" % number * 100
        start.wait()
        try:
            if hosts[number % len(hosts)].put_if_absent(name, [content]):
                won.append(content)
        except Exception as reason:
            failed.append(reason)

    run(put, racers)
    return won, failed


RACER = """
import sys
from tests.unit.repository.stores import open_again
storage = open_again(sys.argv[1])
storage.stat("waits/x")  # connected, as the others are
print("ready", flush=True)
for line in sys.stdin:
    name = line.strip()
    print(int(storage.put_if_absent(name, [sys.argv[2].encode()])), flush=True)
storage.close()
"""


def test_of_many_processes_one_wins(store: Store, storage: Any) -> None:
    with contextlib.ExitStack() as stack:
        racers = []
        for number in range(4):
            argv = [sys.executable, "-c", RACER, store.describe(), str(number)]
            racer = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            racers.append(stack.enter_context(racer))
        told = [racer.stdout.readline() for racer in racers if racer.stdout is not None]
        assert told == ["ready\n"] * 4
        for _ in range(10):
            name = fresh()
            for racer in racers:
                assert racer.stdin is not None
                racer.stdin.write(name + "\n")
                racer.stdin.flush()
            won = [int(racer.stdout.readline()) for racer in racers if racer.stdout is not None]
            assert sum(won) == 1
            assert storage.get(name) == b"%d" % won.index(1)


def test_putting_and_removing_at_once(storage: Any, other: Any) -> None:
    """Puts and removals of one name by many: at the end it is there whole or not at all, and it can be used on."""
    hosts = [storage, other]
    name = fresh()
    failed: list[Exception] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        for turn in range(6):
            try:
                if rng.random() < 0.6:
                    hosts[number % 2].put_if_absent(name, [b"%d-%d" % (number, turn)])
                else:
                    hosts[number % 2].delete(name)
            except StorageError as reason:
                # a put whose object was removed, or then put again, before it was looked at cannot tell if it had won
                if not re.search("acknowledged|another writer", str(reason)):
                    failed.append(reason)
            except Exception as reason:
                failed.append(reason)

    run(work, 6)
    assert failed == []
    hosts[0].delete(name)
    assert all(host.stat(name) is None for host in hosts)
    assert hosts[1].put_if_absent(name, [b"after"])
    assert all(host.get(name) == b"after" for host in hosts)


def run(work: Any, count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- claims


def test_a_claim_is_an_object_while_it_is_held(storage: Any, other: Any) -> None:
    name = fresh("sessions")
    claim = storage.claim(name, b"who")
    assert other.get(name) == b"who"
    assert not other.abandoned(name)
    assert not claim.lost
    with pytest.raises(StorageError, match="exists"):
        other.claim(name, b"another")
    assert other.get(name) == b"who"
    claim.release()
    claim.release()
    assert other.stat(name) is None
    assert not other.abandoned(name)


def test_a_claim_that_was_removed_is_lost(store: Store, storage: Any, other: Any) -> None:
    name = fresh("sessions")
    claim = storage.claim(name, b"who")
    assert other.delete(name)
    if store.kind != "local":
        claim.renew()  # what its thread does now and then
    assert claim.lost
    claim.release()


# ---- what is demanded at init


def test_a_place_without_a_repository(store: Store) -> None:
    if store.ceph is None:
        elsewhere = storage_from_url(str(store.directory / "elsewhere"))
    else:
        elsewhere = storage_from_url(f"s3://{store.bucket}/elsewhere", store.options())
    with pytest.raises(RepositoryMissing, match="repository init"):
        Repository.open(elsewhere)
    elsewhere.close()


def test_preparing_twice_changes_nothing(store: Store, storage: Any) -> None:
    name = fresh()
    storage.put_if_absent(name, [b"x"])
    storage.create()
    assert store.open().get(name) == b"x"
    assert names(storage, "probe/") == set()


def test_locked_objects_stay(store: Store, storage: Any) -> None:
    """Where a repository locks its objects a pack stays, and it is told until when."""
    name = f"packs/ab/{secrets.token_hex(16)}"
    storage.put_if_absent(name, [b"pack"])
    if store.kind != "locked":
        assert storage.delete(name)
        return
    with pytest.raises(ObjectLocked, match="locked until 20") as caught:
        storage.delete(name)
    assert caught.value.until is not None
    with pytest.raises(ObjectLocked):
        storage.delete_many([name])
    assert storage.get(name) == b"pack"
