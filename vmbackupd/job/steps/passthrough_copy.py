"""Copy of the pass-through volumes: the helper serves each disk as of T1 over NBD, the engine stores it."""

from __future__ import annotations

import asyncio

from vmbackupd.engine.copyloop import Progress, copy_in
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import GuestProtocolError
from vmbackupd.guest.client import open_data_channel
from vmbackupd.job.context import BackupContext, Captured
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.faultpoints import reach
from vmbackupd.job.snapshots import require_valid

CONNECT_DEADLINE = 30.0


async def run(ctx: BackupContext) -> None:
    """Store every pass-through disk as of T1; its tree is in ``ctx.captured``.

    Raises ``SnapshotLost`` as soon as a snapshot no longer holds, ``SourceError`` when a disk cannot be read.
    """
    assert ctx.coverage is not None
    plans = ctx.coverage.pass_through
    if not plans:
        return
    devnos = {plan.id: plan.devno for plan in plans if plan.devno is not None}
    await ctx.helper.serve(f"org.vmbackupd.{ctx.job}.d0", devnos)
    for plan in plans:
        await _copy(ctx, plan)
        await reach("passthrough-copy:one")
    require_valid(ctx, await ctx.helper.status())


async def _copy(ctx: BackupContext, plan: DiskPlan) -> None:
    assert ctx.writer is not None
    channel = await open_data_channel(ctx.data_socket, timeout=CONNECT_DEADLINE)
    with channel:  # the connection has its own duplicate
        source = await asyncio.to_thread(NbdConnection, fd=channel.fileno(), export=plan.id)
    try:
        if source.size != plan.size:
            raise GuestProtocolError(
                f"VM {ctx.vm}: the helper serves {plan.id} with {source.size} bytes, its report said {plan.size}"
            )
        sink = ctx.writer.image(source.size)
        progress = Progress()
        await ctx.engine(progress, lambda: copy_in(source, sink, progress), beside=lambda: _check(ctx))
        tree = await asyncio.to_thread(sink.finish)
        ctx.captured[plan.id] = Captured(
            plan, tree=tree, bytes_read=progress.bytes_read, bytes_stored=sink.bytes_stored
        )
    finally:
        await asyncio.to_thread(source.close)


async def _check(ctx: BackupContext) -> None:
    require_valid(ctx, await ctx.helper.status())
