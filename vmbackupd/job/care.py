"""Care of the repository: forget, prune, gc, verify, keys. Each may run beside backups, here and on other hosts."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from vmbackupd.config import Config
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import BackupError, Cancelled, InvalidArgument, NotFound, Protected, RepositoryCorrupt
from vmbackupd.exchange.observer import Stoppable, in_thread
from vmbackupd.job.context import to_the_end
from vmbackupd.job.job import JobContext, Result
from vmbackupd.job.observer import JobObserver
from vmbackupd.job.options import GcOptions, InitOptions, KeyOptions, PruneOptions, VerifyOptions
from vmbackupd.job.repositories import Repositories, recovery_key
from vmbackupd.repository import BackupSummary, Repository
from vmbackupd.repository.forget import ForgetResult
from vmbackupd.repository.keys import (
    Credential,
    KeyFile,
    KeySource,
    Passphrase,
    RecoveryKey,
    SlotInfo,
    list_slots,
    new_recovery_key,
)
from vmbackupd.repository.retention import Decision, KeepPolicy
from vmbackupd.repository.verify import verify

log = logging.getLogger("job.care")

MISSING = "there is none"

T = TypeVar("T")


class Stage:
    """How far work in a thread says it is, for the event loop to show, and the wish that it ends."""

    def __init__(self) -> None:
        self._now = ("", 0, 0)
        self._shown = ""
        self._cancelled = False

    def __call__(self, step: str, done: int, total: int) -> None:
        """What the work calls. Raises ``Cancelled`` when it is to end."""
        self._now = (step, done, total)
        if self._cancelled:
            raise Cancelled(f"{step} was stopped")

    def cancel(self) -> None:
        """The next call ends the work."""
        self._cancelled = True

    def show(self, observer: JobObserver) -> None:
        """Pass on what is new. To be called in the event loop."""
        step, done, total = self._now
        if step != self._shown:
            self._shown = step
            observer.step(step)
        observer.progress(done, total)


class RepositoryCare:
    """The part of the runner that works on the repository alone."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.repositories = Repositories(config)

    # ---- jobs

    async def forget(self, job: JobContext, backups: tuple[str, ...], dry_run: bool) -> Result:
        """Forget backups by name: all of them, or if one cannot be, none."""
        job.observer.step("forget")

        def work(repository: Repository) -> Result:
            wanted = tuple(dict.fromkeys(backups))
            decisions = [Decision(_summary(repository, backup), False, "named") for backup in wanted]
            if missing := [item.backup.id for item in decisions if item.backup.error == MISSING]:
                raise NotFound(f"nothing was forgotten: there is no backup {', '.join(missing)} in the repository")
            protected = repository.protected(wanted)
            if kept := [backup for backup in wanted if backup in protected]:
                raise Protected(
                    f"nothing was forgotten: protected is {', '.join(kept)}; `vmbackupctl unprotect` takes that away"
                )
            return removal(decisions, None if dry_run else repository.forget(wanted))

        return await self._to_the_end(work)

    async def prune(self, job: JobContext, vm: str | None, options: PruneOptions) -> Result:
        """Forget what the rules do not keep."""
        job.observer.step("prune")
        keep = dict(options.keep) or self.config.retention.keeps
        if not any(keep.values()):
            raise InvalidArgument(
                "no rule keeps any backup, and nothing is pruned then: give --keep-last, --keep-daily, ... or set them"
                " in [retention] of the configuration"
            )
        return await self._to_the_end(lambda repository: _prune(repository, vm, KeepPolicy(**keep), options.dry_run))

    async def prune_after_backup(self, vm_uuid: str, observer: JobObserver) -> list[str]:
        """The ids of what the configured rules do not keep of this VM, forgotten. A failure is a warning: the backup
        that was made stands."""
        retention = self.config.retention
        if not retention.after_backup:
            return []
        observer.step("prune")
        try:
            policy = KeepPolicy(**retention.keeps)
            result = await self._to_the_end(lambda repository: _prune(repository, vm_uuid, policy, False))
        except BackupError as error:
            observer.warning(f"the backup was made, but older ones were not pruned: {error}")
            return []
        return list(result["forgotten"])  # type: ignore[call-overload, no-any-return]

    async def gc(self, job: JobContext, options: GcOptions) -> Result:
        """Collect garbage. A cancellation ends it where nothing is half done."""
        job.observer.step("open")
        stage = Stage()

        def work(repository: Repository) -> Result:
            given = {} if options.threshold is None else {"threshold": options.threshold}
            return asdict(repository.gc(dry_run=options.dry_run, progress=stage, **given))

        return await self._in_thread(work, stage, lambda: stage.show(job.observer))

    async def verify(self, job: JobContext, options: VerifyOptions) -> Result:
        """Check the repository. How far it came is kept, so that the next one goes on there if this is interrupted."""
        job.observer.step("verify-data" if options.data else "verify")
        progress = Progress()

        def work(repository: Repository) -> Result:
            state = self._verify_state(repository)
            if options.restart:
                state.unlink(missing_ok=True)
            report = verify(
                repository,
                backups=list(options.backups) or None,
                data=options.data,
                rate=options.rate,
                state=state,
                progress=progress,
            )
            return report.as_dict()

        return await self._in_thread(
            work, progress, lambda: job.observer.progress(progress.bytes_done, progress.bytes_total)
        )

    # ---- at once

    async def protect(self, backup: str, protected: bool) -> Result:
        """Protect a backup from being forgotten, or no longer."""

        def work(repository: Repository) -> Result:
            repository.protect(backup, protected)
            return {"backup": backup, "protected": protected}

        return await self._to_the_end(work)

    async def init_repository(self, options: InitOptions) -> Result:
        """Make the configured repository."""

        def create() -> Result:
            with self.repositories.create(options) as repository:
                return self._info(repository)

        made, _ = await to_the_end(asyncio.to_thread(create))
        return made.result()

    async def repository_info(self) -> Result:
        """Facts about the configured repository."""
        return await self._read(self._info)

    async def list_keys(self) -> list[Result]:
        """The key slots. Needs no key."""

        def read() -> list[Result]:
            storage = self.repositories.storage()
            try:
                return [_slot(slot) for slot in list_slots(storage)]
            finally:
                storage.close()

        return await asyncio.to_thread(read)

    async def add_key(self, options: KeyOptions) -> Result:
        """Add a key slot."""

        def add() -> Result:
            unlocking: list[KeySource] = [recovery_key(options.unlock)] if options.unlock else self.repositories.keys()
            with self.repositories.open(unlocking) as repository:
                label = options.label or f"{options.kind} added on {socket.gethostname()}"[:100]
                return _slot(repository.add_key(_source(options), label))

        added, _ = await to_the_end(asyncio.to_thread(add))
        return added.result()

    async def revoke_key(self, slot: str) -> Result:
        """Remove a key slot."""

        def work(repository: Repository) -> Result:
            repository.revoke_key(slot)
            return {"revoked": slot}

        return await self._to_the_end(work)

    # ---- shared

    async def _read(self, work: Callable[[Repository], T]) -> T:
        """``work`` in a thread, which may be left behind: it changes nothing."""

        def read() -> T:
            with self.repositories.use() as repository:
                return work(repository)

        return await asyncio.to_thread(read)

    async def _to_the_end(self, work: Callable[[Repository], T]) -> T:
        """Short ``work`` in a thread. A cancellation comes too late for it: what it did is told."""

        def change() -> T:
            with self.repositories.use() as repository:
                return work(repository)

        task, _ = await to_the_end(asyncio.to_thread(change))
        return task.result()

    async def _in_thread(self, work: Callable[[Repository], T], stop: Stoppable, report: Callable[[], None]) -> T:
        """Long ``work`` in a thread, which a cancellation ends through ``stop``."""
        async with self.repositories.using() as repository:
            return await in_thread(lambda: work(repository), stop, report)

    def _verify_state(self, repository: Repository) -> Path:
        """Where a verify of the data notes how far it is."""
        directory = self.config.state_directory / "verify"
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory / repository.id

    def _info(self, repository: Repository) -> Result:
        encrypted = repository.header.encrypted
        keys = [_slot(slot) for slot in repository.key_slots()] if encrypted else []
        return {**repository.info(), "encrypted": encrypted, **({"keys": keys} if encrypted else {})}


def _summary(repository: Repository, backup: str) -> BackupSummary:
    """A backup that is to be forgotten, also one that cannot be read: that is listed under its object's name."""
    try:
        return BackupSummary.of(repository.manifest(backup))
    except NotFound:
        return BackupSummary(backup, error="damaged" if backup in repository.manifest_names() else MISSING)
    except RepositoryCorrupt as error:
        return BackupSummary(backup, error=str(error))


def removal(decisions: Sequence[Decision], done: ForgetResult | None) -> Result:
    """What ``forget`` and ``prune`` answer; ``done`` None is a dry run."""
    rows = [
        {
            "backup": item.backup.id,
            "vm": item.backup.vm_name,
            "t1": item.backup.t1,
            "keep": item.keep,
            "reason": item.reason,
        }
        for item in decisions
    ]
    result: Result = {"dry_run": done is None, "decisions": rows, **asdict(done or ForgetResult())}
    return {key: value for key, value in result.items() if value is not None}


def _prune(repository: Repository, vm: str | None, policy: KeepPolicy, dry_run: bool) -> Result:
    for last in (False, False, True):
        decisions = repository.prune(policy, vm=vm, dry_run=True)
        if vm is not None and not decisions:
            raise NotFound(f"there is no backup of a VM {vm} in the repository")
        if dry_run:
            return removal(decisions, None)
        try:
            return removal(decisions, repository.forget(item.backup.id for item in decisions if not item.keep))
        except (NotFound, Protected) as error:
            if last:
                raise
            log.info("prune looks again: %s", error)  # somebody else forgot or protected one in between
    raise AssertionError("the last try returns or raises")


def _source(options: KeyOptions) -> KeySource:
    if options.kind == "keyfile":
        return KeyFile(Path(options.path))
    if options.kind == "credential":
        return Credential(options.name)
    if options.kind == "passphrase":
        return Passphrase(options.secret)
    assert options.reveal is not None
    text = new_recovery_key()
    options.reveal(text)  # before it counts: a key nobody has is no help
    return RecoveryKey(text)


def _slot(slot: SlotInfo) -> Result:
    return {key: value for key, value in asdict(slot).items() if value is not None}
