"""Seal: the manifest is published last, atomically: a backup exists whole or not at all."""

from __future__ import annotations

import asyncio
import time

import vmbackupd
from vmbackupd.job import bitmaps
from vmbackupd.job.context import BackupContext, Captured
from vmbackupd.model import Consistency, Method, RevertMode, VolumeRecord
from vmbackupd.repository.manifest import Manifest, StoreRecord, VmIdentity


async def run(ctx: BackupContext) -> None:
    """Publish the manifest; ``ctx.manifest`` is what was published."""
    assert ctx.writer is not None
    manifest = make_manifest(ctx)
    await ctx.uninterrupted(asyncio.to_thread(ctx.writer.publish, manifest))
    ctx.manifest = manifest
    await bitmaps.settle(ctx)


def make_manifest(ctx: BackupContext) -> Manifest:
    """The evidence of this backup: what was captured, when and how, and what was not."""
    assert ctx.coverage is not None and ctx.report is not None and ctx.writer is not None
    now = time.time()
    keeps_t2 = ctx.store_tree is not None and ctx.options.revert is not RevertMode.BACKUP
    return Manifest(
        id=ctx.writer.backup_id,
        vm=VmIdentity(ctx.vm, ctx.domain.uuid),
        created=now,
        t1=ctx.t1,
        t2=ctx.t2,
        freeze_ms=ctx.freeze_ms,
        revert=ctx.options.revert,
        volumes=tuple(_volume(ctx, ctx.captured[plan.id], keeps_t2) for plan in ctx.coverage.plans),
        store=StoreRecord(ctx.store_tree, ctx.store_size) if keeps_t2 and ctx.store_tree is not None else None,
        volume_maps=ctx.volume_maps,
        coverage=ctx.coverage.items,
        config=ctx.config_blobs,
        guest={
            "hostname": ctx.report.hostname,
            "kernel": ctx.report.kernel,
            "boot_id": ctx.report.boot_id,
            "initiator": ctx.report.initiator,
            "fsfreeze_hook": ctx.report.fsfreeze_hook,
            "frozen_filesystems": ctx.frozen_filesystems,
            "suspend_ms": ctx.suspend_ms,
        },
        tool_version=vmbackupd.__version__,
    )


def _volume(ctx: BackupContext, captured: Captured, keeps_t2: bool) -> VolumeRecord:
    plan = captured.plan
    return VolumeRecord(
        id=plan.id,
        kind=plan.kind,
        method=plan.method,
        consistency=consistency(ctx),
        size=plan.size,
        tree=captured.tree,
        t2_tree=captured.t2_tree if keeps_t2 and plan.method is Method.GUEST_SNAPSHOT else None,
        bytes_read=captured.bytes_read,
        bytes_stored=captured.bytes_stored,
        reverted_chunks=captured.reverted_chunks,
        details=plan.details,
        change=captured.change,
    )


def consistency(ctx: BackupContext) -> Consistency:
    """Applications prepared themselves in the guest agent's freeze hook, filesystems were frozen, or the disks are as
    after a power cut."""
    assert ctx.report is not None
    if ctx.frozen_filesystems == 0:
        return Consistency.CRASH
    return Consistency.APPLICATION if ctx.report.fsfreeze_hook else Consistency.FILESYSTEM
