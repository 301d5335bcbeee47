"""Copy of the pass-through volumes: the helper serves each disk as of T1 over NBD, the engine stores what changed."""

from __future__ import annotations

import asyncio
import secrets

from vmbackupd.guest.client import CAPTURED, REST
from vmbackupd.job import direct, increment, pools, reading
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.exports import bitmap, export
from vmbackupd.job.faultpoints import reach
from vmbackupd.job.snapshots import require_valid
from vmbackupd.model import Method


async def run(ctx: BackupContext) -> None:
    """Store every pass-through disk as of T1; its tree is in ``ctx.captured``.

    Raises ``SnapshotLost`` as soon as a snapshot no longer holds, ``SourceError`` when a disk cannot be read.
    """
    assert ctx.coverage is not None
    plans = ctx.coverage.pass_through
    if not plans:
        return
    for plan in plans:
        if plan.method is Method.GUEST_SNAPSHOT and plan.devno in ctx.tracked and ctx.tracked[plan.devno].tracking:
            await increment.collect(ctx, plan.devno)  # what was marked until T1
    await pools.compare(ctx)
    key = secrets.token_bytes(32)
    await ctx.helper.serve(ctx.data_port, ctx.coverage.pass_through_devnos, hash_key=key)
    for plan in plans:
        await (_finish(ctx, plan) if plan.method is Method.PRE_COPY else _copy(ctx, plan, key))
        await reach("passthrough-copy:one")
    require_valid(ctx, await ctx.helper.status())


async def _copy(ctx: BackupContext, plan: DiskPlan, key: bytes) -> None:
    """A disk whose volumes are snapshotted."""
    disk = await increment.begin(ctx, plan, key)
    left = await direct.as_of_t1(ctx, disk)
    async with export(ctx, plan.id, plan.size) as source:
        await reading.inspect_unchanged(ctx, disk, source)
        await reading.read(ctx, disk, source, left)
        await reading.distrust(ctx, disk, source)
    await _store(ctx, disk)


async def _finish(ctx: BackupContext, plan: DiskPlan) -> None:
    """A disk that was copied beforehand: what was captured in the freeze makes it T1."""
    disk = ctx.pre_copied.pop(plan.id)
    rest = await bitmap(ctx, plan.id + REST, disk.chunks)
    async with export(ctx, plan.id + CAPTURED, plan.size) as source:
        await reading.read(ctx, disk, source, rest)
    await _store(ctx, disk)


async def _store(ctx: BackupContext, disk: reading.Reading) -> None:
    ctx.captured[disk.plan.id] = disk.captured(await asyncio.to_thread(disk.sink.finish))
