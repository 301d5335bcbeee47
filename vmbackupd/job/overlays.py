"""Overlays of the hypervisor's snapshots: where they lie, and their undo before they are made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan


async def prepare(ctx: BackupContext, plans: Iterable[DiskPlan], *, scratch: bool = False) -> dict[str, str]:
    """Make the overlay files of ``plans`` (and of the scratch disk), each journaled first; returns ``{target:
    path}``."""
    paths = {plan.target: overlay_path(ctx, plan) for plan in plans if plan.target is not None}
    if scratch:
        paths[ctx.scratch_target] = f"{ctx.scratch}.t2"
    for target, path in paths.items():
        ctx.entries[f"overlay:{target}"] = ctx.journal.record("drop_overlay", path=path)
    if paths:
        await ctx.uninterrupted(ctx.hypervisor.prepare_overlays(ctx.domain.uuid, paths))
    return paths


def overlay_path(ctx: BackupContext, plan: DiskPlan) -> str:
    """Beside the image, where its storage has the room and the labels; for a block device in the scratch directory."""
    assert plan.source is not None and plan.source.path is not None
    if plan.source.kind == "file":
        return f"{plan.source.path}.{ctx.job}"
    return str(Path(ctx.config.scratch.directory) / f"{ctx.domain.uuid}.{plan.target}.{ctx.job}.qcow2")
