"""T1: freeze through the guest agent, snapshot all volumes in the guest at one instant, thaw.

Inside the same freeze the hypervisor snapshots the virtual disks that have something live on them which the guest
cannot snapshot (method ``freeze-window``). The freeze is measured from sending the freeze to the confirmed thaw.
Past the budget the guest is thawed at once and the backup fails; should this process hang or die, the helper in the
guest thaws it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from vmbackupd.errors import BackupError, FreezeBudgetExceeded, GuestHelperError, NotConverging, TopologyChanged
from vmbackupd.host.udev import host_luns
from vmbackupd.job import bitmaps, coverage, fleecing, overlays
from vmbackupd.job.context import BackupContext, uninterrupted
from vmbackupd.job.faultpoints import reach
from vmbackupd.job.snapshots import require_valid
from vmbackupd.model import T2, Method

T = TypeVar("T")
log = logging.getLogger("job.t1")

DEADMAN_MARGIN = 1.0  # seconds past the budget: a thaw of ours that comes in time is not overtaken by the guest's own
AGENT_MARGIN = 10.0  # seconds past the budget that the agent has for its answer: what ends first is the budget
CAPTURE_SHARE = 0.8  # of what is left of the budget may go into the capture, so that the thaw comes in time
STRAGGLER_DEADLINE = 60.0  # seconds an operation that overran the budget may still take to end, after the thaw


@dataclass
class _Freeze:
    """The frozen section under way: when it began, and what overran the budget and has yet to end."""

    vm: str
    budget: float
    began: float = field(default_factory=time.monotonic)
    frozen: bool = False
    stragglers: list[asyncio.Future[object]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return max(0.0, self.began + self.budget - time.monotonic())

    async def within(self, work: Awaitable[T]) -> T:
        """The result of ``work``. Raises ``TimeoutError`` when the budget runs out first; ``work`` goes on."""
        task = asyncio.ensure_future(work)
        await asyncio.wait({task}, timeout=self.left)
        if not task.done():
            task.add_done_callback(self._ended)
            self.stragglers.append(task)  # type: ignore[arg-type]
            raise TimeoutError
        return task.result()

    def _ended(self, straggler: asyncio.Future[T]) -> None:
        """The backup has failed by then, and with a better reason; but an error is said."""
        error = None if straggler.cancelled() else straggler.exception()
        if error is not None:
            log.warning("VM %s: what overran the freeze budget of %g s has failed: %s", self.vm, self.budget, error)


async def run(ctx: BackupContext) -> None:
    """Set ``ctx.t1``, ``ctx.freeze_ms`` and what the freeze was like.

    Raises ``TopologyChanged`` when a device came or went since inspect, ``FreezeBudgetExceeded`` with the figure, or
    ``SnapshotLost`` when the snapshots do not hold.
    """
    assert ctx.coverage is not None
    await _require_same_devices(ctx)
    window = [plan for plan in ctx.coverage.plans if plan.method is Method.FREEZE_WINDOW]
    await bitmaps.begin(ctx)
    await reach("t1-snapshot:recording")
    paths = await overlays.prepare(ctx, [plan for plan in window if plan.t2 is T2.EXTERNAL])
    served = fleecing.prepare(ctx, [plan for plan in window if plan.t2 is T2.FLEECE])
    await reach("t1-snapshot:prepared")
    await uninterrupted(_frozen_section(ctx, paths, served))
    await reach("t1-snapshot:thawed")
    if ctx.coverage.volumes:
        require_valid(ctx, await ctx.helper.status())


async def _require_same_devices(ctx: BackupContext) -> None:
    """Look again, right before the freeze: the plan must still be about the devices that are there."""
    assert ctx.report is not None and ctx.coverage is not None
    domain = await ctx.hypervisor.domain(ctx.domain.uuid)
    report = await ctx.helper.probe()
    decided = coverage.decide(
        domain, report, host_luns(), own=ctx.job, t2=ctx.t2_wish, untracked=ctx.untracked
    )
    now = coverage.allow(decided, ctx.options.allow_uncovered)
    differing = coverage.difference(ctx.coverage, now) or _host_change(ctx)
    if report.boot_id != ctx.report.boot_id:
        differing = "the guest was rebooted"
    if differing:
        raise TopologyChanged(f"VM {ctx.vm}: {differing} between inspect and T1; run the backup again")


def _host_change(ctx: BackupContext) -> str | None:
    """A LUN of the guest that the host sees too, and that went away or came back there. A mere change is not among
    them: udev reports one whenever somebody has had the device open for writing."""
    assert ctx.coverage is not None
    ours = {plan.details["host_device"]: plan.id for plan in ctx.coverage.plans if plan.details.get("host_device")}
    for event in ctx.host_events.seen:
        if event.devnode in ours and event.action in ("add", "remove", "offline"):
            return f"{event.devnode}, the host's device of {ours[event.devnode]}, had the event {event.action!r}"
    return None


async def _frozen_section(ctx: BackupContext, paths: dict[str, str], served: dict[str, str]) -> None:
    """Freeze, snapshot, thaw, whatever happens between; not to be interrupted: a cancellation waits for the thaw."""
    budget = ctx.freeze_budget
    await ctx.helper.arm(budget + DEADMAN_MARGIN)
    ctx.entries["thaw"] = ctx.journal.record("thaw")
    freeze = _Freeze(ctx.vm, budget)
    failure: BaseException | None = None
    try:
        await _snapshot_frozen(ctx, freeze, paths, served)
    except BaseException as error:
        failure = error
    thawed = True
    try:
        if freeze.frozen:
            await _thaw(ctx)
        await ctx.undo_now("thaw")
    except (BackupError, OSError, TimeoutError) as error:
        if failure is None:
            raise
        thawed = False
        failure.add_note(f"and the thaw failed: {error}")  # it stays in the journal, and the unwinding tries again
    ctx.freeze_ms = round((time.monotonic() - freeze.began) * 1000, 1)
    if freeze.stragglers:
        await asyncio.wait(freeze.stragglers, timeout=STRAGGLER_DEADLINE)
    if failure is not None and not isinstance(failure, TimeoutError):
        raise failure
    fired = thawed and await ctx.helper.disarm()  # the guest's own guard stays where nobody has seen it thawed
    if failure is not None or fired or ctx.freeze_ms > budget * 1000:
        by_itself = " (it thawed by itself)" if fired else ""
        state = "it is thawed" if thawed else "its agent does not answer, it is thawed as soon as that does,"
        raise FreezeBudgetExceeded(
            f"VM {ctx.vm} was frozen for {ctx.freeze_ms:.0f} ms{by_itself}, over the budget of {budget * 1000:.0f} ms: "
            f"{state} and the backup is undone. Try at a quieter time, look at the guest's fsfreeze hooks, or "
            "raise the budget"
        )


async def _snapshot_frozen(
    ctx: BackupContext, freeze: _Freeze, paths: dict[str, str], served: dict[str, str]
) -> None:
    """What happens between freeze and thaw: ``paths`` are overlays, ``served`` scratch images, by target. Raises
    ``TimeoutError`` past the budget."""
    assert ctx.coverage is not None
    frozen = await freeze.within(ctx.agent("guest-fsfreeze-freeze", timeout=freeze.budget + AGENT_MARGIN))
    freeze.frozen = True
    ctx.frozen_filesystems = frozen if isinstance(frozen, int) else 0
    await freeze.within(reach("t1-snapshot:frozen"))
    if ctx.coverage.volumes:
        snap = await freeze.within(ctx.helper.snap())
        ctx.t1, ctx.suspend_ms = snap.t1, snap.suspend_ms
    if ctx.coverage.pre_copied:
        await _capture(ctx, freeze)
    ctx.t1 = ctx.t1 or time.time()
    await freeze.within(reach("t1-snapshot:snapped"))
    if paths:
        await freeze.within(ctx.hypervisor.snapshot(ctx.domain.uuid, paths))
    if served:
        await freeze.within(fleecing.begin(ctx, served))


async def _thaw(ctx: BackupContext) -> None:
    """Thaw at once. Whether it was of use is asked by the undo that follows, which tries again."""
    try:
        await ctx.agent("guest-fsfreeze-thaw")
    except (BackupError, OSError, TimeoutError) as error:
        log.warning("VM %s: the first thaw failed: %s", ctx.vm, error)


async def _capture(ctx: BackupContext, freeze: _Freeze) -> None:
    """Have the guest keep in its memory what was written to pre-copied disks since the last round."""
    assert ctx.coverage is not None
    devnos = [plan.devno for plan in ctx.coverage.pre_copied if plan.devno is not None]
    names = ", ".join(plan.id for plan in ctx.coverage.pre_copied)
    try:
        captured = await freeze.within(ctx.helper.capture(devnos, deadline=freeze.left * CAPTURE_SHARE))
    except GuestHelperError as error:
        if error.reason not in ("TooMuch", "NotStill"):
            raise
        raise NotConverging(
            f"VM {ctx.vm}: what the guest wrote last to {names} could not be captured in the freeze: {error}. Run the "
            "backup at a quieter time, or allow a longer freeze (--freeze-budget) and more memory ([guest] "
            "capture_limit)"
        ) from error
    ctx.t1 = ctx.t1 or captured.t1
