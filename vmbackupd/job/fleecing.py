"""Virtual disks served by QEMU as of one instant: their scratch images, and the undo of all that before it is made."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.job.bases import Start
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.units import MiB, human

log = logging.getLogger("job.fleecing")

ROOM = 256 * MiB  # left on the file system of the scratch images when the backup is given up for the guest's sake


def prepare(ctx: BackupContext, plans: Iterable[DiskPlan], *, scratch: bool = False) -> dict[str, str]:
    """Write down the undo of serving ``plans`` (and the scratch disk); ``{target: path of its scratch image}``."""
    targets = [plan.target for plan in plans if plan.target is not None] + [ctx.scratch_target] * scratch
    if not targets:
        return {}
    directory = Path(ctx.config.scratch.directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {target: str(directory / f"{ctx.domain.uuid}.{target}.{ctx.job}.fleece") for target in targets}
    for path in (*paths.values(), socket_path(ctx)):
        ctx.journal.record("unlink", path=path)
    ctx.entries["fleece"] = ctx.journal.record("end_fleece")
    require_room(ctx)
    return paths


def socket_path(ctx: BackupContext) -> str:
    """Beside the socket of the control channel: there QEMU may make one, and we may open it."""
    return str(Path(ctx.entries["helper"].args["socket"]).with_name(f"{ctx.job}.nbd"))


async def begin(ctx: BackupContext, disks: dict[str, str]) -> None:
    """Serve the disks as of now, with what changed on each since the image it begins as; sets ``ctx.fleece``. Where the
    bitmaps are refused the disks are served without, to be read whole."""
    since = {}
    for target in disks:
        start = ctx.starts.get(target)
        if start is not None and start.base is not None and start.base.token is not None:
            since[target] = start.base.token
    try:
        served = await ctx.hypervisor.begin_fleece(ctx.domain.uuid, disks, socket_path(ctx), since)
    except NotRunning:
        raise
    except HypervisorError as error:
        if not since:
            raise
        log.warning("VM %s: served without bitmaps: %s", ctx.vm, error)
        served = await ctx.hypervisor.begin_fleece(ctx.domain.uuid, disks, socket_path(ctx), {})
        ctx.starts.update(dict.fromkeys(since, Start(None, f"its dirty bitmap cannot be served: {error}")))
    ctx.fleece = dict(served)


async def end(ctx: BackupContext) -> None:
    """The disks are read: the guest need not bear the job any longer."""
    if "fleece" in ctx.entries:
        ctx.fleece = {}
        await ctx.undo_now("fleece")


def require_room(ctx: BackupContext) -> None:
    """Raise ``HypervisorError`` before the file system of the scratch images is full: QEMU would fail the guest's
    writes."""
    status = os.statvfs(ctx.config.scratch.directory)
    free = status.f_bavail * status.f_frsize
    if free < ROOM:
        raise HypervisorError(
            f"VM {ctx.vm}: {ctx.config.scratch.directory} has {human(free)} left, less than {human(ROOM)}: the backup "
            "is given up before the guest's writes fail. Make room, put [scratch] directory elsewhere, or run the "
            "backup at a quieter time"
        )
