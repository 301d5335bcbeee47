"""Release: commit the overlays, drop the guest's snapshots, unplug what was plugged, delete the scratch disk."""

from __future__ import annotations

from vmbackupd.errors import BackupError, HypervisorError
from vmbackupd.job import undo
from vmbackupd.job.context import BackupContext, uninterrupted


async def run(ctx: BackupContext) -> None:
    """Undo all that is still pending.

    Raises ``HypervisorError`` naming what is left behind; it stays in the journal for a later recovery.
    """
    await ctx.close_storage()
    await _settle(ctx)
    recording = [ctx.entries["bitmaps"]] if "bitmaps" in ctx.entries else []  # stays if the backup is published
    unwound = await uninterrupted(undo.unwind(ctx.undo, ctx.journal, keep=recording))
    for name, failure in unwound.failed:
        raise HypervisorError(
            f"VM {ctx.vm}: {name} could not be undone: {failure}; run vmbackupctl recover"
        ) from failure


async def _settle(ctx: BackupContext) -> None:
    """From here on the guest's trackers count from this backup's T1. Should it never be published, they name a backup
    that nobody finds, and the next one reads more."""
    if not any(disk.tracking for disk in ctx.tracked.values()):
        return
    try:
        if ctx.config.changes.tracking:
            await ctx.helper.settle(ctx.generation)
        else:
            await ctx.helper.untrack()
    except BackupError as error:
        ctx.observer.warning(f"the next backup will read more than what changed: {error}")
