"""Disks that QEMU serves: what is written down before, and the room that their scratch images need."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from vmbackupd.config import parse
from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.base import FleeceExport
from vmbackupd.job import fleecing
from vmbackupd.job.bases import Base, Start
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.journal import Header, Journal
from vmbackupd.model import Method, VolumeKind


class Asked:
    """A hypervisor that writes down what it is asked to serve."""

    async def begin_fleece(self, *words: object) -> dict[str, FleeceExport]:
        self.words = words
        return {"vda": FleeceExport("x", "y")}


@pytest.fixture
def ctx(tmp_path: Path) -> BackupContext:
    journal = Journal.create(tmp_path / "journal", Header("j1", "backup", "web1", "u"))
    entry = journal.record("stop_helper", socket="/run/channels/control")
    config = parse(f"[scratch]\ndirectory = '{tmp_path}/scratch'")
    context = BackupContext(
        "j1", "web1", cast(Any, None), config, cast(Any, Asked()), cast(Any, None), journal, cast(Any, None),
        cast(Any, type("Domain", (), {"uuid": "u"})), cast(Any, None))
    context.entries["helper"], context.scratch_target = entry, "vdz"
    return context


PLAN = DiskPlan("vda", VolumeKind.VIRTUAL, Method.GUEST_SNAPSHOT, 1, None, "vda", None)


def test_the_job_ends_before_its_files_go(ctx: BackupContext, tmp_path: Path) -> None:
    disks = fleecing.prepare(ctx, [PLAN], scratch=True)
    assert disks == {target: f"{tmp_path}/scratch/u.{target}.j1.fleece" for target in ("vda", "vdz")}
    pending = [(entry.undo, *entry.args.values()) for entry in ctx.journal.pending]
    assert pending[:4] == [("end_fleece",), ("unlink", "/run/channels/j1.nbd"),
                           ("unlink", disks["vdz"]), ("unlink", disks["vda"])]


def test_nothing_to_serve_is_no_job(ctx: BackupContext) -> None:
    assert fleecing.prepare(ctx, []) == {}
    assert [entry.undo for entry in ctx.journal.pending] == ["stop_helper"]


def test_a_disk_is_served_with_the_bitmap_it_is_built_on(ctx: BackupContext) -> None:
    ctx.starts = {"vda": Start(Base("b", "t", "vmbackupd-j0")), "vdb": Start(None, "why")}
    disks = {"vda": "/a", "vdb": "/b", "vdz": "/z"}
    asyncio.run(fleecing.begin(ctx, disks))
    assert cast(Any, ctx.hypervisor).words == ("u", disks, "/run/channels/j1.nbd", {"vda": "vmbackupd-j0"})
    assert ctx.fleece == {"vda": FleeceExport("x", "y")}


def test_without_room_the_backup_is_given_up_and_not_the_guest(
    ctx: BackupContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleecing.prepare(ctx, [PLAN])
    monkeypatch.setattr(fleecing, "ROOM", 1 << 62)
    with pytest.raises(HypervisorError, match=r"VM web1: .*scratch has .* left, less than .*: the backup is given up"):
        fleecing.require_room(ctx)
