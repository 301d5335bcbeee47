"""The daemon's jobs: a queue, one active job for each VM, cancellation, and a history.

Jobs that move a VM's data share the places there are and wait for one. Care of the repository (forget, prune, gc,
verify) and serving do not: they must not keep a backup waiting, nor wait for one. There is at most one gc and one
verify; two at once would only read the same twice.

Where a job ends without having seen its VM thawed, another begins that thaws the VM as soon as its agent answers.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from types import MappingProxyType
from typing import Any

from vmbackupd.errors import BackupError, Busy, Cancelled, InvalidArgument
from vmbackupd.job.job import Job, JobContext, Result, Runner, current_job
from vmbackupd.job.options import (
    BackupOptions,
    ExportOptions,
    GcOptions,
    ImportOptions,
    InitOptions,
    KeyOptions,
    PruneOptions,
    RestoreOptions,
    ServeOptions,
    VerifyOptions,
)
from vmbackupd.model import JobState

__all__ = ["Job", "JobContext", "JobManager", "Result", "Runner"]

log = logging.getLogger("job.manager")

HISTORY = 100  # ended jobs that are remembered
SERVED = 64  # volumes served at the same time

Subscriber = Callable[[Job, set[str]], None]
Work = Callable[[JobContext], Coroutine[Any, Any, Result]]


class JobManager:
    """Starts jobs, runs at most ``parallel`` of them at a time, and remembers the last :data:`HISTORY` that ended.

    The work itself is the ``runner``'s. All methods are called in the event loop. A subscriber gets ``(job, changed)``:
    ``{"new"}`` for a new job, ``{"removed"}`` for one that is forgotten, else the names of the attributes that changed.
    """

    def __init__(self, runner: Runner, *, parallel: int = 4) -> None:
        self._runner = runner
        self._parallel = parallel
        self._jobs: dict[str, Job] = {}
        self._queue: deque[tuple[Job, Work]] = deque()
        self._tasks: dict[str, asyncio.Task[Result]] = {}
        self._beside: set[str] = set()  # jobs that take none of the places
        self._claims: dict[str, Job] = {}
        self._subscribers: list[Subscriber] = []
        self._closing = False

    @property
    def jobs(self) -> Mapping[str, Job]:
        """Every job that is queued, active or remembered, by id, oldest first."""
        return MappingProxyType(self._jobs)

    def subscribe(self, callback: Subscriber) -> Callable[[], None]:
        """Call ``callback`` at every change from now on; returns what ends that."""
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def start_backup(self, vm: str, options: BackupOptions) -> Job:
        """Queue a backup. Raises ``Busy`` when a job works on the VM."""
        return self._start("backup", vm, f"vm:{vm}", lambda job: self._runner.backup(job, vm, options))

    def start_inspect(self, vm: str) -> Job:
        """Queue an inspection. Raises ``Busy`` when a job works on the VM."""
        return self._start("inspect", vm, f"vm:{vm}", lambda job: self._runner.inspect(job, vm))

    def start_restore(self, backup: str, options: RestoreOptions) -> Job:
        """Queue a restore. Raises ``Busy`` when a job works on a VM of the new name."""
        if not backup.strip():
            raise InvalidArgument("the backup to restore has no name")
        target = f"vm:{options.name}" if options.name and not options.dry_run else None
        return self._start(
            "restore", options.name or backup, target, lambda job: self._runner.restore(job, backup, options)
        )

    def start_recover(self) -> Job:
        """Queue a recovery of what dead jobs left. Raises ``Busy`` when one is under way."""
        return self._start("recover", "", "recover", self._runner.recover)

    def start_forget(self, backups: tuple[str, ...], *, dry_run: bool = False) -> Job:
        """Forget these backups."""
        if not backups or not all(backup.strip() for backup in backups):
            raise InvalidArgument("the backup to forget has no name")
        return self._start_beside(
            "forget", ", ".join(backups), None, lambda job: self._runner.forget(job, backups, dry_run)
        )

    def start_prune(self, vm: str | None, options: PruneOptions) -> Job:
        """Forget what the rules do not keep, of one VM or of each."""
        return self._start_beside("prune", vm or "", None, lambda job: self._runner.prune(job, vm, options))

    def start_gc(self, options: GcOptions) -> Job:
        """Collect garbage. Raises ``Busy`` when a gc is under way."""
        return self._start_beside("gc", "", "gc", lambda job: self._runner.gc(job, options))

    def start_verify(self, options: VerifyOptions) -> Job:
        """Verify the repository. Raises ``Busy`` when a verify is under way."""
        return self._start_beside(
            "verify", ", ".join(options.backups), "verify", lambda job: self._runner.verify(job, options)
        )

    def start_export(self, backup: str, volume: str, file: str, options: ExportOptions) -> Job:
        """Queue an export. Raises ``Busy`` when a job writes that file."""
        _require_names(backup=backup, volume=volume)
        _require_path(file)
        return self._start(
            "export", backup, f"file:{file}", lambda job: self._runner.export(job, backup, volume, file, options)
        )

    def start_import(self, file: str, name: str, options: ImportOptions) -> Job:
        """Queue the import of an image as a backup of ``name``."""
        _require_names(name=name)
        _require_path(file)
        return self._start("import", name, None, lambda job: self._runner.import_image(job, file, name, options))

    def start_serve(self, backup: str, volume: str, options: ServeOptions) -> Job:
        """Serve a volume until the job is cancelled. Raises ``Busy`` when a job serves at that socket."""
        _require_names(backup=backup, volume=volume)
        serving = sum(job.kind == "serve" and not job.state.final for job in self._jobs.values())
        if serving >= SERVED:
            raise Busy(f"{serving} volumes are served already: cancel one of these jobs first")
        return self._start_beside(
            "serve",
            backup,
            f"file:{options.socket}" if options.socket else None,
            lambda job: self._runner.serve(job, backup, volume, options),
        )

    async def recover_at_start(self) -> Job:
        """Recover before anything else runs; a failure is in the job, and logged, but does not keep the daemon down."""
        job = self.start_recover()
        await job.wait()
        return job

    async def list_machines(self) -> list[Result]:
        return await self._runner.list_machines()

    async def list_backups(self, vm: str | None) -> list[Result]:
        return await self._runner.list_backups(vm)

    async def show_backup(self, backup: str) -> Result:
        return await self._runner.show_backup(backup)

    async def protect(self, backup: str, protected: bool) -> Result:
        return await self._runner.protect(backup, protected)

    async def list_keys(self) -> list[Result]:
        return await self._runner.list_keys()

    async def add_key(self, options: KeyOptions) -> Result:
        return await self._runner.add_key(options)

    async def revoke_key(self, slot: str) -> Result:
        return await self._runner.revoke_key(slot)

    async def init_repository(self, options: InitOptions) -> Result:
        return await self._runner.init_repository(options)

    async def repository_info(self) -> Result:
        return await self._runner.repository_info()

    async def close(self) -> None:
        """Start nothing more, cancel every job, and wait until all have undone what they did."""
        self._closing = True
        active = [job for job in self._jobs.values() if not job.state.final]
        for job in active:
            job.cancel()
        for job in active:
            await job.wait()

    def _start(self, kind: str, vm: str, resource: str | None, work: Work) -> Job:
        if kind != "recover" and not vm.strip():
            raise InvalidArgument("the VM has no name")
        job = self._new(kind, vm, resource)
        self._queue.append((job, work))
        self._run_queued()
        return job

    def _start_beside(self, kind: str, subject: str, resource: str | None, work: Work) -> Job:
        job = self._new(kind, subject, resource)
        self._beside.add(job.id)
        self._run(job, work)
        return job

    def _new(self, kind: str, vm: str, resource: str | None) -> Job:
        if self._closing:
            raise Busy("vmbackupd is stopping: ask again when it has been started")
        job = Job(self._new_id(), kind, vm, self._changed, self._cancel)
        if resource is not None:
            self._claim(job, resource)
        self._jobs[job.id] = job
        self._changed(job, {"new"})
        return job

    def _start_thaws(self) -> None:
        """Thaw every guest that a job left without having seen it thawed. Where another job works on the VM, that one's
        end brings us here again."""
        try:
            unthawed = self._runner.unthawed(self._active())
        except OSError as error:
            log.error("whether a VM is left frozen cannot be told: %s", error)
            return
        for uuid, vm in unthawed.items():
            with suppress(Busy):
                self._start_beside("thaw", vm, f"vm:{uuid}", partial(self._runner.thaw, uuid=uuid, vm=vm))

    def _run_queued(self) -> None:
        while self._queue and len(self._tasks) - len(self._beside) < self._parallel:
            self._run(*self._queue.popleft())

    def _run(self, job: Job, work: Work) -> None:
        job.advance(JobState.RUNNING)
        context = JobContext(job.id, job.observer, partial(self._claim, job), partial(self._others, job))
        variables = copy_context()
        variables.run(current_job.set, job)
        task = asyncio.get_running_loop().create_task(work(context), name=f"job {job.id}", context=variables)
        self._tasks[job.id] = task
        # A callback and not the coroutine's own end: a task that is cancelled before its first step runs no code.
        task.add_done_callback(partial(self._ended, job))

    def _cancel(self, job: Job) -> None:
        if job.state is JobState.QUEUED:
            self._queue = deque(item for item in self._queue if item[0] is not job)
            self._finish(job, JobState.CANCELLED, error=Cancelled(f"job {job.id} was cancelled before it began"))
        elif job.state is JobState.RUNNING:
            job.advance(JobState.CANCELLING)
            # Once only: what follows is the work's undoing, which nothing may interrupt.
            self._tasks[job.id].cancel()

    def _ended(self, job: Job, task: asyncio.Task[Result]) -> None:
        del self._tasks[job.id]
        self._beside.discard(job.id)
        error = Cancelled(f"job {job.id} was cancelled") if task.cancelled() else task.exception()
        if error is None:
            if job.state is JobState.CANCELLING:
                job.observer.warning("the job was complete before it could be cancelled")
            self._finish(job, JobState.SUCCEEDED, result=task.result())
        elif isinstance(error, Cancelled):
            self._finish(job, JobState.CANCELLED, error=error)
        elif isinstance(error, BackupError):
            log.error("job %s (%s %s) failed: %s", job.id, job.kind, job.vm, error, extra=_fields(job))
            self._finish(job, JobState.FAILED, error=error)
        else:
            log.error("job %s (%s %s) failed", job.id, job.kind, job.vm, exc_info=error, extra=_fields(job))
            wrapped = BackupError(f"internal error: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            self._finish(job, JobState.FAILED, error=wrapped)

    def _finish(
        self, job: Job, state: JobState, *, result: Result | None = None, error: BackupError | None = None
    ) -> None:
        self._claims = {resource: owner for resource, owner in self._claims.items() if owner is not job}
        job.finish(state, result=result, error=error)
        if not self._closing:
            if job.kind != "thaw":  # one that ended in vain, or was cancelled, is not begun again by its own end
                self._start_thaws()
            self._run_queued()
        ended = [old for old in self._jobs.values() if old.state.final]
        for old in ended[: max(0, len(ended) - HISTORY)]:
            del self._jobs[old.id]
            self._changed(old, {"removed"})

    def _claim(self, job: Job, resource: str) -> None:
        owner = self._claims.setdefault(resource, job)
        if owner is not job:
            what = resource.partition(":")[2] or resource
            raise Busy(f"{what}: job {owner.id} ({owner.kind}, {owner.state}) works on it; wait for it or cancel it")

    def _others(self, job: Job) -> frozenset[str]:
        return self._active() - {job.id}

    def _active(self) -> frozenset[str]:
        return frozenset(job.id for job in self._jobs.values() if not job.state.final)

    def _new_id(self) -> str:
        while True:
            job_id = f"j{secrets.token_hex(4)}"
            if job_id not in self._jobs:
                return job_id

    def _changed(self, job: Job, names: set[str]) -> None:
        if names == {"state"} or "ended" in names:
            log.info("job %s (%s %s) is %s", job.id, job.kind, job.vm, job.state, extra=_fields(job))
        for subscriber in list(self._subscribers):
            try:
                subscriber(job, names)
            except Exception:  # one listener's bug must not end the job
                log.exception("a subscriber failed on a change of job %s", job.id)


def _fields(job: Job) -> dict[str, str]:
    """Journal fields of a log record about ``job`` that is not written by its own task."""
    return {"VMBACKUP_JOB": job.id, "VMBACKUP_VM": job.vm}


def _require_names(**names: str) -> None:
    for what, name in names.items():
        if not name.strip():
            raise InvalidArgument(f"the {what} has no name")


def _require_path(path: str) -> None:
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"the path must be absolute, not {path!r}")
