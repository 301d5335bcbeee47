"""What earlier backups offer to build on: only an image from which on the changes were recorded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import manifest, volume
from vmbackupd.job.bases import Base, Bases
from vmbackupd.model import Change, ChangeRecord
from vmbackupd.repository import LocalStorage, Repository
from vmbackupd.repository.forget import forget
from vmbackupd.repository.verify import verify

VM = "6f1d1c1e-0000-4000-8000-000000000001"
SIZE = 3 << 16


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    storage = LocalStorage(tmp_path / "repository")
    storage.create()
    return Repository.create(storage)


def publish(repository: Repository, backup: str, token: str | None, *, t1: float, at_t2: bool = False) -> str:
    """A backup of ``vda`` whose changes are recorded by ``token`` from then on; the tree."""
    with repository.writer(backup) as writer:
        sink = writer.image(SIZE)
        sink.write(0, backup.encode().ljust(1 << 16, b"."))
        tree = sink.finish()
        record = volume("vda", tree, SIZE, change=ChangeRecord(Change.FULL, token=token))
        if at_t2:
            record = replace(record, tree=None, t2_tree=tree)
        writer.publish(replace(manifest(backup, record), t1=t1))
    return tree


def test_the_token_finds_the_backup_that_noted_it_and_no_other(repository: Repository) -> None:
    publish(repository, "one", "token-1", t1=1)
    second = publish(repository, "two", "token-2", t1=2)
    publish(repository, "three", None, t1=3)
    with repository.writer("four") as writer:
        bases = Bases(repository, writer, VM)
        assert bases.recorded_by("token-2", "vda", SIZE) == Base("two", second, "token-2")
        assert bases.recorded_by("token-9", "vda", SIZE) is None
        assert bases.tokens("vda") == ["token-2", "token-1"]
        assert writer.update(second).finish() == second  # it may be built on


def test_the_newest_image_of_a_volume_is_found_without_a_token(repository: Repository) -> None:
    publish(repository, "one", "token-1", t1=1)
    newest = publish(repository, "two", None, t1=2)
    with repository.writer("three") as writer:
        assert Bases(repository, writer, VM).latest("vda", SIZE) == Base("two", newest, None)


def test_another_size_volume_or_vm_is_no_base(repository: Repository) -> None:
    publish(repository, "one", "token", t1=1)
    with repository.writer("two") as writer:
        bases = Bases(repository, writer, VM)
        assert bases.recorded_by("token", "vda", SIZE + (1 << 16)) is None
        assert bases.recorded_by("token", "vdb", SIZE) is None
        assert Bases(repository, writer, "another").latest("vda", SIZE) is None


def test_an_image_kept_at_t2_is_a_base_too(repository: Repository) -> None:
    tree = publish(repository, "one", "token", t1=1, at_t2=True)
    with repository.writer("two") as writer:
        assert Bases(repository, writer, VM).recorded_by("token", "vda", SIZE) == Base("one", tree, "token")


def test_a_backup_that_was_forgotten_is_no_base(repository: Repository) -> None:
    publish(repository, "one", "token", t1=1)
    with repository.writer("two") as writer:
        bases = Bases(repository, writer, VM)
        forget(repository, ["one"])
        found = bases.recorded_by("token", "vda", SIZE)
        # Either it went, or the writer keeps what it builds on.
        if found is not None:
            assert writer.update(found.tree).finish() == found.tree


def test_a_damaged_image_is_no_base_and_what_is_read_instead_heals_it(repository: Repository, tmp_path: Path) -> None:
    publish(repository, "one", "token", t1=1)
    for pack in (tmp_path / "repository").glob("packs/**/*"):
        if pack.is_file():
            content = bytearray(pack.read_bytes())
            content[100] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(content)
    report = verify(repository, data=True)
    assert report.damage
    with repository.writer("two") as writer:
        bases = Bases(repository, writer, VM)
        assert bases.recorded_by("token", "vda", SIZE) is None and bases.latest("vda", SIZE) is None
