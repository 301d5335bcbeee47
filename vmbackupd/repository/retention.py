"""Which backups a policy keeps, and why. Pure functions: the repository lists before and forgets afterwards.

The rules are those of Proxmox Backup Server, so that its users' numbers mean here what they meant there. Backups of one
VM are looked at newest first, by the instant T1 in the host's time zone. The rules apply in order: last, hourly, daily,
weekly (ISO weeks), monthly, yearly. Each keeps the newest backup of every period, for as many periods as it says; a
period that holds a backup an earlier rule kept is passed over without being counted. An older backup of a period that
a rule keeps the newest of is not considered by the rules after it. Protected backups are always kept and never counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, tzinfo

from vmbackupd.errors import InvalidArgument
from vmbackupd.repository.manifest import BackupSummary

LARGEST = 100_000


@dataclass(frozen=True, slots=True)
class KeepPolicy:
    """How many periods each rule keeps. A policy of nothing but zeros keeps everything."""

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0

    def __post_init__(self) -> None:
        """InvalidArgument for a number below 0 or above 100 000."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value <= LARGEST:
                raise InvalidArgument(f"{field.name.replace('_', '-')}: expected 0 to {LARGEST}, got {value}")

    @property
    def keeps_everything(self) -> bool:
        """Is there no rule at all?"""
        return not any(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of a backup, and the reason for people: ``keep-daily 2 of 7``."""

    backup: BackupSummary
    keep: bool
    reason: str


Period = Callable[[datetime], tuple[int, ...]]

RULES: tuple[tuple[str, Period], ...] = (
    ("keep_hourly", lambda t: (t.year, t.month, t.day, t.hour)),
    ("keep_daily", lambda t: (t.year, t.month, t.day)),
    ("keep_weekly", lambda t: tuple(t.isocalendar()[:2])),
    ("keep_monthly", lambda t: (t.year, t.month)),
    ("keep_yearly", lambda t: (t.year,)),
)


def decide(
    backups: Iterable[BackupSummary], policy: KeepPolicy, *, zone: tzinfo | None = None, protected: Iterable[str] = ()
) -> list[Decision]:
    """A decision for each backup, in the order given. ``zone``: the host's time zone if None; ``protected``: ids.

    A backup whose manifest cannot be read is kept: nobody knows whose and from when it is.
    """
    listed = list(backups)
    safe = set(protected)
    decisions: dict[str, Decision] = {}
    groups: dict[str, list[BackupSummary]] = {}
    for backup in listed:
        if backup.error is not None:
            decisions[backup.id] = Decision(backup, True, "its manifest cannot be read")
        elif backup.id in safe:
            decisions[backup.id] = Decision(backup, True, "protected")
        elif policy.keeps_everything:
            decisions[backup.id] = Decision(backup, True, "no rule is set")
        else:
            groups.setdefault(backup.vm_uuid or backup.vm_name, []).append(backup)
    for group in groups.values():
        group.sort(key=lambda backup: (backup.t1, backup.id), reverse=True)
        reasons = _kept(group, policy, zone)
        for backup in group:
            reason = reasons.get(backup.id)
            decisions[backup.id] = Decision(backup, reason is not None, reason or "no rule keeps it")
    return [decisions[backup.id] for backup in listed]


def _kept(newest_first: Sequence[BackupSummary], policy: KeepPolicy, zone: tzinfo | None) -> dict[str, str]:
    """Why each of the backups of one VM that are kept is."""
    times = {backup.id: datetime.fromtimestamp(backup.t1, zone) for backup in newest_first}
    reasons = {
        backup.id: f"keep-last {number} of {policy.keep_last}"
        for number, backup in enumerate(newest_first[: policy.keep_last], 1)
    }
    passed_over: set[str] = set()
    for rule, period in RULES:
        count = getattr(policy, rule)
        covered = {period(times[backup]) for backup in reasons}
        kept: set[tuple[int, ...]] = set()
        for backup in newest_first:
            when = period(times[backup.id])
            if backup.id in reasons or backup.id in passed_over or when in covered:
                continue
            if when in kept:
                passed_over.add(backup.id)
            elif len(kept) == count:
                break
            else:
                kept.add(when)
                reasons[backup.id] = f"{rule.replace('_', '-')} {len(kept)} of {count}"
    return reasons
