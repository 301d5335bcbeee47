"""T2: the hypervisor snapshots the virtual disks and the scratch disk in one transaction.

From here on the COW stores are safe in the T2 image, so the guest is relieved of its snapshots at once, and of the
scratch disk too, unless QEMU serves it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from vmbackupd.job import fleecing, overlays
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.faultpoints import reach
from vmbackupd.job.snapshots import require_valid
from vmbackupd.model import T2, Method


async def run(ctx: BackupContext) -> None:
    """Set ``ctx.t2``; afterwards the base images are still, or served as of T2.

    Raises ``SnapshotLost`` when T1 did not hold until the transaction had ended.
    """
    assert ctx.coverage is not None
    ctx.t2 = ctx.t1
    plans = [plan for plan in ctx.coverage.virtual if plan.method is Method.GUEST_SNAPSHOT]
    if not ctx.coverage.volumes:
        return
    served = any(plan.t2 is T2.FLEECE for plan in plans)
    if plans:
        cut = await (_serve(ctx, plans) if served else _overlay(ctx, plans))
        await reach("t2-snapshot:prepared")
        require_valid(ctx, await ctx.helper.status())
        await ctx.uninterrupted(cut())
        ctx.t2 = time.time()
        await reach("t2-snapshot:taken")
        require_valid(ctx, await ctx.helper.status())
    await ctx.undo_now("snapshots")
    await reach("t2-snapshot:released")
    if not served:
        await ctx.undo_now("scratch")


async def _overlay(ctx: BackupContext, plans: list[DiskPlan]) -> Callable[[], Awaitable[None]]:
    paths = await overlays.prepare(ctx, plans, scratch=True)
    return lambda: ctx.hypervisor.snapshot(ctx.domain.uuid, paths)


async def _serve(ctx: BackupContext, plans: list[DiskPlan]) -> Callable[[], Awaitable[None]]:
    disks = fleecing.prepare(ctx, plans, scratch=True)
    return lambda: fleecing.begin(ctx, disks)
