"""The work behind the job manager: backup, inspect, restore and recovery, on one hypervisor and one repository."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager

from vmbackupd.config import Config
from vmbackupd.errors import BackupError, HypervisorError
from vmbackupd.host.udev import UdevWatch
from vmbackupd.hypervisor.base import DomainInfo, Hypervisor
from vmbackupd.hypervisor.storage_daemon import end_leftovers
from vmbackupd.job import listing, pipeline, recovery
from vmbackupd.job.backupid import backup_id
from vmbackupd.job.bases import Bases
from vmbackupd.job.context import BackupContext, to_the_end
from vmbackupd.job.exchanging import Exchange
from vmbackupd.job.faultpoints import reach
from vmbackupd.job.job import JobContext, Result
from vmbackupd.job.journal import Header, Journal
from vmbackupd.job.options import BackupOptions, RestoreOptions
from vmbackupd.job.steps import inspect, release
from vmbackupd.job.undo import UndoContext
from vmbackupd.repository import Repository
from vmbackupd.restore.execute import execute
from vmbackupd.restore.planner import make_plan

log = logging.getLogger("job.runner")


class JobRunner(Exchange):
    """What the manager's jobs do. One instance a daemon; between jobs it keeps nothing but the journals on disk."""

    def __init__(self, config: Config, hypervisor: Hypervisor) -> None:
        super().__init__(config, hypervisor)
        self._recovering = asyncio.Lock()  # two at a time would undo the same effects

    # Jobs

    async def backup(self, job: JobContext, vm: str, options: BackupOptions) -> Result:
        """Back ``vm`` up; see :class:`vmbackupd.job.job.Runner`."""
        began = time.monotonic()
        async with self.repositories.using() as repository:
            domain = await self._claim(job, vm)
            async with self._context(job, domain, options) as ctx:
                beginning, cancelled = await to_the_end(
                    asyncio.to_thread(repository.writer, backup_id(domain.name, time.time()))
                )
                ctx.writer = beginning.result()
                if cancelled:
                    raise asyncio.CancelledError
                ctx.bases = await asyncio.to_thread(Bases, repository, ctx.writer, domain.uuid)
                timeline = await pipeline.run(ctx)
                assert ctx.manifest is not None
                result = listing.backup_result(ctx.manifest, timeline, time.monotonic() - began)
        if pruned := await self.prune_after_backup(domain.uuid, job.observer):
            result["pruned"] = pruned
        return result

    async def inspect(self, job: JobContext, vm: str) -> Result:
        """What a backup of ``vm`` would do with each of its devices."""
        domain = await self._claim(job, vm)
        async with self._context(job, domain, BackupOptions()) as ctx:
            await pipeline.run(ctx, (("inspect", inspect.look), ("release", release.run)))
            assert ctx.coverage is not None
            return listing.inspection(domain, ctx.coverage)

    async def restore(self, job: JobContext, backup: str, options: RestoreOptions) -> Result:
        """Restore ``backup``, or plan it."""
        job.observer.step("plan")
        async with self.repositories.reading(backup) as (repository, manifest):
            plan = await make_plan(
                manifest, options, repository=repository, hypervisor=self.hypervisor, storage_daemon=self.storage_daemon
            )
            if options.dry_run:
                return plan.as_dict()
            plan.require_sound()
            for resource in plan.resources:
                job.claim(resource)
            job.observer.expect(plan.size)
            name, uuid = (plan.domain.name, plan.domain.uuid) if plan.domain is not None else ("", "")
            if name:
                job.claim(f"vm:{name}")
            async with self.journal(job, "restore", name, uuid) as on_effect:
                return await execute(
                    plan,
                    repository=repository,
                    manifest=manifest,
                    storage_daemon=self.storage_daemon,
                    hypervisor=self.hypervisor,
                    observer=job.observer,
                    on_effect=on_effect,
                )

    async def recover(self, job: JobContext) -> Result:
        """Undo what dead jobs left behind.

        Raises ``HypervisorError`` naming what could not be undone; it stays in the journals.
        """
        job.observer.step("recover")
        await asyncio.to_thread(end_leftovers, self.config.runtime_directory)  # they lock images that are to be mended
        async with self._recovering:
            recovered = await recovery.recover_all(self.hypervisor, self.journals, job.others())
        await asyncio.to_thread(self._clean_repository)  # after the guests, which must not wait for a slow storage
        return _told(job, recovered)

    def unthawed(self, running: Collection[str]) -> Mapping[str, str]:
        """VMs that a job which is not ``running`` may have left frozen: uuid → name."""
        return recovery.unthawed(self.journals, running)

    async def thaw(self, job: JobContext, uuid: str, vm: str) -> Result:
        """Thaw a guest that a job may have left frozen as soon as its agent answers, then undo what else was left.

        Raises ``HypervisorError`` naming what could not be undone; it stays in the journals.
        """
        job.observer.step("thaw")
        await recovery.thaw(UndoContext(self.hypervisor, job.id, vm, uuid))
        job.observer.step("recover")
        return _told(job, await self._recover(job, uuid))

    # Listings

    async def list_machines(self) -> list[Result]:
        """Every domain of the hypervisor."""
        return [
            {"name": name, "uuid": uuid, "running": running} for name, uuid, running in await self.hypervisor.domains()
        ]

    async def list_backups(self, vm: str | None) -> list[Result]:
        """Backups of ``vm`` or all, oldest first."""

        def read(repository: Repository) -> list[Result]:
            backups = repository.backups()
            protected = repository.protected(backup.id for backup in backups)
            return [
                {**backup.to_json(), "protected": backup.id in protected}
                for backup in backups
                if vm is None or backup.error is not None or vm in (backup.vm_name, backup.vm_uuid)
            ]

        return await self._read(read)

    async def show_backup(self, backup: str) -> Result:
        """The manifest of one backup, with its proof."""

        def read(repository: Repository) -> Result:
            return {**listing.shown(repository.manifest(backup)), "protected": backup in repository.protected([backup])}

        return await self._read(read)

    # Shared by the jobs

    def _clean_repository(self) -> None:
        """Remove what dead writers left in the repository. That it is missing is told when somebody needs it.

        In an object store the next backup or gc does it: a daemon's start must not wait for a network.
        """
        if self.config.repository.path is None:
            return
        try:
            with self.repositories.use() as repository:
                repository.clean_up()
        except BackupError as error:
            log.info("the repository is not cleaned up: %s", error)

    async def _claim(self, job: JobContext, vm: str) -> DomainInfo:
        """The domain, for this job alone, with nothing left on it of an earlier one.

        Raises ``HypervisorError`` when what an earlier job left cannot be undone.
        """
        domain = await self.hypervisor.domain(vm)
        job.claim(f"vm:{domain.uuid}")
        if recovery.journals_of(self.journals, domain.uuid, job.others() | {job.id}):
            job.observer.step("recover")
            for recovered in await self._recover(job, domain.uuid):
                for failed in recovered.failed:
                    raise HypervisorError(
                        f"VM {domain.name}: an earlier job ({recovered.job}) left something that cannot be undone: "
                        f"{failed.undo}: {failed.error}; mend that, then run vmbackupctl recover"
                    )
        return await self.hypervisor.domain(domain.uuid)

    async def _recover(self, job: JobContext, uuid: str) -> list[recovery.Recovered]:
        """Undo what earlier jobs left on one VM."""
        async with self._recovering:
            paths = recovery.journals_of(self.journals, uuid, job.others() | {job.id})
            return [await recovery.recover(self.hypervisor, path) for path in paths]

    @asynccontextmanager
    async def _context(
        self, job: JobContext, domain: DomainInfo, options: BackupOptions
    ) -> AsyncIterator[BackupContext]:
        await reach("job:claimed")
        journal = Journal.create(self.journals, Header(job.id, "backup", domain.name, domain.uuid))
        undo = UndoContext(self.hypervisor, job.id, domain.name, domain.uuid)
        watch = UdevWatch()
        ctx = BackupContext(
            job.id, domain.name, options, self.config, self.hypervisor, job.observer, journal, undo, domain, watch
        )
        try:
            async with watch:
                yield ctx
        finally:
            for what, close in (
                ("guest helper", ctx.close_helper),
                ("storage daemon", ctx.close_storage),
                ("repository writer", ctx.abort_writer),
            ):
                try:
                    await close()
                except (BackupError, OSError) as error:
                    log.error("VM %s: closing the %s: %s", domain.name, what, error)
            journal.close()


def _told(job: JobContext, recovered: list[recovery.Recovered]) -> Result:
    """What was recovered. Raises ``HypervisorError`` naming what could not be undone; it stays in the journals."""
    for item in recovered:
        for failed in item.failed:
            job.observer.warning(f"VM {item.vm}: {failed.undo}: {failed.error}")
    for item in recovered:
        for failed in item.failed:
            raise HypervisorError(
                f"VM {item.vm}: {failed.undo} of job {item.job} could not be undone: {failed.error}; mend that, then "
                "run vmbackupctl recover again"
            )
    return {"recovered": [item.to_dict() for item in recovered]}
