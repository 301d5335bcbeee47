"""Which kind of hypervisor snapshot each virtual disk gets.

Disks that are cut at one instant are cut by one transaction, so a group has one kind: those captured at T2 with the
scratch disk, whose COW stores must not be older than the disks they are for; and those captured inside the freeze.
While libvirt's backup job runs it makes no other snapshot, so a group inside the freeze that needs the job leaves none
for later: every virtual disk is then captured inside the freeze.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vmbackupd.hypervisor.base import DiskSource
from vmbackupd.model import T2, CoverageRecord, Method, VolumeKind

if TYPE_CHECKING:
    from vmbackupd.job.coverage import DiskPlan


def overlay_fits(source: DiskSource | None) -> bool:
    """Whether the image is a file or a block device of this host, which an overlay can name as its base."""
    return source is not None and source.kind in ("file", "block") and source.path is not None


def settle(
    items: Sequence[CoverageRecord], plans: Sequence[DiskPlan], wish: T2
) -> tuple[list[CoverageRecord], list[DiskPlan]]:
    """Give each virtual disk its kind, and where one inside the freeze has to be served by QEMU, take all along."""
    served = [plan.id for plan in _of(plans, Method.FREEZE_WINDOW) if not overlay_fits(plan.source)]
    moved = {plan.id for plan in _of(plans, Method.GUEST_SNAPSHOT)} if served else set()
    if moved:
        why = f"captured together with {served[0]}, which QEMU serves from the freeze on"
        items = [
            replace(item, method=Method.FREEZE_WINDOW, reason=why) if item.id in moved else item for item in items
        ]
        plans = [replace(plan, method=Method.FREEZE_WINDOW) if plan.id in moved else plan for plan in plans]
    later = _kind(_of(plans, Method.GUEST_SNAPSHOT), wish)
    inside = _kind(_of(plans, Method.FREEZE_WINDOW), wish) if not _of(plans, Method.GUEST_SNAPSHOT) else T2.EXTERNAL
    kinds = {Method.GUEST_SNAPSHOT: later, Method.FREEZE_WINDOW: inside}
    settled = [_with(plan, kinds[plan.method]) if plan.kind is VolumeKind.VIRTUAL else plan for plan in plans]
    fleeced = {plan.id for plan in settled if plan.t2 is T2.FLEECE}
    told = [replace(item, reason=f"{item.reason}; served by QEMU") if item.id in fleeced else item for item in items]
    return told, settled


def _of(plans: Iterable[DiskPlan], method: Method) -> list[DiskPlan]:
    return [plan for plan in plans if plan.kind is VolumeKind.VIRTUAL and plan.method is method]


def _kind(group: Sequence[DiskPlan], wish: T2) -> T2:
    if wish is T2.AUTO:
        return T2.EXTERNAL if all(overlay_fits(plan.source) for plan in group) else T2.FLEECE
    return wish


def _with(plan: DiskPlan, kind: T2) -> DiskPlan:
    return replace(plan, t2=kind, details={**plan.details, "t2": kind.value})
