"""One job: what it is, how far it is, how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from vmbackupd.errors import BackupError, InvalidArgument
from vmbackupd.job.observer import JobObserver
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
from vmbackupd.job.states import advance
from vmbackupd.model import JobState

Result = dict[str, object]

# The job whose work the current task does, for log records.
current_job: ContextVar[Job | None] = ContextVar("current_job", default=None)


@dataclass(frozen=True, slots=True)
class JobContext:
    """What the work gets of its job.

    ``claim(resource)`` takes a resource (``vm:UUID``, a target) for the length of the job and raises ``Busy`` when
    another job holds it. ``others()`` are the ids of the other jobs that have not ended: their journals are in use.
    """

    id: str
    observer: JobObserver
    claim: Callable[[str], None]
    others: Callable[[], frozenset[str]]


class Runner(Protocol):
    """Who does the work of jobs, and reads the repository for listings. Results are JSON objects.

    A coroutine of a job that is cancelled gets one ``CancelledError``; it undoes what it did, however long that takes,
    and ends with ``Cancelled`` or ``CancelledError``. Any other error fails the job.
    """

    async def backup(self, job: JobContext, vm: str, options: BackupOptions) -> Result:
        """Back ``vm`` up: ``{"backup": id, "uncovered": [volume, ...], ...}``."""

    async def restore(self, job: JobContext, backup: str, options: RestoreOptions) -> Result:
        """Restore, or with ``dry_run`` plan it: ``{"backup", "name", "uuid", "directory", "volumes": [...], ...}``."""

    async def inspect(self, job: JobContext, vm: str) -> Result:
        """``{"vm", "uuid", "would_fail", "coverage": [{"device", "id", "size", "kind", "method", "decision",
        "reason"}]}``."""

    async def recover(self, job: JobContext) -> Result:
        """Undo what dead jobs left: ``{"recovered": [{"job", "vm", "undone": [...], "failed": [...]}]}``."""

    def unthawed(self, running: Collection[str]) -> Mapping[str, str]:
        """VMs that a job which is not ``running`` may have left frozen: uuid → name. Raises ``OSError``."""

    async def thaw(self, job: JobContext, uuid: str, vm: str) -> Result:
        """Thaw a VM as soon as its agent answers, then undo what else was left on it; answers like :meth:`recover`."""

    async def list_machines(self) -> list[Result]:
        """``[{"name", "uuid", "running"}]``."""

    async def list_backups(self, vm: str | None) -> list[Result]:
        """``[{"id", "vm", "created", "t1", "size", ...}]``, of one VM or all, oldest first."""

    async def show_backup(self, backup: str) -> Result:
        """The manifest with its proof: ``t1``, ``t2``, ``freeze_ms``, ``volumes``, ``coverage``, ..."""

    async def forget(self, job: JobContext, backups: tuple[str, ...], dry_run: bool) -> Result:
        """Forget these: ``{"dry_run", "decisions": [{"backup", "keep", "reason"}], "forgotten": [id], "waiting":
        [who]}``."""

    async def prune(self, job: JobContext, vm: str | None, options: PruneOptions) -> Result:
        """Forget what the rules do not keep, of one VM or each; answers like ``forget``."""

    async def gc(self, job: JobContext, options: GcOptions) -> Result:
        """Give back the room of what no backup needs: ``{"removed_packs", "freed_bytes", "repacked_bytes",
        ...}``."""

    async def verify(self, job: JobContext, options: VerifyOptions) -> Result:
        """Check the repository: ``{"complete", "damaged": [backup], ...}``."""

    async def export(self, job: JobContext, backup: str, volume: str, file: str, options: ExportOptions) -> Result:
        """Write a volume into an image file: ``{"backup", "volume", "path", "format", "size", ...}``."""

    async def import_image(self, job: JobContext, file: str, name: str, options: ImportOptions) -> Result:
        """Make an image file a backup: ``{"backup", "size", ...}``."""

    async def serve(self, job: JobContext, backup: str, volume: str, options: ServeOptions) -> Result:
        """Serve a volume over NBD until the job is cancelled. The step ``serving SOCKET`` tells that it can be read."""

    async def protect(self, backup: str, protected: bool) -> Result:
        """Protect a backup from ``forget`` and ``prune``, or no longer: ``{"backup", "protected"}``."""

    async def list_keys(self) -> list[Result]:
        """Key slots: ``[{"id", "kind", "label", "created"}]``, oldest first."""

    async def add_key(self, options: KeyOptions) -> Result:
        """Add a key slot; answers with it."""

    async def revoke_key(self, slot: str) -> Result:
        """Remove a key slot: ``{"revoked": id}``. Refuses the last one."""

    async def init_repository(self, options: InitOptions) -> Result:
        """Make the configured repository: ``{"id", "place", "encrypted", "keys": [...], ...}``."""

    async def repository_info(self) -> Result:
        """``{"id", "path", ...}`` of the configured repository."""


class Job:
    """One job as callers see it. ``created`` and ``ended`` are Unix times in seconds."""

    def __init__(
        self, job_id: str, kind: str, vm: str, notify: Callable[[Job, set[str]], None], cancel: Callable[[Job], None]
    ) -> None:
        self.id = job_id
        self.kind = kind
        self.vm = vm
        self.state = JobState.QUEUED
        self.result: Result = {}
        self.error: BackupError | None = None
        self.created = time.time()
        self.ended: float | None = None
        self.observer = JobObserver(self.changed)
        self._notify = notify
        self._cancel = cancel
        self._finished = asyncio.Event()

    @property
    def step(self) -> str:
        """What it is doing now, or was doing when it ended."""
        return self.observer.current_step

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes done and in all; a total of 0 is unknown."""
        return self.observer.bytes_done, self.observer.bytes_total

    @property
    def warnings(self) -> list[str]:
        return self.observer.warnings

    def cancel(self) -> None:
        """Ask the job to stop and to undo what it did. Asking again changes nothing.

        Raises ``InvalidArgument`` when it has already ended.
        """
        if self.state.final:
            raise InvalidArgument(f"job {self.id} has already {self.state}")
        self._cancel(self)

    async def wait(self) -> None:
        """Wait until it has ended."""
        await self._finished.wait()

    def changed(self, names: set[str]) -> None:
        """Tell subscribers."""
        self._notify(self, names)

    def advance(self, state: JobState) -> None:
        """Take a state that is not final."""
        self.state = advance(self.id, self.state, state)
        self.changed({"state"})

    def finish(self, state: JobState, *, result: Result | None = None, error: BackupError | None = None) -> None:
        """Take a final state, once."""
        self.state = advance(self.id, self.state, state)
        self.result = result or {}
        self.error = error
        self.ended = time.time()
        pending = self.observer.close()
        self.changed({"state", "result", "error", "ended"} | pending)
        self._finished.set()
