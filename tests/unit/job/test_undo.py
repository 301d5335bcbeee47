"""Unwinding: thaw first, newest first, a failure stops nothing else and stays in the journal for the next try."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vmbackupd.errors import (
    BackupError,
    GuestAgentRefused,
    GuestAgentUnavailable,
    GuestHelperUnavailable,
    HypervisorError,
    NotFound,
    NotRunning,
)
from vmbackupd.guest.client import INSTALLED_TIMEOUT, GuestHelper
from vmbackupd.job import recovery, undo
from vmbackupd.job.journal import Header, Journal


class Recorder(undo.UndoContext):
    """A context whose undos only write down that they were asked for; those named in ``failing`` fail."""

    def __init__(self) -> None:
        self.job, self.vm, self.uuid, self.helper, self.progress = "j00000001", "web1", "u", None, None
        self.asked: list[str] = []
        self.failing: dict[str, BaseException] = {}


@pytest.fixture
def ctx(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    context = Recorder()
    for name in undo.UNDO:

        async def ask(_: undo.UndoContext, args: dict[str, str], name: str = name) -> None:
            context.asked.append(" ".join([name, *args.values()]))
            if name in context.failing:
                raise context.failing[name]

        monkeypatch.setitem(undo.UNDO, name, ask)
    return context


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal.create(tmp_path, Header("j00000001", "backup", "web1", "u"))
    journal.record("unlink", path="/scratch")
    journal.record("detach_scratch", path="/scratch")
    journal.record("thaw")
    journal.record("drop_overlay", path="/vda.j00000001")
    return journal


def test_thaw_is_first_then_newest_first(ctx: Recorder, journal: Journal) -> None:
    unwound = asyncio.run(undo.unwind(ctx, journal))
    assert ctx.asked == ["thaw", "drop_overlay /vda.j00000001", "detach_scratch /scratch", "unlink /scratch"]
    assert not unwound.failed and not journal.pending


def test_what_is_to_be_kept_stays_in_the_journal(ctx: Recorder, journal: Journal) -> None:
    recording = journal.record("drop_bitmaps", name="vmbackupd-j00000001")
    unwound = asyncio.run(undo.unwind(ctx, journal, keep=[recording]))
    assert not unwound.failed and journal.pending == [recording]
    assert "drop_bitmaps vmbackupd-j00000001" not in ctx.asked


def test_a_failure_stays_in_the_journal_and_stops_nothing_else(ctx: Recorder, journal: Journal) -> None:
    ctx.failing["drop_overlay"] = HypervisorError("busy")
    unwound = asyncio.run(undo.unwind(ctx, journal))
    assert [name for name, _ in unwound.failed] == ["drop_overlay /vda.j00000001"]
    assert [entry.undo for entry in Journal.load(journal.path).pending] == ["drop_overlay"]
    assert "unlink /scratch" in ctx.asked


def test_an_image_that_is_still_attached_is_not_deleted(ctx: Recorder, journal: Journal) -> None:
    ctx.failing["detach_scratch"] = HypervisorError("the guest does not let go")
    asyncio.run(undo.unwind(ctx, journal))
    assert "unlink /scratch" not in ctx.asked
    assert [entry.undo for entry in journal.pending] == ["detach_scratch", "unlink"]


def test_what_lived_in_a_guest_that_is_off_is_undone(ctx: Recorder, journal: Journal) -> None:
    ctx.failing["thaw"] = ctx.failing["detach_scratch"] = NotRunning("web1 is off")
    unwound = asyncio.run(undo.unwind(ctx, journal))
    assert not unwound.failed and not journal.pending


def test_an_overlay_of_a_vm_that_is_off_is_not_forgotten(ctx: Recorder, journal: Journal) -> None:
    ctx.failing["drop_overlay"] = NotRunning("web1 is off")
    asyncio.run(undo.unwind(ctx, journal))
    assert [entry.undo for entry in journal.pending] == ["drop_overlay"]


def test_recovery_goes_on_with_the_other_jobs_and_tells_of_damaged_journals(
    ctx: Recorder, journal: Journal, tmp_path: Path
) -> None:
    journal.close()
    (tmp_path / "j00000002.jsonl").write_text("{}\n{}\n")
    recovered = {item.job: item for item in asyncio.run(recovery.recover_all(None, tmp_path))}  # type: ignore[arg-type]
    assert len(recovered["j00000001"].undone) == 4 and not recovered["j00000001"].failed
    assert "j00000002.jsonl" in recovered["j00000002"].failed[0].error
    assert not journal.path.exists()


def test_journals_of_running_jobs_are_left_alone(journal: Journal, tmp_path: Path) -> None:
    assert recovery.pending_journals(tmp_path, {"j00000001"}) == []
    assert recovery.journals_of(tmp_path, "another") == []
    assert recovery.journals_of(tmp_path, "u") == [journal.path]


def test_a_look_at_a_journal_takes_it_from_nobody_who_works_on_it(
    ctx: Recorder, journal: Journal, tmp_path: Path
) -> None:
    asyncio.run(undo.unwind(ctx, journal))
    assert not journal.pending
    assert recovery.journals_of(tmp_path, "u") == [journal.path] and recovery.unthawed(tmp_path) == {}
    assert journal.path.exists()
    journal.close()
    assert not journal.path.exists()


def test_a_vm_is_unthawed_until_its_thaw_is_confirmed(ctx: Recorder, journal: Journal, tmp_path: Path) -> None:
    assert recovery.unthawed(tmp_path) == {"u": "web1"}
    assert recovery.unthawed(tmp_path, {"j00000001"}) == {}
    (tmp_path / "j00000002.jsonl").write_text("{}\n{}\n")  # damaged: told by a recovery
    asyncio.run(undo.unwind(ctx, journal, only="thaw"))
    assert recovery.unthawed(tmp_path) == {}


class Agent:
    """A guest agent that is silent for a while, then tells of a frozen guest until it is thawed."""

    def __init__(self, *errors: BackupError) -> None:
        self.errors, self.frozen = list(errors), True

    async def agent(self, uuid: str, command: str, arguments: object, *, timeout: float) -> object:
        if self.errors:
            raise self.errors.pop(0)
        if command == "guest-fsfreeze-thaw":
            self.frozen = False
            return 1
        return "frozen" if self.frozen else "thawed"


def test_a_thaw_is_tried_until_the_agent_answers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recovery, "THAW_PAUSES", (0.001, 0.002))
    agent = Agent(*(GuestAgentUnavailable(f"try {number}") for number in range(5)))
    asyncio.run(recovery.thaw(undo.UndoContext(agent, "j00000001", "web1", "u")))  # type: ignore[arg-type]
    assert not agent.errors and not agent.frozen
    assert [record.getMessage() for record in caplog.records] == [
        "VM web1: it is not known to be thawed (try 0): tried until the agent answers"
    ]


@pytest.mark.parametrize("error", [NotRunning("web1 is off"), NotFound("there is no VM u")])
def test_a_vm_that_is_off_needs_no_thaw(error: BackupError) -> None:
    asyncio.run(recovery.thaw(undo.UndoContext(Agent(error), "j00000001", "web1", "u")))  # type: ignore[arg-type]


class Restarted:
    """Stands in for an installed helper: the first is dead, the guest starts another while somebody waits for it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    async def reconnect(self, *words: object, timeout: float, **named: object) -> Restarted:
        if timeout < INSTALLED_TIMEOUT:
            raise GuestHelperUnavailable("no guest helper answered")
        return self

    async def release(self) -> None:
        self.calls.append("release")

    async def quit(self) -> None:
        self.calls.append("quit")

    async def close(self) -> None:
        self.calls.append("close")


@pytest.mark.parametrize("undos", [("release_snapshots", "stop_helper"), ("stop_helper",)])
def test_a_helper_that_the_guest_started_anew_is_asked(monkeypatch: pytest.MonkeyPatch, undos: tuple[str, ...]) -> None:
    """Where the agent runs nothing for us: it confirms that nothing is left, and is ended."""

    async def refuse(*words: object, **named: object) -> None:
        raise GuestAgentRefused("no guest-exec")

    helper, ctx = Restarted(), Recorder()
    monkeypatch.setattr(GuestHelper, "reconnect", helper.reconnect)
    monkeypatch.setattr(undo, "remove_leftovers", refuse)

    async def run() -> None:
        for name in undos:
            await undo.UNDO[name](ctx, {"socket": "/none"})

    asyncio.run(run())
    assert helper.calls == ["release", "quit", "close"] and ctx.helper is None
