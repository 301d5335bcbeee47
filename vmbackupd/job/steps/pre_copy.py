"""Pre-copy: pass-through disks that no snapshot can hold are copied while the guest writes to them.

The guest's tracker marks what is written. Round after round copies what was marked since the round before, until so
little is left that it can be captured in the freeze. A chunk that is written while it is copied is marked, and copied
again: torn content never reaches T1.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import NotConverging
from vmbackupd.guest.client import FRESH
from vmbackupd.job import increment, reading
from vmbackupd.job.context import BackupContext
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.exports import bitmap, export
from vmbackupd.job.faultpoints import reach
from vmbackupd.job.hashes import CHUNK
from vmbackupd.job.reading import Reading
from vmbackupd.model import Method
from vmbackupd.units import MiB, human

MOST_ROUNDS = 30
SHRINKS = 0.8  # a round that leaves more than this share of the round before does not converge
PATIENCE = 3  # such rounds in a row until the guest counts as too fast
SLOWEST = 8 * MiB  # bytes a second that a guest reads its own disk with, at the least
FREEZE_SHARE = 0.4  # of the freeze budget may go into reading what is captured


@dataclass
class Pace:
    """How the rounds go: bytes left before each, ``room`` bytes for what is captured, bytes and seconds of all copying
    so far, seconds of the last round."""

    left: list[int]
    room: int = 0
    copied: int = 0
    seconds: float = 0.0
    last: float = 0.0

    @property
    def copy_rate(self) -> float:
        return self.copied / max(self.seconds, 0.001)

    @property
    def write_rate(self) -> float:
        """How fast the guest writes, bytes a second, by what the last round left behind."""
        return self.left[-1] / max(self.last, 0.001)

    def capturable(self, budget: float) -> float:
        """Bytes that can be captured in a freeze of ``budget`` seconds. What the guest reads for itself is not slower
        than what travels."""
        return min(budget * FREEZE_SHARE * max(self.copy_rate, SLOWEST), self.room)

    @property
    def stuck(self) -> bool:
        """Whether the last rounds did not get shorter."""
        recent = self.left[-PATIENCE - 1 :]
        steps = zip(recent, recent[1:], strict=False)
        return len(recent) > PATIENCE and all(after > SHRINKS * before for before, after in steps)


async def run(ctx: BackupContext) -> None:
    """Copy until what is left fits the freeze; readings under way are in ``ctx.pre_copied``.

    Raises ``NotConverging``, and what reading a disk does.
    """
    assert ctx.coverage is not None
    plans = [plan for plan in ctx.coverage.pass_through if plan.method is Method.PRE_COPY]
    if not plans:
        return
    key = secrets.token_bytes(32)
    await _collect(ctx, plans)
    disks = {plan.id: plan.devno for plan in plans if plan.devno is not None}
    await ctx.helper.serve(ctx.data_port, disks, live=True, hash_key=key)
    pace = Pace([])
    began = time.monotonic()
    for plan in plans:
        await _first_round(ctx, plan, key)
        await reach("pre-copy:one")
    _count(pace, began, sum(disk.changed.count() for disk in ctx.pre_copied.values()))
    pace.room = await ctx.helper.prepare_capture(list(disks.values()), limit=ctx.config.guest.capture_limit)
    while not await _round(ctx, plans, pace):
        await reach("pre-copy:round")


async def _first_round(ctx: BackupContext, plan: DiskPlan, key: bytes) -> None:
    """What changed since an earlier backup, or everything. What was collected before it began is part of it."""
    disk = await increment.begin(ctx, plan, key)
    async with export(ctx, plan.id, plan.size) as source:
        await reading.inspect_unchanged(ctx, disk, source)
        await reading.read(ctx, disk, source, disk.changed)
        await _settle_suspects(ctx, disk, source)
    ctx.pre_copied[plan.id] = disk


async def _settle_suspects(ctx: BackupContext, disk: Reading, source: NbdConnection) -> None:
    """The audit reads a disk that is written to: what it found different and the tracker has marked by now is no miss.
    The marks are the next round's as well, so they are copied here."""
    if not disk.suspect.count():
        return
    plan = disk.plan
    await _collect(ctx, [plan])
    marked = await _marks(ctx, disk)
    disk.suspect.subtract(marked)
    await reading.read(ctx, disk, source, marked)
    disk.changed.merge(marked)
    await reading.distrust(ctx, disk, source)


async def _round(ctx: BackupContext, plans: list[DiskPlan], pace: Pace) -> bool:
    """Copy what was marked since the last round; True when what this one leaves will fit into the freeze."""
    chunks = await _collect(ctx, plans)
    pace.left.append(chunks * CHUNK)
    fits = chunks * CHUNK <= pace.capturable(ctx.freeze_budget)
    if not fits and (pace.stuck or len(pace.left) > MOST_ROUNDS):
        raise _too_fast(ctx, plans, pace)
    began = time.monotonic()
    for plan in plans:
        disk = ctx.pre_copied[plan.id]
        marked = await _marks(ctx, disk)
        async with export(ctx, plan.id, plan.size) as source:
            await reading.read(ctx, disk, source, marked)
        disk.changed.merge(marked)
    _count(pace, began, chunks)
    return fits


async def _collect(ctx: BackupContext, plans: list[DiskPlan]) -> int:
    """Have the helper show what was marked since the last time; the number of chunks on all disks."""
    return sum([await increment.collect(ctx, plan.devno) for plan in plans if plan.devno is not None])


async def _marks(ctx: BackupContext, disk: Reading) -> Bitmap:
    """What the last :func:`_collect` found on this disk."""
    return await bitmap(ctx, disk.plan.id + FRESH, disk.chunks)


def _too_fast(ctx: BackupContext, plans: list[DiskPlan], pace: Pace) -> NotConverging:
    names = ", ".join(plan.id for plan in plans)
    room = human(round(pace.capturable(ctx.freeze_budget)))
    return NotConverging(
        f"VM {ctx.vm}: the guest writes about {human(round(pace.write_rate))} a second to {names}, and "
        f"{human(round(pace.copy_rate))} a second can be copied: after {len(pace.left)} rounds {human(pace.left[-1])} "
        f"would be left for the freeze, where {room} have room. Run the backup at a quieter "
        "time, allow a longer freeze (--freeze-budget) and more memory ([guest] capture_limit), or put the filesystem "
        "on a device-mapper volume (vmbackup-guest enroll DEVICE in the guest, or LVM), where a snapshot can hold it"
    )


def _count(pace: Pace, began: float, chunks: int) -> None:
    pace.last = time.monotonic() - began
    pace.seconds += pace.last
    pace.copied += chunks * CHUNK
