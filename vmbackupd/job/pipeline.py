"""A backup, from the first look to the published manifest: the steps in their order, and the way back from each.

A step is a coroutine ``run(ctx)``. It writes the undo of an effect into the journal, then makes the effect; it awaits
nothing without a deadline; it imports no other step. Whatever ends the pipeline, everything pending in the journal is
undone before the job ends: thaw first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from vmbackupd.errors import BackupError, Cancelled
from vmbackupd.job import undo
from vmbackupd.job.context import BackupContext, to_the_end
from vmbackupd.job.faultpoints import reach
from vmbackupd.job.steps import (
    inspect,
    passthrough_copy,
    pre_copy,
    prepare,
    release,
    revert,
    seal,
    t1_snapshot,
    t2_snapshot,
    vdisk_backup,
)

log = logging.getLogger("job.pipeline")

Step = Callable[[BackupContext], Awaitable[None]]

STEPS: tuple[tuple[str, Step], ...] = (
    ("inspect", inspect.run),
    ("prepare", prepare.run),
    ("pre-copy", pre_copy.run),
    ("t1-snapshot", t1_snapshot.run),
    ("passthrough-copy", passthrough_copy.run),
    ("t2-snapshot", t2_snapshot.run),
    ("vdisk-backup", vdisk_backup.run),
    ("revert", revert.run),
    ("release", release.run),
    ("seal", seal.run),
)


async def run(ctx: BackupContext, steps: tuple[tuple[str, Step], ...] = STEPS) -> list[dict[str, object]]:
    """Run ``steps``; returns the timeline ``[{step, seconds}]``. On any end but success everything is undone first."""
    timeline: list[dict[str, object]] = []
    try:
        for name, step in steps:
            ctx.observer.step(name)
            await reach(f"{name}:begin")
            began = time.monotonic()
            await step(ctx)
            timeline.append({"step": name, "seconds": round(time.monotonic() - began, 3)})
            log.info("VM %s: %s took %.2f s", ctx.vm, name, time.monotonic() - began)
            await reach(f"{name}:end")
    except BaseException as error:
        await _back_out(ctx, error)
        if isinstance(error, asyncio.CancelledError):
            raise Cancelled(f"VM {ctx.vm}: backup {ctx.job} was cancelled and undone") from error
        raise
    return timeline


async def _back_out(ctx: BackupContext, error: BaseException) -> None:
    """Undo everything after ``error``; what cannot be undone is added to its notes and left in the journal."""
    log.warning("VM %s: undoing %s after %s", ctx.vm, ctx.job, type(error).__name__)
    ctx.observer.step("undo")
    task, _ = await to_the_end(_clean_up(ctx))
    for name, failure in task.result().failed:
        then = "it is tried until the guest agent answers" if name == "thaw" else "run vmbackupctl recover"
        left = f"could not be undone yet: {name}: {failure}; {then}"
        error.add_note(left)
        ctx.observer.warning(left)


async def _clean_up(ctx: BackupContext) -> undo.Unwound:
    """Thaw before anything that could take time, close what the job holds on the host, then undo the rest.

    The storage daemon goes before the overlays: it locks the images they are committed into.
    """
    await undo.unwind(ctx.undo, ctx.journal, only="thaw")
    failed: list[tuple[str, BaseException]] = []
    for name, close in (("storage daemon", ctx.close_storage), ("repository writer", ctx.abort_writer)):
        try:
            await close()
        except (BackupError, OSError) as failure:
            failed.append((name, failure))
    unwound = await undo.unwind(ctx.undo, ctx.journal)
    unwound.failed += failed
    return unwound
