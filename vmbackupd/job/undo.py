"""The undo of every effect a job has on guest and host: the same code unwinds a failed job and recovers after a crash.

Each undo is idempotent and works from any state the effect may have been left in, also "never begun". An undo that has
to do with the running guest has nothing to do when the domain is off: what it would remove died with QEMU.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vmbackupd.errors import (
    BackupError,
    GuestAgentRefused,
    GuestHelperError,
    GuestHelperUnavailable,
    GuestProtocolError,
    HypervisorError,
    NotFound,
    NotRunning,
)
from vmbackupd.guest.client import INSTALLED_TIMEOUT, RECONNECT_TIMEOUT, GuestHelper, remove_leftovers
from vmbackupd.hypervisor.base import Hypervisor
from vmbackupd.job.journal import Entry, Journal

log = logging.getLogger("job.undo")

AGENT_TIMEOUT = 20.0
HELPER_LOST = (GuestHelperUnavailable, GuestHelperError, GuestProtocolError, OSError)


@dataclass
class UndoContext:
    """What an undo works with. ``helper`` is the connection a running job still has to the guest helper."""

    hypervisor: Hypervisor
    job: str
    vm: str
    uuid: str
    helper: GuestHelper | None = None
    progress: Callable[[int, int], None] | None = None


@dataclass
class Unwound:
    """What an unwinding did: the undos that were made, and those that failed with their errors."""

    undone: list[str] = field(default_factory=list)
    failed: list[tuple[str, BaseException]] = field(default_factory=list)


async def thaw(ctx: UndoContext, args: dict[str, str]) -> None:
    """Thaw the guest and ask whether it is thawed."""
    status = await ctx.hypervisor.agent(ctx.uuid, "guest-fsfreeze-status", None, timeout=AGENT_TIMEOUT)
    if status != "thawed":
        await ctx.hypervisor.agent(ctx.uuid, "guest-fsfreeze-thaw", None, timeout=AGENT_TIMEOUT)
        status = await ctx.hypervisor.agent(ctx.uuid, "guest-fsfreeze-status", None, timeout=AGENT_TIMEOUT)
    if status != "thawed":
        raise HypervisorError(f"VM {ctx.vm}: the guest agent says the guest is {status!r} after a thaw")


async def release_snapshots(ctx: UndoContext, args: dict[str, str]) -> None:
    """Drop the snapshots in the guest: through the connection we have, a new one to the same helper, or a new
    helper."""
    try:
        helper = await _connected(ctx, args)
        await helper.release()
    except HELPER_LOST as error:
        await _drop_helper(ctx, args, error)


async def stop_helper(ctx: UndoContext, args: dict[str, str]) -> None:
    """End the helper's process in the guest and remove its file."""
    try:
        await _quit(ctx, await _connected(ctx, args))
    except HELPER_LOST as error:
        await _drop_helper(ctx, args, error)
        if ctx.helper is not None:
            with suppress(*HELPER_LOST):  # it ends by its lease, or with its port
                await _quit(ctx, ctx.helper)


async def _quit(ctx: UndoContext, helper: GuestHelper) -> None:
    ctx.helper = None
    try:
        await helper.quit()
    finally:
        await helper.close()


async def _connected(ctx: UndoContext, args: dict[str, str], timeout: float = RECONNECT_TIMEOUT) -> GuestHelper:
    if ctx.helper is None:
        ctx.helper = await GuestHelper.reconnect(args["socket"], vm=ctx.vm, job=ctx.job, timeout=timeout)
    return ctx.helper


async def _drop_helper(ctx: UndoContext, args: dict[str, str], error: BaseException) -> None:
    log.warning(
        "VM %s: the guest helper of job %s does not answer (%s); starting another to clean up", ctx.vm, ctx.job, error
    )
    helper, ctx.helper = ctx.helper, None
    if helper is not None:
        await helper.close()
    try:
        await remove_leftovers(partial(_agent, ctx), vm=ctx.vm, job=ctx.job)
    except GuestAgentRefused as refused:
        await _release_through_installed(ctx, args, refused)


async def _release_through_installed(ctx: UndoContext, args: dict[str, str], refused: GuestAgentRefused) -> None:
    """Nothing was pushed into such a guest. Its service manager cleans up after a helper that died and starts it anew
    on its port: that one confirms that nothing is left."""
    try:
        helper = await _connected(ctx, args, INSTALLED_TIMEOUT)
        await helper.release()
    except HELPER_LOST as error:
        log.warning("VM %s: %s; none has answered since (%s)", ctx.vm, refused, error)


async def _agent(ctx: UndoContext, command: str, arguments: object = None, timeout: float = AGENT_TIMEOUT) -> object:
    return await ctx.hypervisor.agent(ctx.uuid, command, arguments, timeout=timeout)  # type: ignore[arg-type]


async def detach_channel(ctx: UndoContext, args: dict[str, str]) -> None:
    await ctx.hypervisor.detach_channel(ctx.uuid, args["name"])


async def detach_scratch(ctx: UndoContext, args: dict[str, str]) -> None:
    await ctx.hypervisor.detach_scratch(ctx.uuid, args["path"])


async def end_fleece(ctx: UndoContext, args: dict[str, str]) -> None:
    await ctx.hypervisor.end_fleece(ctx.uuid)


async def drop_bitmaps(ctx: UndoContext, args: dict[str, str]) -> None:
    with suppress(NotFound):  # with the VM libvirt forgot its checkpoints
        await ctx.hypervisor.drop_bitmaps(ctx.uuid, args["name"])


async def drop_overlay(ctx: UndoContext, args: dict[str, str]) -> None:
    await ctx.hypervisor.drop_overlay(ctx.uuid, args["path"], ctx.progress)


async def unlink(ctx: UndoContext, args: dict[str, str]) -> None:
    path = Path(args["path"])
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            await asyncio.to_thread(os.fsync, fd)
        finally:
            os.close(fd)


async def rmdir(ctx: UndoContext, args: dict[str, str]) -> None:
    """Remove a directory a restore made; one that others use by now stays."""
    with suppress(FileNotFoundError):
        try:
            Path(args["path"]).rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
            log.info("%s is in use and stays", args["path"])


async def undefine(ctx: UndoContext, args: dict[str, str]) -> None:
    with suppress(NotFound):
        await ctx.hypervisor.undefine(args["uuid"])


Undo = Callable[[UndoContext, dict[str, str]], Awaitable[None]]

#: Undos of what lives in the running guest: nothing is left to undo once the domain is off or gone.
LIVE: dict[str, Undo] = {
    "thaw": thaw,
    "release_snapshots": release_snapshots,
    "stop_helper": stop_helper,
    "detach_channel": detach_channel,
    "detach_scratch": detach_scratch,
    "end_fleece": end_fleece,
}
UNDO: dict[str, Undo] = {
    **LIVE,
    "drop_overlay": drop_overlay,
    "drop_bitmaps": drop_bitmaps,
    "unlink": unlink,
    "rmdir": rmdir,
    "undefine": undefine,
}


async def undo_one(ctx: UndoContext, journal: Journal, entry: Entry) -> None:
    """Undo one effect and write down that it is undone."""
    try:
        await UNDO[entry.undo](ctx, entry.args)
    except (NotRunning, NotFound) as error:
        if entry.undo not in LIVE:
            raise
        log.info("VM %s: nothing to undo for %s: %s", ctx.vm, entry.undo, error)
    journal.done(entry)


async def unwind(
    ctx: UndoContext, journal: Journal, only: str | None = None, keep: Collection[Entry] = ()
) -> Unwound:
    """Undo everything pending (or all undos called ``only``) but ``keep``: thaw first, then newest first.

    A failed undo stays in the journal and stops none of the others, save those that depend on it: an image that a disk
    still uses is not deleted.
    """
    result = Unwound()
    ordered = [
        entry
        for entry in sorted(journal.pending, key=lambda entry: entry.undo != "thaw")
        if only in (None, entry.undo) and entry not in keep
    ]
    in_use: set[str] = set()
    for entry in ordered:
        name = describe(entry)
        if entry.undo == "unlink" and entry.args["path"] in in_use:
            result.failed.append((name, HypervisorError(f"{entry.args['path']} is still attached to VM {ctx.vm}")))
            continue
        try:
            await undo_one(ctx, journal, entry)
        except (BackupError, OSError, TimeoutError) as error:
            log.error("VM %s: undo %s failed: %s", ctx.vm, name, error)
            result.failed.append((name, error))
            if entry.undo == "detach_scratch":
                in_use.add(entry.args["path"])
        else:
            result.undone.append(name)
    return result


def describe(entry: Entry) -> str:
    """``entry`` in a few words for logs and results."""
    return f"{entry.undo} {' '.join(entry.args.values())}".strip()
