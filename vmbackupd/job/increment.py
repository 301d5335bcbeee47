"""Of a pass-through disk, only what changed since an earlier backup.

Ways, best first: the guest's tracker recorded every write since a backup that is still there; thin pools below the disk
tell what cannot have changed since the newest; the guest hashes the disk and only what differs travels; everything
travels.
"""

from __future__ import annotations

import asyncio
import functools

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.copyloop import Progress
from vmbackupd.guest.client import CHANGED, HASHES, THIN
from vmbackupd.job import reading
from vmbackupd.job.bases import Base
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.exports import bitmap, export
from vmbackupd.job.hashes import CHUNK, DIGEST, differing
from vmbackupd.job.reading import Reading
from vmbackupd.model import Change, ChangeRecord


async def collect(ctx: BackupContext, devno: str) -> int:
    """Have the helper show what was marked on a disk since the last time; the number of chunks."""
    collected = await ctx.helper.collect(devno)
    if collected.reason:
        ctx.untrusted[devno] = collected.reason
    return collected.chunks


async def begin(ctx: BackupContext, plan: DiskPlan, key: bytes) -> Reading:
    """Find out what of the disk is to be read. The helper serves it, and its tracker's marks are collected.

    ``key`` is that of the hashes the helper serves. Raises ``SourceError`` and the like, ``Cancelled``.
    """
    assert plan.devno is not None
    tracked = ctx.tracked.get(plan.devno)
    token = ctx.generation if tracked is not None and tracked.tracking else None
    base, method, reason = await _base(ctx, plan)
    changed = None
    if base is not None and method is Change.TRACKED:
        changed = await bitmap(ctx, plan.id + CHANGED, -(-plan.size // CHUNK))
    elif base is not None and method is Change.THIN_DELTA:
        changed = await bitmap(ctx, plan.id + THIN, -(-plan.size // CHUNK))
    elif base is not None:
        changed = await _hashed(ctx, plan, base, key)
    thin = ctx.thin.get(plan.devno)
    moment = thin.state.moment if thin is not None else ""
    record = ChangeRecord(method, base.backup if base else None, reason, token=token, moment=moment)
    return reading.start(ctx, plan, base, changed, record)


async def _base(ctx: BackupContext, plan: DiskPlan) -> tuple[Base | None, Change, str]:
    """The image to begin with, how what changed since is found out, and why not better."""
    assert ctx.bases is not None and plan.devno is not None
    if ctx.options.full:
        return None, Change.FULL, "a full backup was asked for"
    tracked = ctx.tracked.get(plan.devno)
    if tracked is None:
        why = "tracking is off ([changes] tracking)"
    elif tracked.generation is None:
        why = tracked.reason
    elif plan.devno in ctx.untrusted:
        why = ctx.untrusted[plan.devno]
    else:
        base = await asyncio.to_thread(ctx.bases.recorded_by, tracked.generation, plan.id, plan.size)
        if base is not None:
            return base, Change.TRACKED, ""
        why = f"the backup that the tracker counts from ({tracked.generation}) is not there, or damaged"
    base = await asyncio.to_thread(ctx.bases.latest, plan.id, plan.size)
    if base is None:
        return None, Change.FULL, f"{why}; no earlier backup of the disk at this size"
    thin = ctx.thin.get(plan.devno)
    if thin is not None and thin.state.known and thin.base == base:
        return base, Change.THIN_DELTA, why
    if thin is not None and thin.state.reason:
        why = f"{why}; {thin.state.reason}"
    if not ctx.config.changes.hashing:
        return None, Change.FULL, f"{why}; hashing is off ([changes] hashing)"
    return base, Change.HASHED, why


async def _hashed(ctx: BackupContext, plan: DiskPlan, base: Base, key: bytes) -> Bitmap:
    """What differs from ``base`` by the hashes that the guest computes."""
    assert ctx.writer is not None
    image, progress = ctx.writer.source(base.tree), Progress()
    async with export(ctx, plan.id + HASHES, -(-plan.size // CHUNK) * DIGEST) as hashes:
        work = functools.partial(differing, hashes, image, key, progress)
        return await ctx.engine(progress, work, beside=functools.partial(reading.check, ctx))
