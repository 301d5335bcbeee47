"""When thin pools are touched and asked, and when what they tell is used."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from vmbackupd.config import parse
from vmbackupd.guest.replies import ThinState, TouchedPool, TrackedDisk
from vmbackupd.job import increment, pools
from vmbackupd.job.bases import Base
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import Coverage, DiskPlan
from vmbackupd.job.journal import Header, Journal
from vmbackupd.job.options import BackupOptions
from vmbackupd.model import Change, Method, VolumeKind

ON = "[changes]\nthin = true\n"
BASE = Base("web1-1", "tree", None, "pool.5.8388700")


class Helper:
    """A guest with a pool on 8:0 and none on 8:16."""

    def __init__(self) -> None:
        self.touched: list[str] = []
        self.asked: dict[str, str] = {}
        self.full = False

    async def touch_pools(self, devices: Sequence[str]) -> list[TouchedPool]:
        self.touched += devices
        return [TouchedPool("vg-pool", not self.full, "it is full" if self.full else "")]

    async def compare_pools(self, since: Mapping[str, str]) -> list[ThinState]:
        self.asked = dict(since)
        return [
            ThinState(devno, "pool.9.8388800" if devno == "8:0" else "", bool(moment), "" if moment else "no pool")
            for devno, moment in since.items()
        ]


class Earlier:
    """Earlier backups: one that knows its pools."""

    base: Base | None = BASE

    def latest(self, volume: str, size: int) -> Base | None:
        return self.base if volume == "wwn:a" else None


class Observer:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def context(tmp_path: Path, helper: Helper, settings: str = ON) -> BackupContext:
    journal = Journal.create(tmp_path / "journal", Header("j3", "backup", "web1", "u"))
    undo = type("Undo", (), {"helper": helper})
    ctx = BackupContext(
        "j3", "web1", BackupOptions(), parse(settings), cast(Any, None), cast(Any, Observer()), journal,
        cast(Any, undo), cast(Any, None), cast(Any, None))  # fmt: skip
    plans = (
        DiskPlan("wwn:a", VolumeKind.PASS_THROUGH, Method.GUEST_SNAPSHOT, 1 << 20, "8:0", None, None),
        DiskPlan("wwn:b", VolumeKind.PASS_THROUGH, Method.GUEST_SNAPSHOT, 1 << 20, "8:16", None, None),
        DiskPlan("wwn:c", VolumeKind.PASS_THROUGH, Method.PRE_COPY, 1 << 20, "8:32", None, None),
        DiskPlan("vda", VolumeKind.VIRTUAL, Method.GUEST_SNAPSHOT, 1 << 20, "254:0", "vda", None),
    )
    ctx.bases, ctx.coverage = cast(Any, Earlier()), Coverage((), plans, ())
    return ctx


def decided(ctx: BackupContext, number: int) -> tuple[Base | None, Change, str]:
    assert ctx.coverage is not None
    return asyncio.run(increment._base(ctx, ctx.coverage.plans[number]))


def test_only_where_it_is_asked_for(tmp_path: Path) -> None:
    helper = Helper()
    ctx = context(tmp_path, helper, "")
    asyncio.run(pools.touch(ctx))
    asyncio.run(pools.compare(ctx))
    assert (helper.touched, helper.asked, ctx.thin) == ([], {}, {})
    assert decided(ctx, 0)[1] is Change.HASHED


def test_disks_whose_volumes_are_snapshotted_are_asked_since_their_newest_backup(tmp_path: Path) -> None:
    helper = Helper()
    ctx = context(tmp_path, helper)
    asyncio.run(pools.touch(ctx))
    asyncio.run(pools.compare(ctx))
    assert helper.touched == ["8:0", "8:16"]
    assert helper.asked == {"8:0": BASE.moment, "8:16": ""}
    assert decided(ctx, 0)[:2] == (BASE, Change.THIN_DELTA)
    assert decided(ctx, 1)[1] is Change.FULL


def test_a_pool_that_is_not_touched_is_told_of(tmp_path: Path) -> None:
    helper = Helper()
    helper.full = True
    ctx = context(tmp_path, helper)
    asyncio.run(pools.touch(ctx))
    assert cast(Any, ctx.observer).warnings == [
        "the thin pool vg-pool will not tell the next backup what changed: it is full"
    ]


def test_what_a_tracker_knows_is_not_asked_but_the_moment_is_noted(tmp_path: Path) -> None:
    helper = Helper()
    ctx = context(tmp_path, helper)
    ctx.tracked = {"8:0": TrackedDisk("8:0", True, "generation", "")}
    asyncio.run(pools.compare(ctx))
    assert helper.asked["8:0"] == "" and ctx.thin["8:0"].state.moment == "pool.9.8388800"
    ctx.untrusted = {"8:0": "the kernel missed a write"}
    asyncio.run(pools.compare(ctx))
    base, method, why = decided(ctx, 0)
    assert (base, method, why) == (BASE, Change.THIN_DELTA, "the kernel missed a write")


def test_an_answer_about_another_base_is_not_used(tmp_path: Path) -> None:
    ctx = context(tmp_path, Helper())
    asyncio.run(pools.compare(ctx))
    cast(Any, ctx.bases).base = Base("web1-2", "tree", None)
    assert decided(ctx, 0)[1] is Change.HASHED


def test_the_reason_stands_behind_that_of_the_tracker(tmp_path: Path) -> None:
    ctx = context(tmp_path, Helper())
    cast(Any, ctx.bases).base = Base("web1-2", "tree", None)  # written before there were moments
    asyncio.run(pools.compare(ctx))
    assert decided(ctx, 0)[1:] == (Change.HASHED, "tracking is off ([changes] tracking); no pool")
