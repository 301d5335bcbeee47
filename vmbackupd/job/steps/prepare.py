"""Prepare: the scratch disk for the COW stores, the data channel, and the snapshot devices ready in the guest."""

from __future__ import annotations

from pathlib import Path

from vmbackupd.errors import GuestProtocolError
from vmbackupd.guest.client import PreparedVolume
from vmbackupd.guest.topology import flatten
from vmbackupd.hypervisor.storage_daemon import create_qcow2
from vmbackupd.job import pools, stores
from vmbackupd.job.context import BackupContext
from vmbackupd.job.faultpoints import reach
from vmbackupd.model import Segment, VolumeMap
from vmbackupd.units import SECTOR, MiB, round_up

CHUNK_SECTORS = 128  # 64 KiB: the chunk of the repository, so that a reverted chunk is one of the COW store's


async def run(ctx: BackupContext) -> None:
    """Set ``ctx.scratch``, ``ctx.data_socket`` and ``ctx.volume_maps``; the guest holds inactive snapshots
    afterwards."""
    assert ctx.coverage is not None
    if ctx.coverage.pass_through:
        name = ctx.data_port
        ctx.data_socket = await ctx.effect(
            "data", "detach_channel", ctx.hypervisor.attach_channel(ctx.domain.uuid, name), name=name
        )
    await reach("prepare:channel")
    if not ctx.coverage.volumes:
        return  # nothing to snapshot in the guest: every disk is captured inside the freeze
    await _attach_scratch(ctx)
    await reach("prepare:scratch")
    prepared = await ctx.effect(
        "snapshots",
        "release_snapshots",
        ctx.helper.prepare(scratch_serial=f"vmbk-{ctx.job}", chunk_sectors=CHUNK_SECTORS, volumes=_store_sizes(ctx)),
        socket=ctx.entries["helper"].args["socket"],
    )
    ctx.volume_maps = tuple(_map(ctx, volume) for volume in prepared)
    await pools.touch(ctx)


def _store_sizes(ctx: BackupContext) -> dict[str, int]:
    """Bytes of each volume's COW store, by the volume's device number."""
    assert ctx.coverage is not None
    volumes = {volume.devno: volume.size for volume in ctx.coverage.volumes}
    return stores.sizes(volumes, CHUNK_SECTORS * SECTOR, share=ctx.config.scratch.share, limit=ctx.config.scratch.size)


async def _attach_scratch(ctx: BackupContext) -> None:
    assert ctx.coverage is not None
    directory = Path(ctx.config.scratch.directory)
    directory.mkdir(parents=True, exist_ok=True)
    ctx.scratch = str(directory / f"{ctx.domain.uuid}.{ctx.job}.scratch.qcow2")
    size = round_up(sum(_store_sizes(ctx).values()), MiB)
    await ctx.effect("scratch-file", "unlink", create_qcow2(ctx.scratch, size), path=ctx.scratch)
    ctx.scratch_target = await ctx.effect(
        "scratch",
        "detach_scratch",
        ctx.hypervisor.attach_scratch(ctx.domain.uuid, ctx.scratch, f"vmbk-{ctx.job}"),
        path=ctx.scratch,
    )


def _map(ctx: BackupContext, volume: PreparedVolume) -> VolumeMap:
    """Where the volume lies, from the report the plan was made of: its table may not have changed since."""
    assert ctx.report is not None and ctx.coverage is not None
    device = ctx.report.by_devno(volume.device)
    if device is None or device.dm is None or device.dm.table != volume.table or device.size != volume.size:
        raise GuestProtocolError(
            f"VM {ctx.vm}: the guest changed the table of {volume.name} between inspect and prepare; "
            "run the backup again"
        )
    ids = {plan.devno: plan.id for plan in ctx.coverage.plans if plan.devno is not None}
    segments, offset = [], 0
    for disk, disk_offset, length in flatten(ctx.report, volume.device):
        # a piece on a disk that is not captured (allowed by name) keeps a name that no plan has
        segments.append(Segment(offset, ids.get(disk, f"uncaptured:{disk}"), disk_offset, length))
        offset += length
    return VolumeMap(volume.name, volume.size, volume.store_offset, volume.store_length, tuple(segments))
