"""The queue, cancellation, the history, and who may work on what at the same time."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tests.unit.api.support import DEADLINE, SmallRunner
from vmbackupd.errors import Busy, InvalidArgument
from vmbackupd.job import manager as manager_module
from vmbackupd.job.job import Job, JobContext, current_job
from vmbackupd.job.manager import JobManager, Result
from vmbackupd.job.options import (
    BackupOptions,
    ExportOptions,
    GcOptions,
    PruneOptions,
    RestoreOptions,
    ServeOptions,
    VerifyOptions,
)

OPTIONS = BackupOptions()


async def ended(job: Job) -> Job:
    await asyncio.wait_for(job.wait(), DEADLINE)
    return job


def test_states_and_changes_in_order() -> None:
    async def main() -> None:
        manager = JobManager(SmallRunner())
        seen: list[tuple[set[str], str]] = []
        unsubscribe = manager.subscribe(lambda job, changed: seen.append((changed, job.state.value)))
        job = await ended(manager.start_backup("web", OPTIONS))
        assert seen[0] == ({"new"}, "queued")
        assert seen[1] == ({"state"}, "running")
        assert seen[-1] == ({"state", "result", "error", "ended"}, "succeeded")
        assert job.id in manager.jobs and job.id.startswith("j") and len(job.id) == 9
        unsubscribe()
        await ended(manager.start_backup("web", OPTIONS))
        assert seen[-1][1] == "succeeded" and sum(changed == {"new"} for changed, _ in seen) == 1

    asyncio.run(main())


def test_no_more_than_allowed_run_at_once_and_the_rest_wait() -> None:
    async def main() -> None:
        runner = SmallRunner()
        manager = JobManager(runner, parallel=2)
        jobs = [manager.start_backup(f"slow{n}", OPTIONS) for n in range(5)]
        assert [job.state.value for job in jobs] == ["running"] * 2 + ["queued"] * 3
        jobs[4].cancel()
        assert jobs[4].state == "cancelled"
        await asyncio.wait_for(runner.running.wait(), DEADLINE)
        runner.go.set()
        for job in jobs:
            await ended(job)
        assert [job.state.value for job in jobs] == ["succeeded"] * 4 + ["cancelled"]
        assert runner.most_active == 2

    asyncio.run(main())


def test_cancel_before_the_first_step_still_ends_the_job() -> None:
    async def main() -> None:
        runner = SmallRunner()
        manager = JobManager(runner)
        job = manager.start_backup("web", OPTIONS)
        job.cancel()
        assert job.state == "cancelling"
        assert (await ended(job)).state == "cancelled"
        assert runner.calls == []
        await ended(manager.start_backup("web", OPTIONS))

    asyncio.run(main())


def test_a_second_cancel_does_not_disturb_the_undoing() -> None:
    async def main() -> None:
        runner = SmallRunner()
        runner.undone.clear()
        manager = JobManager(runner)
        job = manager.start_backup("slow", OPTIONS)
        await asyncio.wait_for(runner.running.wait(), DEADLINE)
        job.cancel()
        await asyncio.wait_for(runner.undoing.wait(), DEADLINE)
        job.cancel()
        closing = asyncio.ensure_future(manager.close())  # nor does the end of the daemon
        await asyncio.sleep(0)
        assert job.state == "cancelling" and not closing.done()
        runner.undone.set()
        await asyncio.wait_for(closing, DEADLINE)
        assert job.state == "cancelled" and job.step == "undo"
        with pytest.raises(InvalidArgument, match="already cancelled"):
            job.cancel()

    asyncio.run(main())


def test_a_cancellation_that_comes_too_late_is_told() -> None:
    class Late(SmallRunner):
        async def backup(self, job: JobContext, vm: str, options: BackupOptions) -> Result:
            self.running.set()
            try:
                await self.go.wait()
            except asyncio.CancelledError:
                pass  # the manifest was being published
            return {"backup": "b"}

    async def main() -> None:
        runner = Late()
        job = JobManager(runner).start_backup("web", OPTIONS)
        await asyncio.wait_for(runner.running.wait(), DEADLINE)
        job.cancel()
        await ended(job)
        assert (job.state.value, job.result) == ("succeeded", {"backup": "b"})
        assert "before it could be cancelled" in job.warnings[0]

    asyncio.run(main())


def test_one_job_a_vm_until_it_has_ended() -> None:
    async def main() -> None:
        runner = SmallRunner()
        manager = JobManager(runner)
        job = manager.start_backup("slow", OPTIONS)
        await asyncio.wait_for(runner.running.wait(), DEADLINE)
        for start in (lambda: manager.start_backup("slow", OPTIONS), lambda: manager.start_inspect("slow"),
                      lambda: manager.start_restore("b", RestoreOptions(name="slow"))):
            with pytest.raises(Busy, match=job.id):
                start()
        other = await ended(manager.start_backup("slow-alias", OPTIONS))
        assert isinstance(other.error, Busy)
        recover = await ended(manager.start_recover())
        assert runner.calls[-1] == ("recover", frozenset({job.id}))
        assert recover.state == "succeeded"
        runner.go.set()
        await ended(job)
        await ended(manager.start_inspect("slow"))

    asyncio.run(main())


def test_the_history_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "HISTORY", 3)

    async def main() -> None:
        runner = SmallRunner()
        manager = JobManager(runner)
        removed: list[str] = []
        manager.subscribe(lambda job, changed: removed.append(job.id) if changed == {"removed"} else None)
        running = manager.start_backup("slow", OPTIONS)
        jobs = [(await ended(manager.start_backup("web", OPTIONS))).id for _ in range(5)]
        assert list(manager.jobs) == [running.id, *jobs[2:]]
        assert removed == jobs[:2]
        await manager.close()

    asyncio.run(main())


def test_a_broken_subscriber_breaks_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        manager = JobManager(SmallRunner())

        def broken(job: Job, changed: set[str]) -> None:
            raise ZeroDivisionError

        manager.subscribe(broken)
        assert (await ended(manager.start_backup("web", OPTIONS))).state == "succeeded"

    asyncio.run(main())
    assert "a subscriber failed" in caplog.text


def test_a_bug_in_the_work_fails_the_job_with_a_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        job = await ended(JobManager(SmallRunner()).start_backup("bug", OPTIONS))
        assert job.state == "failed" and "ZeroDivisionError" in str(job.error)

    with caplog.at_level(logging.ERROR):
        asyncio.run(main())
    assert any(record.exc_info for record in caplog.records)


def test_after_close_nothing_starts() -> None:
    async def main() -> None:
        manager = JobManager(SmallRunner(), parallel=1)
        jobs = [manager.start_backup("slow", OPTIONS), manager.start_backup("web", OPTIONS)]
        await asyncio.wait_for(manager.close(), DEADLINE)
        assert [job.state.value for job in jobs] == ["cancelled", "cancelled"]
        with pytest.raises(Busy, match="stopping"):
            manager.start_backup("web", OPTIONS)

    asyncio.run(main())


def test_recovery_at_start_never_raises() -> None:
    class Unlucky(SmallRunner):
        async def recover(self, job: JobContext) -> Result:
            raise Busy("no")

    async def main() -> None:
        job = await asyncio.wait_for(JobManager(Unlucky()).recover_at_start(), DEADLINE)
        assert isinstance(job.error, Busy)

    asyncio.run(main())


def test_a_vm_that_a_job_left_frozen_is_thawed_by_another_that_holds_it_until_then() -> None:
    async def main() -> None:
        runner = SmallRunner()
        manager = JobManager(runner, parallel=1)
        runner.left_frozen["uuid-of-cold"] = "cold"
        failed = await ended(manager.start_backup("cold", OPTIONS))
        assert failed.state == "failed"
        (thaw,) = (job for job in manager.jobs.values() if job.kind == "thaw")
        assert (thaw.vm, thaw.state.value) == ("cold", "running")
        assert (await ended(manager.start_backup("web", OPTIONS))).state == "succeeded"  # it takes none of the places
        again = await ended(manager.start_backup("cold", OPTIONS))
        assert isinstance(again.error, Busy) and thaw.id in str(again.error)
        runner.answers.set()
        assert (await ended(thaw)).state == "succeeded"
        assert [call for call in runner.calls if call[0] == "thaw"] == [("thaw", "uuid-of-cold", "cold")]

    asyncio.run(main())


def test_a_thaw_that_was_cancelled_is_begun_again_at_the_end_of_the_next_job_but_not_at_that_of_the_daemon() -> None:
    async def main() -> None:
        runner = SmallRunner()
        manager = JobManager(runner)
        runner.left_frozen["uuid-of-web"] = "web"

        def thaws() -> list[Job]:
            return [job for job in manager.jobs.values() if job.kind == "thaw"]

        await manager.recover_at_start()
        (first,) = thaws()
        first.cancel()
        assert (await ended(first)).state == "cancelled" and thaws() == [first]
        await ended(manager.start_recover())
        _, second = thaws()
        await asyncio.wait_for(manager.close(), DEADLINE)
        assert second.state == "cancelled" and len(thaws()) == 2

    asyncio.run(main())


def test_the_work_knows_its_job_also_in_threads() -> None:
    class Curious(SmallRunner):
        async def inspect(self, job: JobContext, vm: str) -> Result:
            here, there = current_job.get(), await asyncio.to_thread(current_job.get)
            assert here is not None and here is there
            return {"id": here.id}

    async def main() -> None:
        job = await ended(JobManager(Curious()).start_inspect("web"))
        assert job.result == {"id": job.id}
        assert current_job.get() is None

    asyncio.run(main())


def test_care_of_the_repository_neither_waits_for_backups_nor_makes_them_wait() -> None:
    async def main() -> None:
        runner = SmallRunner()
        manager = JobManager(runner, parallel=1)
        first = manager.start_backup("slow1", OPTIONS)
        beside = [manager.start_gc(GcOptions(threshold=1.0)), manager.start_verify(VerifyOptions(("slow",))),
                  manager.start_serve("web-1", "vda", ServeOptions())]
        second = manager.start_backup("slow2", OPTIONS)
        assert [job.state.value for job in (first, *beside, second)] == ["running"] * 4 + ["queued"]
        await ended(manager.start_prune(None, PruneOptions()))
        first.cancel()
        await ended(first)
        assert second.state == "running"
        await manager.close()
        assert {job.state.value for job in (*beside, second)} == {"cancelled"}

    asyncio.run(main())


def test_one_gc_and_one_verify_at_a_time_and_one_job_a_file() -> None:
    async def main() -> None:
        runner = SmallRunner()
        manager = JobManager(runner)
        gc = manager.start_gc(GcOptions(threshold=1.0))
        verify = manager.start_verify(VerifyOptions(("slow",)))
        manager.start_serve("web-1", "vda", ServeOptions("/run/s"))
        manager.start_export("slow", "vda", "/out", ExportOptions())
        for start in (lambda: manager.start_gc(GcOptions()), lambda: manager.start_verify(VerifyOptions()),
                      lambda: manager.start_serve("web-2", "vda", ServeOptions("/run/s")),
                      lambda: manager.start_export("web-1", "vda", "/out", ExportOptions())):
            with pytest.raises(Busy, match="works on it"):
                start()
        gc.cancel()
        verify.cancel()
        await ended(gc)
        await ended(verify)
        assert (await ended(manager.start_gc(GcOptions()))).state == "succeeded"
        assert (await ended(manager.start_verify(VerifyOptions()))).state == "succeeded"
        await manager.close()

    asyncio.run(main())


def test_no_more_volumes_are_served_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "SERVED", 2)

    async def main() -> None:
        manager = JobManager(SmallRunner())
        jobs = [manager.start_serve("web-1", "vda", ServeOptions()) for _ in range(2)]
        with pytest.raises(Busy, match="2 volumes are served already"):
            manager.start_serve("web-1", "vda", ServeOptions())
        jobs[0].cancel()
        await ended(jobs[0])
        manager.start_serve("web-1", "vda", ServeOptions())
        await manager.close()

    asyncio.run(main())
