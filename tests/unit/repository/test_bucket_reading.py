"""Reading back from a bucket of a real Ceph: several requests in flight, restores in place, verification, healing."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import CHUNK, SETTINGS, manifest, sparse_image, volume
from tests.unit.repository.stores import Store, make_store
from vmbackupd.engine.fileout import write_file
from vmbackupd.engine.progress import Progress
from vmbackupd.repository import Repository
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header
from vmbackupd.repository.verify import verify


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    with make_store("plain", tmp_path, request) as made:
        yield made


def make(place: Store) -> Repository:
    storage = place.open()
    assert storage.put_if_absent(HEADER_NAME, [Header.new(chunk_size=CHUNK, fanout=256).encode()])
    return Repository.open(storage, settings=SETTINGS)


def back_up(repository: Repository, backup: str, image: bytes) -> str:
    with repository.writer(backup) as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        tree = sink.finish()
        writer.publish(manifest(backup, volume("vda", tree, len(image))))
        return tree


def write(repository: Repository, tree: str, path: Path, *, in_place: bool = False) -> Progress:
    progress = Progress()
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        write_file(repository.image(tree), fd, progress, label=str(path), in_place=in_place)
    finally:
        os.close(fd)
    return progress


def test_a_restore_from_a_bucket(place: Store, tmp_path: Path) -> None:
    rng = random.Random(1)
    image = sparse_image(rng, 1500 * CHUNK + 5, density=0.8)
    target = tmp_path / "target"
    with make(place) as repository:
        tree = back_up(repository, "one", image)
        write(repository, tree, target)
        assert target.read_bytes() == image
        with target.open("r+b") as file:
            file.seek(700 * CHUNK)
            file.write(rng.randbytes(10))
        progress = write(repository, tree, target, in_place=True)
        assert target.read_bytes() == image
        assert progress.bytes_written == CHUNK
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("vmbackup-")] == []


def test_a_verification_of_a_bucket(place: Store) -> None:
    rng = random.Random(2)
    image = sparse_image(rng, 900 * CHUNK, density=0.8)
    with make(place) as repository:
        tree = back_up(repository, "one", image)
        progress = Progress()
        assert verify(repository, data=True, progress=progress).sound
        assert progress.bytes_done == progress.bytes_total
        victim = max(repository.storage.list("packs/"), key=lambda info: info.size).name
        data = bytearray(repository.storage.get(victim))
        data[len(data) // 2] ^= 1
        assert repository.storage.delete(victim)
        assert repository.storage.put_if_absent(victim, [data])
        report = verify(repository, data=True)
        assert set(report.damaged_packs) == set(report.condemned) == {victim.rpartition("/")[2]}
        assert {item.backup for item in report.damage} == {"one"}
        assert back_up(repository, "two", image) == tree
        assert verify(repository, data=True).damage == []
        repository.gc()
        assert verify(repository, data=True).sound
