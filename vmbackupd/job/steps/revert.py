"""Revert: the T2 images of the virtual disks are set back to T1, from the COW stores that the T2 image contains.

The images are trees already stored, so a revert writes only the chunks it changes and the path above them.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from vmbackupd.engine.revert import RevertPlan, revert_image
from vmbackupd.job.context import BackupContext, Captured
from vmbackupd.job.faultpoints import reach
from vmbackupd.model import RevertMode
from vmbackupd.repository.t1 import read_store, revert_plan


async def run(ctx: BackupContext) -> None:
    """Give every virtual disk its tree as of T1 (unless the revert is left to the restore), and count its chunks.

    Raises ``StoreCorrupt`` when a COW store does not parse: the backup fails, since nothing could be restored from it.
    """
    if ctx.store_tree is None:
        return
    await asyncio.to_thread(_count_exceptions, ctx)
    for captured in ctx.captured.values():
        if captured.t2_tree is None:
            continue
        await asyncio.to_thread(_revert, ctx, captured)
        await reach("revert:one")


def _count_exceptions(ctx: BackupContext) -> None:
    """Parse every store, also those that no virtual disk needs: a store that is damaged is no proof of anything."""
    assert ctx.writer is not None and ctx.store_tree is not None
    store = ctx.writer.source(ctx.store_tree)
    ctx.volume_maps = tuple(replace(volume, exceptions=read_store(volume, store).count) for volume in ctx.volume_maps)


def _revert(ctx: BackupContext, captured: Captured) -> None:
    assert ctx.writer is not None and ctx.store_tree is not None and captured.t2_tree is not None
    store = ctx.writer.source(ctx.store_tree)
    plan: RevertPlan = revert_plan(captured.plan.id, captured.plan.size, ctx.volume_maps, store)
    captured.reverted_chunks = plan.count
    if ctx.options.revert is RevertMode.RESTORE:
        return
    sink = ctx.writer.update(captured.t2_tree)
    revert_image(plan, ctx.writer.source(captured.t2_tree), store, sink)
    captured.tree = sink.finish()
    captured.bytes_stored += sink.bytes_stored
