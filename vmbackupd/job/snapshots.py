"""Whether the snapshots in the guest still hold T1."""

from __future__ import annotations

from vmbackupd.errors import SnapshotLost
from vmbackupd.guest.client import HelperStatus
from vmbackupd.job.context import BackupContext


def require_valid(ctx: BackupContext, status: HelperStatus) -> None:
    """Raise ``SnapshotLost`` naming the volume unless boot, tables and stores are as they were at T1."""
    assert ctx.report is not None
    if status.boot_id != ctx.report.boot_id:
        raise SnapshotLost(
            f"VM {ctx.vm} was rebooted during the backup: its first snapshot is gone; run the backup again"
        )
    by_device = {volume.device: volume for volume in status.volumes}
    for planned in ctx.coverage.volumes if ctx.coverage is not None else ():
        volume = by_device.get(planned.devno)
        name = f"{planned.name} ({planned.devno})"
        if volume is None:
            raise SnapshotLost(f"VM {ctx.vm}: the guest no longer knows the snapshot of {name}; run the backup again")
        if not volume.table_ok:
            raise SnapshotLost(
                f"VM {ctx.vm}: the table of {name} was reloaded during the backup (lvextend, pvmove, lvchange?): "
                "its snapshot is void; run the backup again"
            )
        if not volume.valid:
            raise SnapshotLost(
                f"VM {ctx.vm}: the COW store of {name} is full or failed ({volume.allocated} of "
                f"{volume.total} sectors in use): its snapshot is void. Give it more room ([scratch] size) or "
                "run the backup at a quieter time"
            )
