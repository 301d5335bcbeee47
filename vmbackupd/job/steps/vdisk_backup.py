"""Back up the virtual disks from their base images, which are still since T2, and the domain's configuration."""

from __future__ import annotations

import asyncio
from pathlib import Path

from vmbackupd.engine.copyloop import Progress, copy_in
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.storage_daemon import ImageSpec, StorageDaemon
from vmbackupd.job.context import BackupContext, Captured
from vmbackupd.job.faultpoints import reach
from vmbackupd.model import Method
from vmbackupd.units import MiB

CONFIG_LIMIT = 64 * MiB  # bytes of NVRAM or TPM state, far above what they are


async def run(ctx: BackupContext) -> None:
    """Store every virtual disk as of its hypervisor snapshot, the COW stores, and the domain's configuration."""
    assert ctx.coverage is not None
    storage = StorageDaemon(ctx.config.runtime_directory)
    await storage.open()
    ctx.storage = storage
    for plan in ctx.coverage.virtual:
        assert plan.source is not None and plan.source.path is not None
        spec = ImageSpec(driver=plan.source.format, path=plan.source.path)
        tree, size, progress, stored = await _copy(ctx, plan.id, spec)
        if size != plan.size:
            raise HypervisorError(
                f"VM {ctx.vm}: the image of {plan.id} has {size} bytes, expected {plan.size}: "
                "was it resized during the backup? Run it again"
            )
        reverts = plan.method is Method.GUEST_SNAPSHOT
        ctx.captured[plan.id] = Captured(
            plan,
            tree=None if reverts else tree,
            t2_tree=tree if reverts else None,
            bytes_read=progress.bytes_read,
            bytes_stored=stored,
        )
        await reach("vdisk-backup:one")
    if any(plan.method is Method.GUEST_SNAPSHOT for plan in ctx.coverage.virtual):
        ctx.store_tree, ctx.store_size, _, _ = await _copy(ctx, "scratch", ImageSpec(driver="qcow2", path=ctx.scratch))
    await ctx.close_storage()
    await asyncio.to_thread(_store_configuration, ctx)


async def _copy(ctx: BackupContext, name: str, spec: ImageSpec) -> tuple[str, int, Progress, int]:
    assert ctx.storage is not None and ctx.writer is not None
    socket, export = await ctx.storage.export(name, spec)
    source = await asyncio.to_thread(NbdConnection, unix=socket, export=export)
    try:
        sink = ctx.writer.image(source.size)
        progress = Progress()
        await ctx.engine(progress, lambda: copy_in(source, sink, progress))
        return await asyncio.to_thread(sink.finish), source.size, progress, sink.bytes_stored
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
