"""What thin pools below pass-through disks tell of changes, where that is asked for (``[changes] thin``)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from vmbackupd.guest.replies import ThinState
from vmbackupd.job.bases import Base
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.model import Method


@dataclass(frozen=True, slots=True)
class Thin:
    """A disk at T1: what its pools tell, and since which backup."""

    state: ThinState
    base: Base | None


async def touch(ctx: BackupContext) -> None:
    """Before T1: have the pools prepared so that the next backup can ask them."""
    devices = [plan.devno for plan in _plans(ctx) if plan.devno is not None]
    for pool in await ctx.helper.touch_pools(devices) if devices else []:
        if not pool.touched:
            ctx.observer.warning(f"the thin pool {pool.name} will not tell the next backup what changed: {pool.reason}")


async def compare(ctx: BackupContext) -> None:
    """After T1: ask the pools what changed since the newest backup, where no tracker knows. Sets ``ctx.thin``."""
    assert ctx.bases is not None
    bases = {
        plan.devno: await asyncio.to_thread(ctx.bases.latest, plan.id, plan.size)
        for plan in _plans(ctx)
        if plan.devno is not None
    }
    since = {devno: "" if base is None or _tracked(ctx, devno) else base.moment for devno, base in bases.items()}
    states = await ctx.helper.compare_pools(since) if since else []
    ctx.thin = {state.device: Thin(state, bases[state.device]) for state in states}


def _plans(ctx: BackupContext) -> list[DiskPlan]:
    assert ctx.coverage is not None
    wanted = ctx.config.changes.thin
    return [plan for plan in ctx.coverage.pass_through if wanted and plan.method is Method.GUEST_SNAPSHOT]


def _tracked(ctx: BackupContext, devno: str) -> bool:
    tracked = ctx.tracked.get(devno)
    return tracked is not None and tracked.generation is not None and devno not in ctx.untrusted
