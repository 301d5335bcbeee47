"""Inspect: what block devices the guest has, and how each will be captured; refuse what cannot be covered.

The guest helper is started here, because only the guest knows all of its devices.
"""

from __future__ import annotations

from vmbackupd.errors import GuestAgentUnavailable, NotRunning, UncoveredVolume
from vmbackupd.guest.client import GuestHelper
from vmbackupd.host.udev import host_luns
from vmbackupd.job import coverage
from vmbackupd.job.context import BackupContext
from vmbackupd.job.faultpoints import reach


async def run(ctx: BackupContext) -> None:
    """:func:`look`, then refuse: ``UncoveredVolume`` names each device that no method captures and nobody allowed."""
    await look(ctx)
    await _track(ctx)
    refuse_uncovered(ctx)
    ctx.observer.expect(sum(plan.size for plan in ctx.coverage.plans) if ctx.coverage else 0)


async def look(ctx: BackupContext) -> None:
    """Set ``ctx.report`` and ``ctx.coverage``.

    Raises ``NotRunning``, ``GuestAgentUnavailable``, ``GuestAgentRefused`` or ``GuestHelperUnavailable``.
    """
    if not ctx.domain.running:
        raise NotRunning(f"VM {ctx.vm} is not running: start it, a backup needs its running guest")
    if not ctx.domain.has_agent:
        raise GuestAgentUnavailable(
            f"VM {ctx.vm} has no guest agent channel (org.qemu.guest_agent.0): add one to the "
            "domain and install qemu-guest-agent in the guest"
        )
    await ctx.agent("guest-ping", timeout=10.0)
    await _start_helper(ctx)
    await reach("inspect:helper")
    ctx.report = await ctx.helper.probe()
    ctx.coverage = coverage.decide(ctx.domain, ctx.report, host_luns(), t2=ctx.t2_wish)


async def _start_helper(ctx: BackupContext) -> None:
    name = f"org.vmbackupd.{ctx.job}.c"
    socket = await ctx.effect(
        "control", "detach_channel", ctx.hypervisor.attach_channel(ctx.domain.uuid, name), name=name
    )
    await reach("inspect:channel")

    async def start() -> None:
        ctx.undo.helper = await GuestHelper.start(
            ctx.bound_agent, socket, vm=ctx.vm, job=ctx.job, channel=name, lease=ctx.config.guest.lease
        )

    await ctx.effect("helper", "stop_helper", start(), socket=socket)


async def _track(ctx: BackupContext) -> None:
    """Have the guest's kernel mark writes to the pass-through disks, now and until the next backup. Where it does not,
    a disk that no snapshot can hold is uncovered."""
    assert ctx.coverage is not None and ctx.report is not None and ctx.writer is not None
    names = {devno: name for name, devno in ctx.coverage.pass_through_devnos.items()}
    if not ctx.config.changes.tracking and not ctx.coverage.pre_copied:
        await ctx.helper.untrack()
    elif names:
        ctx.tracked = {disk.device: disk for disk in await ctx.helper.track(ctx.writer.repository.id, names)}
        ctx.untracked = {devno: disk.reason for devno, disk in ctx.tracked.items() if not disk.tracking}
        ctx.coverage = coverage.decide(
            ctx.domain, ctx.report, host_luns(), t2=ctx.t2_wish, untracked=ctx.untracked
        )


def refuse_uncovered(ctx: BackupContext) -> None:
    """Raise ``UncoveredVolume`` for what is neither captured nor allowed; warn of what is allowed."""
    assert ctx.coverage is not None
    ctx.coverage = coverage.allow(ctx.coverage, ctx.options.allow_uncovered)
    refused = [item for item in ctx.coverage.items if item.decision == "uncovered"]
    if refused:
        listed = "; ".join(f"{item.device} ({item.id}): {item.reason}" for item in refused)
        raise UncoveredVolume(
            f"VM {ctx.vm}: {len(refused)} volume(s) cannot be captured: {listed}. Nothing was backed up. "
            "Allow a backup without one of them with --allow-uncovered ID"
        )
    for item in ctx.coverage.items:
        if item.decision == "allowed":
            ctx.observer.warning(f"{item.device} ({item.id}) is not in this backup: {item.reason}")
