"""QEMU's dirty bitmaps in a backup: what each virtual disk can be built on, and the record for the next backup.

A backup begins a checkpoint before its freeze, and reads what changed since the checkpoint of the backup it builds on.
What is changed between T1 and T2 and set back in this backup is thus in the new bitmap: the next backup reads it again.
The new checkpoint stays if the backup is published, and then the older ones go; else the new one goes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping

from vmbackupd.engine.audit import AuditSink
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.copyloop import Progress, copy_in
from vmbackupd.engine.dirty import data_chunks, dirty_chunks
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import HypervisorError, NotRunning
from vmbackupd.hypervisor.base import BITMAP_PREFIX
from vmbackupd.job.audit import whole
from vmbackupd.job.bases import Start
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan

log = logging.getLogger("job.bitmaps")


def checkpoint(ctx: BackupContext) -> str:
    """The name of this backup's checkpoint, which is the token of its virtual disks."""
    return f"{BITMAP_PREFIX}{ctx.job}"


async def begin(ctx: BackupContext) -> None:
    """Set ``ctx.starts`` and ``ctx.recorded``: what each virtual disk begins as, and which record from now on."""
    assert ctx.coverage is not None
    plans = [plan for plan in ctx.coverage.virtual if plan.target is not None]
    if not ctx.config.changes.bitmaps:
        off = Start(None, "dirty bitmaps are switched off ([changes] bitmaps)")
        ctx.starts.update({plan.id: off for plan in plans})
        return
    known, begun = await _record(ctx, [plan.target for plan in plans if plan.target is not None])
    for plan in plans:
        assert plan.target is not None
        why_none = begun.get(plan.target, "it has no dirty bitmap")
        if why_none is None:
            ctx.recorded.add(plan.id)
        start = await _start(ctx, plan, known)
        if start.base is None and not start.reason:
            start = Start(None, why_none or "no earlier backup recorded what changes on it")
        ctx.starts[plan.id] = start


async def _record(ctx: BackupContext, targets: list[str]) -> tuple[Collection[str], Mapping[str, str | None]]:
    """Begin this backup's checkpoint; the names of the earlier ones, and why a disk is not recorded."""
    ctx.entries["bitmaps"] = ctx.journal.record("drop_bitmaps", name=checkpoint(ctx))
    try:
        known = await ctx.hypervisor.bitmaps(ctx.domain.uuid)
        begun = await ctx.uninterrupted(ctx.hypervisor.begin_bitmaps(ctx.domain.uuid, checkpoint(ctx), targets))
    except NotRunning:
        raise
    except HypervisorError as error:
        log.warning("VM %s: no dirty bitmaps: %s", ctx.vm, error)
        return (), dict.fromkeys(targets, str(error))
    return known, begun


async def _start(ctx: BackupContext, plan: DiskPlan, known: Collection[str]) -> Start:
    """The newest earlier image that a bitmap still counts from; the reason why the newest of all is none."""
    assert ctx.bases is not None and plan.target is not None
    if ctx.options.full:
        return Start(None, "a full backup was asked for")
    tokens = await asyncio.to_thread(ctx.bases.tokens, plan.id)
    reason = ""
    for token in [*tokens[:1], *(token for token in tokens[1:] if token in known)]:
        try:
            why_not = (await ctx.hypervisor.bitmap_reasons(ctx.domain.uuid, token, [plan.target]))[plan.target]
        except HypervisorError as error:
            why_not = str(error)
        base = None if why_not else await asyncio.to_thread(ctx.bases.recorded_by, token, plan.id, plan.size)
        if base is not None:
            return Start(base)
        reason = reason or why_not or "the backup it is recorded since is gone, damaged, or of a disk of another size"
    return Start(None, reason)


def changed_since(image: ImageSource, source: NbdConnection, progress: Progress) -> Bitmap:
    """The chunks of a disk that may differ from ``image``, by the dirty bitmap that ``source`` was opened with.
    Blocking.

    Of a disk that was made smaller and large again QEMU marks nothing, and it reads as zeros where it was cut: what
    reads as zeros without having been marked is compared. Raises ``SourceError``, ``RepositoryCorrupt``, ``Cancelled``.
    """
    changed = dirty_chunks(source, image.chunk_size, progress)
    unmarked = whole(changed.length)
    unmarked.subtract(data_chunks(source, image.chunk_size, progress))
    unmarked.subtract(changed)
    cut = AuditSink(image)
    copy_in(source, cut, Progress(), only=unmarked)
    for first, count in cut.missed.runs():
        changed.set(max(0, first - 1), count + min(first, 1))  # the chunk in which it was cut as well
    return changed


async def settle(ctx: BackupContext) -> None:
    """This backup is published: its checkpoint stays, earlier ones go. What cannot go now does so after the next."""
    entry = ctx.entries.pop("bitmaps", None)
    if entry is not None:
        ctx.journal.done(entry)
    try:
        for name in await ctx.hypervisor.bitmaps(ctx.domain.uuid):
            if name != checkpoint(ctx):
                await ctx.uninterrupted(ctx.hypervisor.drop_bitmaps(ctx.domain.uuid, name))
    except HypervisorError as error:
        log.warning("VM %s: an earlier checkpoint stays for now: %s", ctx.vm, error)
