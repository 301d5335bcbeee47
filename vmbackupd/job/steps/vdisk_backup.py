"""Back up the virtual disks, which are still since T2 or served as of T2, and the domain's configuration.

Of a disk whose dirty bitmap counts from an earlier backup only what changed is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from vmbackupd.engine.copyloop import Progress, copy_in
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import HypervisorError, NotRunning, SourceError
from vmbackupd.hypervisor.base import bitmap_name
from vmbackupd.hypervisor.storage_daemon import ImageSpec, StorageDaemon
from vmbackupd.job import bitmaps, fleecing, reading
from vmbackupd.job.bases import Start
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.faultpoints import reach
from vmbackupd.model import T2, Change, ChangeRecord, Method
from vmbackupd.units import MiB

CONFIG_LIMIT = 64 * MiB  # bytes of NVRAM or TPM state, far above what they are


async def run(ctx: BackupContext) -> None:
    """Store every virtual disk as of its hypervisor snapshot, the COW stores, and the domain's configuration.

    Raises ``SourceError``, ``NotRunning`` when QEMU ended while it served, ``HypervisorError``.
    """
    assert ctx.coverage is not None
    storage = StorageDaemon(ctx.config.runtime_directory)
    await storage.open()
    ctx.storage = storage
    for plan in ctx.coverage.virtual:
        try:
            await _back_up(ctx, plan)
        except SourceError as error:
            if plan.t2 is T2.FLEECE and not (await ctx.hypervisor.domain(ctx.domain.uuid)).running:
                raise NotRunning(
                    f"VM {ctx.vm} stopped while its QEMU served {plan.id} as of the snapshot: run the backup again"
                ) from error
            raise
        await reach("vdisk-backup:one")
    if any(plan.method is Method.GUEST_SNAPSHOT for plan in ctx.coverage.virtual):
        await _store_stores(ctx)
    await fleecing.end(ctx)
    await ctx.close_storage()
    await asyncio.to_thread(_store_configuration, ctx)


async def _back_up(ctx: BackupContext, plan: DiskPlan) -> None:
    async with _opened(ctx, plan) as (source, start):
        if source.size != plan.size:
            raise HypervisorError(
                f"VM {ctx.vm}: the image of {plan.id} has {source.size} bytes, expected {plan.size}: "
                "was it resized during the backup? Run it again"
            )
        disk = await _begin(ctx, plan, source, start)
        await reading.inspect_unchanged(ctx, disk, source)
        await reading.read(ctx, disk, source, disk.changed)
        await reading.distrust(ctx, disk, source)
    captured = disk.captured(await asyncio.to_thread(disk.sink.finish))
    if plan.method is Method.GUEST_SNAPSHOT:
        captured = replace(captured, tree=None, t2_tree=captured.tree)
    ctx.captured[plan.id] = captured


async def _begin(ctx: BackupContext, plan: DiskPlan, source: NbdConnection, start: Start) -> reading.Reading:
    """What is to be read: the chunks that the bitmap marks, or everything."""
    assert ctx.writer is not None
    token = bitmaps.checkpoint(ctx) if plan.id in ctx.recorded else None
    if start.base is None:
        return reading.start(ctx, plan, None, None, ChangeRecord(reason=start.reason, token=token))
    progress, image = Progress(), ctx.writer.source(start.base.tree)
    changed = await ctx.engine(progress, lambda: bitmaps.changed_since(image, source, progress))
    return reading.start(ctx, plan, start.base, changed, ChangeRecord(Change.BITMAP, start.base.backup, token=token))


@asynccontextmanager
async def _opened(ctx: BackupContext, plan: DiskPlan) -> AsyncIterator[tuple[NbdConnection, Start]]:
    """A connection to the disk as of its snapshot, with its bitmap if there is a base; and what it begins as."""
    start = ctx.starts.get(plan.id, Start(None))
    if plan.t2 is T2.FLEECE:
        source = await _served(ctx, plan.target)
    else:
        source, start = await _still(ctx, plan, start)
    try:
        if start.base is not None and not source.has_bitmap:
            start = Start(None, "its dirty bitmap is not served")
        yield source, start
    finally:
        await asyncio.to_thread(source.close)


async def _served(ctx: BackupContext, target: str | None) -> NbdConnection:
    assert target is not None
    export = ctx.fleece[target]
    socket = fleecing.socket_path(ctx)
    return await asyncio.to_thread(NbdConnection, unix=socket, export=export.name, bitmap=export.bitmap)


async def _still(ctx: BackupContext, plan: DiskPlan, start: Start) -> tuple[NbdConnection, Start]:
    """The base image below the overlay. A bitmap in it that cannot be read costs a full read."""
    assert ctx.storage is not None and plan.source is not None and plan.source.path is not None
    spec = ImageSpec(driver=plan.source.format, path=plan.source.path)
    name = None
    if start.base is not None and start.base.token is not None and plan.target is not None:
        name = bitmap_name(start.base.token, plan.target)
        try:
            socket, export = await ctx.storage.export(plan.id, spec, bitmap=name)
        except HypervisorError as error:
            name, start = None, Start(None, f"its dirty bitmap cannot be read: {error}")
    if name is None:
        socket, export = await ctx.storage.export(plan.id, spec)
    return await asyncio.to_thread(NbdConnection, unix=socket, export=export, bitmap=name), start


async def _store_stores(ctx: BackupContext) -> None:
    """The scratch disk, which holds the COW stores: whole, for it is new in every backup."""
    assert ctx.storage is not None and ctx.writer is not None
    if ctx.scratch_target in ctx.fleece:
        source = await _served(ctx, ctx.scratch_target)
    else:
        socket, export = await ctx.storage.export("scratch", ImageSpec(driver="qcow2", path=ctx.scratch))
        source = await asyncio.to_thread(NbdConnection, unix=socket, export=export)
    try:
        sink = ctx.writer.image(source.size)
        progress = Progress()
        await ctx.engine(progress, lambda: copy_in(source, sink, progress), beside=partial(reading.check, ctx))
        ctx.store_tree, ctx.store_size = await asyncio.to_thread(sink.finish), source.size
    finally:
        await asyncio.to_thread(source.close)


def _store_configuration(ctx: BackupContext) -> None:
    """The domain's definition, and NVRAM and TPM state where there are any."""
    assert ctx.writer is not None
    blobs = ctx.config_blobs
    for name, text in ctx.domain.config.items():
        blobs[name] = ctx.writer.blob(text.encode())
    if ctx.domain.nvram is not None:
        blobs["nvram"] = ctx.writer.blob(_read(Path(ctx.domain.nvram)))
    if ctx.domain.tpm_state is not None:
        root = Path(ctx.domain.tpm_state)
        for path in sorted(item for item in root.rglob("*") if item.is_file() and not item.name.startswith(".")):
            blobs[f"tpm/{path.relative_to(root)}"] = ctx.writer.blob(_read(path))


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > CONFIG_LIMIT:
        raise HypervisorError(f"{path} has {size} bytes; NVRAM or TPM state of at most {CONFIG_LIMIT} is expected")
    return path.read_bytes()
