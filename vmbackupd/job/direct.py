"""Pass-through disks that the host can read by itself: faster than through the guest, and T1 all the same.

The host reads the LUN while the guest writes to it. What tells old from new is known afterwards: the guest's kernel
completes an exception in the COW store before it lets a write pass that would change a chunk. So a chunk for which
there is no exception *after* it was read was read as it was at T1, and the others are read again, through the guest,
from the snapshot.

Only the domain's own definition says which LUN of the host a disk is. What a guest reports (a WWN, its iSCSI sessions)
could be that of somebody else's disk, whose content would then be in a backup of this guest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import HypervisorError, SourceError
from vmbackupd.guest.client import EXCEPTIONS
from vmbackupd.hypervisor.base import DiskSource
from vmbackupd.hypervisor.storage_daemon import ImageSpec, IscsiLun, StorageDaemon
from vmbackupd.job import reading
from vmbackupd.job.context import BackupContext
from vmbackupd.job.exports import bitmap
from vmbackupd.job.reading import Reading

ISCSI_PORT = 3260


def lun_of(source: DiskSource | None) -> ImageSpec | None:
    """How the host opens the LUN behind ``source`` of a ``device='lun'`` disk; None where it does not know how."""
    if source is None:
        return None
    if source.kind == "block" and source.path:
        return ImageSpec("raw", path=source.path, live=True)
    if source.kind == "network" and source.protocol == "iscsi" and source.name and source.host:
        iqn, _, lun = source.name.partition("/")
        if iqn and (lun or "0").isdecimal():
            host = f"[{source.host}]" if ":" in source.host else source.host
            portal = f"{host}:{source.port or ISCSI_PORT}"
            return ImageSpec("raw", iscsi=IscsiLun(portal, iqn, int(lun or "0")), live=True)
    return None


async def as_of_t1(ctx: BackupContext, disk: Reading) -> Bitmap:
    """Read the changed chunks of a disk that is snapshotted in the guest; returns those that are (still) to be read
    through the guest: what it overwrote since T1, or everything where the host cannot read the disk. The helper has to
    serve the disk."""
    if not await live(ctx, disk):
        return disk.changed
    overwritten = await bitmap(ctx, disk.plan.id + EXCEPTIONS, disk.chunks)
    overwritten.intersect(disk.changed)
    return overwritten


async def live(ctx: BackupContext, disk: Reading) -> bool:
    """Read the changed chunks of a disk as they are now. False where the host cannot; why, is a warning."""
    plan = disk.plan
    spec = lun_of(plan.source) if ctx.config.passthrough.direct == "auto" else None
    if spec is None or not disk.changed.count():
        return False
    try:
        async with _opened(ctx, plan.size, spec) as source:
            await reading.read(ctx, disk, source, disk.changed)
    except (HypervisorError, SourceError) as error:
        ctx.observer.warning(f"{plan.id}: it is read through the guest, because the host could not: {error}")
        return False
    disk.plan = replace(plan, details={**plan.details, "read_by": "host"})
    return True


@asynccontextmanager
async def _opened(ctx: BackupContext, size: int, spec: ImageSpec) -> AsyncIterator[NbdConnection]:
    async with StorageDaemon(ctx.config.runtime_directory) as daemon:
        where, name = await daemon.export("lun", spec)
        source = await asyncio.to_thread(NbdConnection, unix=where, export=name)
        try:
            if source.size != size:
                raise HypervisorError(f"{spec} has {source.size} bytes, the guest's disk {size}")
            yield source
        finally:
            await asyncio.to_thread(source.close)
