"""A store that lies, hangs, is full or dies: a clear error in bounded time, nothing published, nothing lost."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.ceph import Ceph
from tests.unit.repository.lyingproxy import (
    BUSY,
    CHANGE,
    DISOWN,
    DROP_ANSWER,
    HANG,
    LOSE,
    MISSING,
    SHORTEN,
    TRICKLE,
    LyingProxy,
)
from tests.unit.repository.repository_support import CHUNK, sparse_image
from tests.unit.repository.stores import Store, make_store
from tests.unit.repository.test_s3_repository import back_up, join, make, restored
from vmbackupd.errors import RepositoryFull, StorageDenied, StorageError, StorageUnanswered
from vmbackupd.repository import Repository

SIZE = 60 * CHUNK
FIRST = sparse_image(random.Random(1), SIZE)
SECOND = sparse_image(random.Random(2), SIZE)


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A repository with one backup in a plain bucket."""
    with make_store("plain", tmp_path, request) as made:
        with make(made) as repository:
            back_up(repository, "one", FIRST)
        yield made


@pytest.fixture
def proxy(ceph: Ceph) -> Iterator[LyingProxy]:
    with LyingProxy(ceph) as made:
        yield made


@contextlib.contextmanager
def through(proxy: LyingProxy, place: Store, **options: Any) -> Iterator[Repository]:
    """The repository as a host sees it that reaches the store by way of the proxy."""
    settings = {"timeout": 5.0, "attempts": 3, **options}
    with join(place, endpoint=proxy.endpoint, **settings) as repository:
        yield repository


def only_the_first_backup_is_there(place: Store) -> None:
    """And it is whole, and the next backup works."""
    with join(place) as repository:
        assert {summary.id: summary.error for summary in repository.backups()} == {"one": None}
        assert restored(repository, "one") == FIRST
        back_up(repository, "next", SECOND)
        assert restored(repository, "next") == SECOND


# ---- lies


def test_a_put_that_was_acknowledged_and_is_not_there(place: Store, proxy: LyingProxy) -> None:
    for what in ("packs", "indexes", "manifests"):
        for lie in (LOSE, SHORTEN, CHANGE):
            with through(proxy, place) as repository:
                before = proxy.seen
                proxy.tell(lie, "PUT", f"/{what}/")
                with pytest.raises(StorageError, match=f"{what}/.*(acknowledged|other bytes)"):
                    back_up(repository, "two", SECOND)
                assert proxy.seen > before
                proxy.be_honest()
    only_the_first_backup_is_there(place)


def test_lies_about_versions(request: pytest.FixtureRequest, tmp_path: Path, proxy: LyingProxy) -> None:
    with make_store("versioned", tmp_path, request) as place:
        storage = place.open(endpoint=proxy.endpoint)
        for lie in (LOSE, SHORTEN, CHANGE):
            proxy.tell(lie, "PUT", "/manifests/")
            with pytest.raises(StorageError):
                storage.put_if_absent(f"manifests/{lie}", [b"x" * 1000])
            proxy.be_honest()


# ---- silence


@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
def test_a_store_that_hangs(place: Store, proxy: LyingProxy, method: str) -> None:
    with through(proxy, place, timeout=0.5, attempts=2) as repository:
        proxy.tell(HANG, method)
        began = time.monotonic()
        with pytest.raises(StorageUnanswered, match="2 times"):
            back_up(repository, "two", SECOND)
        assert time.monotonic() - began < 30
        proxy.be_honest()
    only_the_first_backup_is_there(place)


def test_a_store_that_hangs_from_the_beginning(place: Store, proxy: LyingProxy) -> None:
    proxy.tell(HANG)
    with pytest.raises(StorageUnanswered), through(proxy, place, timeout=0.3, attempts=2):
        pass


def test_a_store_that_sends_a_byte_now_and_then(place: Store, proxy: LyingProxy) -> None:
    storage = place.open(endpoint=proxy.endpoint, timeout=0.5, attempts=1)
    assert storage.stat("repository.json") is not None
    proxy.tell(TRICKLE, "GET", "repository.json")
    began = time.monotonic()
    with pytest.raises(StorageUnanswered):
        storage.get("repository.json")
    assert time.monotonic() - began < 10


def test_a_store_that_is_busy_for_a_while(place: Store, proxy: LyingProxy) -> None:
    with through(proxy, place, attempts=4) as repository:
        proxy.tell(BUSY, times=3)
        back_up(repository, "two", SECOND)
        assert restored(repository, "two") == SECOND
    assert proxy.seen == 3


def test_nobody_listens(place: Store) -> None:
    with pytest.raises(StorageUnanswered, match="127.0.0.1:1"):
        join(place, endpoint="http://127.0.0.1:1", attempts=2)


# ---- answers that are lost


@pytest.mark.parametrize("kind", ["plain", "versioned"])
def test_a_put_whose_answer_was_lost_is_ours(
    request: pytest.FixtureRequest, tmp_path: Path, proxy: LyingProxy, kind: str
) -> None:
    """The second attempt finds the name taken: by the first one. Somebody else's object it tells from ours."""
    with make_store(kind, tmp_path, request) as place:
        storage, other = place.open(endpoint=proxy.endpoint), place.open()
        assert other.put_if_absent("manifests/theirs", [b"theirs"])
        proxy.tell(DROP_ANSWER, "PUT", "/manifests/", times=1)
        assert storage.put_if_absent("manifests/ours", [b"ours"])
        proxy.be_honest()
        proxy.tell(DROP_ANSWER, "PUT", "/manifests/", times=1)
        assert not storage.put_if_absent("manifests/theirs", [b"theirs"])
        assert other.get("manifests/ours") == b"ours"
        assert {info.name for info in other.list("manifests/")} == {"manifests/ours", "manifests/theirs"}
        if kind == "versioned":
            assert place.ceph is not None
            versions, markers = place.ceph.versions(place.bucket, f"{place.prefix}/manifests/")
            assert (len(versions), markers) == (2, [])


@pytest.mark.parametrize("kind", ["plain", "versioned"])
@pytest.mark.parametrize("answer", [MISSING, DISOWN])
def test_a_put_to_which_the_store_says_that_there_is_no_such_object(
    request: pytest.FixtureRequest, tmp_path: Path, proxy: LyingProxy, kind: str, answer: str
) -> None:
    """Ceph 16 says so (404 NoSuchKey) to a put beside a removal of the same name. It may hold what was put or not."""
    with make_store(kind, tmp_path, request) as place:
        storage, other = place.open(endpoint=proxy.endpoint), place.open()
        proxy.tell(answer, "PUT", "/waits/", times=1)
        assert storage.put_if_absent("waits/ours", [b"ours"])
        assert proxy.seen == 1
        assert other.get("waits/ours") == b"ours"
        proxy.tell(answer, "PUT", "/waits/")
        with pytest.raises(StorageUnanswered, match="waits/others"):
            place.open(endpoint=proxy.endpoint, attempts=2).put_if_absent("waits/others", [b"others"])


@pytest.mark.parametrize("kind", ["plain", "versioned"])
def test_a_winner_that_is_removed_while_a_put_asks_whose_it_is(
    request: pytest.FixtureRequest, tmp_path: Path, proxy: LyingProxy, kind: str
) -> None:
    with make_store(kind, tmp_path, request) as place:
        storage = place.open(endpoint=proxy.endpoint)
        proxy.tell(DROP_ANSWER, "PUT", "/waits/", times=1)
        proxy.tell(MISSING, "HEAD", "/waits/")
        assert not storage.put_if_absent("waits/gone", [b"gone"])
        assert proxy.seen == 2


def test_every_answer_is_lost(place: Store, proxy: LyingProxy) -> None:
    with through(proxy, place, attempts=2) as repository:
        proxy.tell(DROP_ANSWER, "PUT", "/packs/")
        with pytest.raises(StorageUnanswered):
            back_up(repository, "two", SECOND)
        proxy.be_honest()
    only_the_first_backup_is_there(place)


# ---- refusals


def test_a_full_store(place: Store) -> None:
    assert place.ceph is not None
    limit = ("--quota-scope=user", f"--uid={place.ceph.user}")
    place.ceph.admin("quota", "set", *limit, "--max-objects=1")
    try:
        place.ceph.admin("quota", "enable", *limit)
        with join(place) as repository, pytest.raises(RepositoryFull, match="quota"):
            back_up(repository, "two", SECOND)
    finally:
        place.ceph.admin("quota", "disable", *limit)
    place.ceph.restart_gateway()  # it remembers quotas for a while
    only_the_first_backup_is_there(place)


def test_wrong_keys(place: Store, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("[default]\naws_access_key_id = AKNOBODY\naws_secret_access_key = nothing\n")
    with pytest.raises(StorageDenied, match="access key is unknown"):
        join(place, credentials_file=wrong)
    assert place.ceph is not None
    wrong.write_text(f"[default]\naws_access_key_id = {place.ceph.access_key}\naws_secret_access_key = nothing\n")
    with pytest.raises(StorageDenied, match="secret key does not match"):
        join(place, credentials_file=wrong)


# ---- the store dies


def test_the_gateway_is_stopped_for_a_moment(place: Store) -> None:
    """Requests are tried again until it answers."""
    ceph = place.ceph
    assert ceph is not None
    with join(place, timeout=1.0, attempts=20) as repository:
        ceph.pause_gateway()
        timer = threading.Timer(2.0, ceph.resume_gateway)
        timer.start()
        try:
            back_up(repository, "two", SECOND)
        finally:
            timer.join()
        assert restored(repository, "two") == SECOND


def test_the_gateway_is_killed_in_the_middle(place: Store) -> None:
    """SIGKILL while packs are written: the writer fails soon and says why; what was published before is whole."""
    ceph = place.ceph
    assert ceph is not None
    image = random.Random(3).randbytes(300 * CHUNK)
    with join(place, timeout=2.0, attempts=2) as repository:
        client = repository.storage.client  # type: ignore[attr-defined]
        puts = client.requests["put_object"]
        enough = threading.Event()

        def kill() -> None:
            while client.requests["put_object"] < puts + 3 and not enough.wait(0.001):
                pass
            ceph.kill_gateway()

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            with pytest.raises(StorageUnanswered):
                back_up(repository, "two", image)
        finally:
            enough.set()
            killer.join()
            ceph.start_gateway()
    only_the_first_backup_is_there(place)
