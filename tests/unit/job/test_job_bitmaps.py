"""What a virtual disk's image begins as, the reasons why it does not, and which checkpoint stays at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from vmbackupd.config import parse
from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.job import bitmaps
from vmbackupd.job.bases import Base, Start
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import Coverage, DiskPlan
from vmbackupd.job.journal import Header, Journal
from vmbackupd.job.options import BackupOptions
from vmbackupd.model import Method, VolumeKind

OURS = "vmbackupd-j3"


class Checkpoints:
    """A hypervisor with checkpoints: ``lost`` says which bitmaps of which are not to be relied on."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.lost: dict[tuple[str, str], str] = {}
        self.none: dict[str, str] = {}
        self.fails: Exception | None = None

    async def bitmaps(self, uuid: str) -> list[str]:
        if self.fails is not None and OURS in self.names:
            raise self.fails
        return list(self.names)

    async def begin_bitmaps(self, uuid: str, name: str, targets: Sequence[str]) -> dict[str, str | None]:
        if self.fails is not None:
            raise self.fails
        self.names.append(name)
        return {target: self.none.get(target) for target in targets}

    async def bitmap_reasons(self, uuid: str, name: str, targets: Sequence[str]) -> dict[str, str | None]:
        missing = None if name in self.names else "its dirty bitmap is missing"
        return {target: self.lost.get((name, target), missing) for target in targets}

    async def drop_bitmaps(self, uuid: str, name: str) -> None:
        self.names.remove(name)


class Earlier:
    """Earlier backups: which token each noted for every disk, newest first."""

    def __init__(self, *tokens: str) -> None:
        self._tokens = tokens
        self.gone: set[str] = set()

    def tokens(self, volume: str) -> list[str]:
        return list(self._tokens)

    def recorded_by(self, token: str, volume: str, size: int) -> Base | None:
        return None if token in self.gone else Base(f"backup of {token}", "tree", token)


def context(tmp_path: Path, checkpoints: Checkpoints, earlier: Earlier, settings: str = "",
            **options: bool) -> BackupContext:
    journal = Journal.create(tmp_path / "journal", Header("j3", "backup", "web1", "u"))
    ctx = BackupContext(
        "j3", "web1", BackupOptions(**options), parse(settings), cast(Any, checkpoints), cast(Any, None), journal,  # type: ignore[arg-type]
        cast(Any, None), cast(Any, type("Domain", (), {"uuid": "u"})), cast(Any, None))
    ctx.bases = cast(Any, earlier)
    plans = tuple(DiskPlan(target, VolumeKind.VIRTUAL, Method.FREEZE_WINDOW, 1, None, target, None)
                  for target in ("vda", "vdb"))
    ctx.coverage = Coverage((), plans, ())
    return ctx


def begin(ctx: BackupContext) -> dict[str, Start]:
    asyncio.run(bitmaps.begin(ctx))
    return ctx.starts


def test_each_disk_builds_on_the_newest_backup_its_bitmap_counts_from(tmp_path: Path) -> None:
    checkpoints, earlier = Checkpoints("vmbackupd-j1", "vmbackupd-j2"), Earlier("vmbackupd-j2", "vmbackupd-j1")
    checkpoints.lost["vmbackupd-j2", "vdb"] = "inconsistent"
    ctx = context(tmp_path, checkpoints, earlier)
    assert begin(ctx) == {"vda": Start(Base("backup of vmbackupd-j2", "tree", "vmbackupd-j2")),
                          "vdb": Start(Base("backup of vmbackupd-j1", "tree", "vmbackupd-j1"))}
    assert ctx.recorded == {"vda", "vdb"}
    assert [(entry.undo, entry.args) for entry in ctx.journal.pending] == [("drop_bitmaps", {"name": OURS})]


def test_a_disk_with_nothing_to_build_on_is_told_why(tmp_path: Path) -> None:
    checkpoints, earlier = Checkpoints("vmbackupd-j2"), Earlier("vmbackupd-j2")
    checkpoints.lost["vmbackupd-j2", "vda"] = "inconsistent"
    earlier.gone = {"vmbackupd-j2"}
    starts = begin(context(tmp_path, checkpoints, earlier))
    assert starts["vda"] == Start(None, "inconsistent")
    assert "the backup it is recorded since is gone" in starts["vdb"].reason


def test_a_first_backup_and_a_disk_that_can_have_no_bitmap(tmp_path: Path) -> None:
    checkpoints = Checkpoints()
    checkpoints.none["vdb"] = "its image is raw"
    ctx = context(tmp_path, checkpoints, Earlier())
    assert begin(ctx) == {"vda": Start(None, "no earlier backup recorded what changes on it"),
                          "vdb": Start(None, "its image is raw")}
    assert ctx.recorded == {"vda"}


def test_a_full_backup_records_for_the_next_one(tmp_path: Path) -> None:
    ctx = context(tmp_path, Checkpoints("vmbackupd-j2"), Earlier("vmbackupd-j2"), full=True)
    assert {start.reason for start in begin(ctx).values()} == {"a full backup was asked for"}
    assert ctx.recorded == {"vda", "vdb"}


def test_switched_off_they_go_with_the_next_backup(tmp_path: Path) -> None:
    checkpoints = Checkpoints("vmbackupd-j2")
    ctx = context(tmp_path, checkpoints, Earlier("vmbackupd-j2"), "[changes]\nbitmaps = false")
    assert {start.reason for start in begin(ctx).values()} == {"dirty bitmaps are switched off ([changes] bitmaps)"}
    asyncio.run(bitmaps.settle(ctx))
    assert not checkpoints.names and not ctx.journal.pending


def test_a_hypervisor_that_has_none_costs_full_reads(tmp_path: Path) -> None:
    checkpoints = Checkpoints()
    checkpoints.fails = HypervisorError("no checkpoints here")
    ctx = context(tmp_path, checkpoints, Earlier())
    assert {start.reason for start in begin(ctx).values()} == {"no checkpoints here"}
    checkpoints.fails = NotRunning("it went")
    with pytest.raises(NotRunning):
        begin(context(tmp_path / "another", checkpoints, Earlier()))


def test_once_published_the_new_checkpoint_stays_and_the_others_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints("vmbackupd-j1", "vmbackupd-j2")
    ctx = context(tmp_path, checkpoints, Earlier("vmbackupd-j2"))
    begin(ctx)
    asyncio.run(bitmaps.settle(ctx))
    assert checkpoints.names == [OURS] and not ctx.journal.pending


def test_an_old_one_that_cannot_go_does_not_fail_the_backup(tmp_path: Path) -> None:
    checkpoints = Checkpoints("vmbackupd-j2")
    ctx = context(tmp_path, checkpoints, Earlier("vmbackupd-j2"))
    begin(ctx)
    checkpoints.fails = HypervisorError("busy")
    asyncio.run(bitmaps.settle(ctx))
    assert not ctx.journal.pending
