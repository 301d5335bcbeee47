"""Which backups a policy keeps: examples a person can check, and properties of any policy."""

from __future__ import annotations

from dataclasses import astuple, fields, replace
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbackupd.errors import InvalidArgument
from vmbackupd.repository.manifest import BackupSummary
from vmbackupd.repository.retention import RULES, KeepPolicy, decide

HOURS = ("03", "04")


def backup(when: str | float, vm: str = "web1") -> BackupSummary:
    t1 = datetime.fromisoformat(when).replace(tzinfo=UTC).timestamp() if isinstance(when, str) else when
    return BackupSummary(f"{vm}-{when}", vm, f"uuid-{vm}", t1=t1)


def kept(backups: list[BackupSummary], policy: KeepPolicy, **more: object) -> list[str]:
    return [item.backup.id.partition("-")[2] for item in decide(backups, policy, zone=UTC, **more) if item.keep]  # type: ignore[arg-type]


def test_each_rule_keeps_the_newest_of_its_periods() -> None:
    dates = [f"{month}-{day}" for month in ("01", "02") for day in ("01", "02", "09")]
    days = [backup(f"2026-{date}T{hour}:30") for date in dates for hour in HOURS]
    assert kept(days, KeepPolicy(keep_last=3)) == ["2026-02-02T04:30", "2026-02-09T03:30", "2026-02-09T04:30"]
    assert kept(days, KeepPolicy(keep_hourly=2)) == ["2026-02-09T03:30", "2026-02-09T04:30"]
    assert kept(days, KeepPolicy(keep_daily=2)) == ["2026-02-02T04:30", "2026-02-09T04:30"]
    assert kept(days, KeepPolicy(keep_weekly=2)) == ["2026-02-02T04:30", "2026-02-09T04:30"]
    assert kept(days, KeepPolicy(keep_monthly=5)) == ["2026-01-09T04:30", "2026-02-09T04:30"]
    assert kept(days, KeepPolicy(keep_yearly=1)) == ["2026-02-09T04:30"]


def test_a_period_that_is_covered_is_not_counted() -> None:
    """keep-last covers the newest day, so keep-daily reaches one day further back."""
    days = [backup(f"2026-03-{day:02}T12:00") for day in range(1, 11)]
    assert kept(days, KeepPolicy(keep_last=1, keep_daily=2)) == [f"2026-03-{day:02}T12:00" for day in (8, 9, 10)]
    decisions = decide(days, KeepPolicy(keep_last=1, keep_daily=2), zone=UTC)
    assert [item.reason for item in decisions[-4:]] == [
        "no rule keeps it",
        "keep-daily 2 of 2",
        "keep-daily 1 of 2",
        "keep-last 1 of 1",
    ]


def test_weeks_are_iso_weeks() -> None:
    """Friday, 1 January 2027 belongs to week 53 of 2026."""
    times = ("2026-12-27T12:00", "2026-12-31T12:00", "2027-01-01T12:00", "2027-01-04T12:00")
    assert kept([backup(when) for when in times], KeepPolicy(keep_weekly=9)) == [times[0], times[2], times[3]]


def test_periods_are_those_of_the_time_zone() -> None:
    backups = [backup("2026-06-01T21:30"), backup("2026-06-01T22:30")]
    assert len(kept(backups, KeepPolicy(keep_daily=2))) == 1
    decisions = decide(backups, KeepPolicy(keep_daily=2), zone=ZoneInfo("Europe/Berlin"))
    assert [item.keep for item in decisions] == [True, True]


def test_each_vm_for_itself() -> None:
    backups = [backup("2026-01-01T01:00", "a"), backup("2026-01-02T01:00", "b"), backup("2026-01-03T01:00", "b")]
    assert [item.keep for item in decide(backups, KeepPolicy(keep_last=1), zone=UTC)] == [True, False, True]


def test_no_rule_keeps_everything() -> None:
    decisions = decide([backup("2026-01-01T01:00")], KeepPolicy(), zone=UTC)
    assert [(item.keep, item.reason) for item in decisions] == [(True, "no rule is set")]


def test_unreadable_backups_are_kept() -> None:
    decisions = decide([BackupSummary("x", error="damaged"), backup(5.0)], KeepPolicy(keep_last=1), zone=UTC)
    assert [(item.keep, item.reason) for item in decisions] == [
        (True, "its manifest cannot be read"),
        (True, "keep-last 1 of 1"),
    ]


def test_impossible_numbers() -> None:
    with pytest.raises(InvalidArgument, match="keep-daily"):
        KeepPolicy(keep_daily=-1)


policies = st.builds(KeepPolicy, *[st.integers(0, 6)] * 6)
times = st.lists(
    st.integers(0, 3 * 365 * 24 * 4).map(lambda quarter: 1_700_000_000.0 + 900 * quarter), unique=True, max_size=60
)


@given(times, policies)
def test_adding_a_rule_or_raising_a_number_of_last_keeps_no_less(when: list[float], policy: KeepPolicy) -> None:
    backups = [backup(t) for t in when]
    if not policy.keeps_everything:
        more = replace(policy, keep_yearly=policy.keep_yearly + 1)
        assert set(kept(backups, policy)) <= set(kept(backups, more))
    assert len(kept(backups, policy)) <= sum(astuple(policy)) or policy.keeps_everything


@given(times, policies)
def test_the_newest_is_kept_and_a_rule_alone_is_met(when: list[float], policy: KeepPolicy) -> None:
    backups = [backup(t) for t in when]
    if backups:
        newest = max(backups, key=lambda item: item.t1)
        assert newest in [item.backup for item in decide(backups, policy, zone=UTC) if item.keep]
    for rule, period in RULES:
        alone = KeepPolicy(**{rule: getattr(policy, rule)})
        left = [item.backup for item in decide(backups, alone, zone=UTC) if item.keep]
        # the newest periods that have backups at all, as many as the rule asks for, are all represented
        wanted = sorted({period(datetime.fromtimestamp(item.t1, UTC)) for item in backups}, reverse=True)
        present = {period(datetime.fromtimestamp(item.t1, UTC)) for item in left}
        assert set(wanted[: getattr(policy, rule)]) <= present


@given(times, policies)
def test_pruning_again_changes_nothing(when: list[float], policy: KeepPolicy) -> None:
    left = [item.backup for item in decide([backup(t) for t in when], policy, zone=UTC) if item.keep]
    assert all(item.keep for item in decide(left, policy, zone=UTC))


@given(times, policies, st.sets(st.integers(0, 59)))
def test_protected_backups_stay_and_do_not_count(when: list[float], policy: KeepPolicy, chosen: set[int]) -> None:
    backups = [backup(t) for t in when]
    protected = {backups[number].id for number in chosen if number < len(backups)}
    others = [item for item in backups if item.id not in protected]
    decisions = {item.backup.id: item.keep for item in decide(backups, policy, zone=UTC, protected=protected)}
    alone = {item.backup.id: item.keep for item in decide(others, policy, zone=UTC)}
    assert decisions == {**alone, **dict.fromkeys(protected, True)}


def slow(newest_first: list[BackupSummary], policy: KeepPolicy) -> set[str]:
    """Proxmox Backup Server's own algorithm, step by step: marks, and a rule that stops when its number is reached."""
    marks: dict[str, bool] = {}
    rules = [("keep_last", lambda t: t), *RULES]
    for rule, period in rules:
        included: set[object] = set()
        before = {period(datetime.fromtimestamp(b.t1, UTC)) for b in newest_first if marks.get(b.id)}
        for item in newest_first:
            when = period(datetime.fromtimestamp(item.t1, UTC))
            if item.id in marks or when in before:
                continue
            if when in included:
                marks[item.id] = False
            elif len(included) >= getattr(policy, rule):
                break
            else:
                included.add(when)
                marks[item.id] = True
    return {name for name, keep in marks.items() if keep}


@given(times, policies)
def test_same_as_proxmox_backup_server(when: list[float], policy: KeepPolicy) -> None:
    backups = sorted((backup(t) for t in when), key=lambda item: -item.t1)
    expected = {item.id for item in backups} if policy.keeps_everything else slow(backups, policy)
    assert {item.backup.id for item in decide(backups, policy, zone=UTC) if item.keep} == expected


def test_every_rule_is_a_field() -> None:
    assert {field.name for field in fields(KeepPolicy)} == {"keep_last"} | {rule for rule, _ in RULES}
