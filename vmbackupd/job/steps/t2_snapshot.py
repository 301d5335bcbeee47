"""T2: the hypervisor snapshots the virtual disks and the scratch disk in one transaction.

From here on the COW stores are safe in the T2 image, so the guest is relieved of its snapshots and of the scratch
disk at once.
"""

from __future__ import annotations

import time

from vmbackupd.job import overlays
from vmbackupd.job.context import BackupContext
from vmbackupd.job.faultpoints import reach
from vmbackupd.job.snapshots import require_valid
from vmbackupd.model import Method


async def run(ctx: BackupContext) -> None:
    """Set ``ctx.t2``; afterwards the base images are still, and the guest has none of our devices.

    Raises ``SnapshotLost`` when T1 did not hold until the transaction had ended.
    """
    assert ctx.coverage is not None
    ctx.t2 = ctx.t1
    plans = [plan for plan in ctx.coverage.virtual if plan.method is Method.GUEST_SNAPSHOT]
    if not ctx.coverage.volumes:
        return
    if plans:
        paths = await overlays.prepare(ctx, plans, scratch=True)
        await reach("t2-snapshot:prepared")
        require_valid(ctx, await ctx.helper.status())
        await ctx.uninterrupted(ctx.hypervisor.snapshot(ctx.domain.uuid, paths))
        ctx.t2 = time.time()
        await reach("t2-snapshot:taken")
        require_valid(ctx, await ctx.helper.status())
    await ctx.undo_now("snapshots")
    await reach("t2-snapshot:released")
    await ctx.undo_now("scratch")
