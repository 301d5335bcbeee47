"""Backups of virtual disks, step by step as the pipeline runs them, on real hypervisors, QEMU and repository. Only the
guest is missing: its agent and helper say what those of an idle guest would: every disk is captured in the freeze."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any, cast

from vmbackupd.config import Config, parse
from vmbackupd.guest.report import GuestReport, parse_report
from vmbackupd.host.udev import UdevWatch
from vmbackupd.hypervisor.base import Hypervisor
from vmbackupd.job import coverage, pipeline
from vmbackupd.job.bases import Bases
from vmbackupd.job.context import BackupContext
from vmbackupd.job.journal import Header, Journal
from vmbackupd.job.observer import JobObserver
from vmbackupd.job.options import BackupOptions
from vmbackupd.job.steps import release, revert, seal, t1_snapshot, t2_snapshot, vdisk_backup
from vmbackupd.job.undo import UndoContext
from vmbackupd.model import VolumeRecord
from vmbackupd.repository import Repository, RepositoryWriter
from vmbackupd.repository.manifest import Manifest

STEPS = (("t1-snapshot", t1_snapshot.run), ("t2-snapshot", t2_snapshot.run), ("vdisk-backup", vdisk_backup.run),
         ("revert", revert.run), ("release", release.run), ("seal", seal.run))


Work = Callable[[Hypervisor], Awaitable[Manifest]]


async def answer(uuid: str, command: str, arguments: object = None, *, timeout: float = 10.0) -> object:
    """What the agent of an idle guest says."""
    return "thawed" if command == "guest-fsfreeze-status" else 1


class Idle:
    """The helper in a guest that uses none of its disks."""

    devices: tuple[dict[str, object], ...] = ()

    async def probe(self) -> GuestReport:
        return parse_report({"boot_id": "b", "kernel": "6.1", "hostname": "web1", "devices": list(self.devices)})

    async def arm(self, seconds: float) -> None:
        pass

    async def disarm(self) -> bool:
        return False

    async def close(self) -> None:
        pass


class Backups:
    """Backups of one machine into one repository."""

    def __init__(self, machine: Any, repository: Repository, run: Callable[[Work], Manifest]) -> None:
        """``machine`` has its images in ``dir``, and a ``uuid``; ``run`` gives the work a hypervisor that is open
        meanwhile, and whose agent says what :func:`answer` does."""
        self.machine, self.repository, self.run = machine, repository, run
        self.number = 0
        self.warnings: list[str] = []
        self.during: Callable[[], None] = lambda: None  # called when the disks are still, or served
        self.helper = Idle()
        (machine.dir / "run").mkdir()
        (machine.dir / "channels").mkdir()

    def config(self, settings: str = "") -> Config:
        return parse(f"runtime_directory = '{self.machine.dir}/run'\n[guest]\nfreeze_budget = 30\n"
                     f"[scratch]\ndirectory = '{self.machine.dir}/scratch'\n{settings}")

    def take(self, settings: str = "", **options: Any) -> dict[str, VolumeRecord]:
        """One backup, its records by volume. What it leaves behind on the machine fails the test."""
        async def work(hv: Hypervisor) -> Manifest:
            with self.repository.writer(f"web1-{self.number}") as writer:
                ctx = await self._context(hv, writer, self.config(settings), BackupOptions(**options))
                try:
                    await pipeline.run(ctx, STEPS)
                finally:
                    self.warnings = ctx.observer.warnings
                    await ctx.close_storage()
                    ctx.journal.close()
                assert ctx.manifest is not None
                return ctx.manifest

        self.number += 1
        manifest = self.run(work)
        left = [name for name in os.listdir(self.machine.dir) if f".j{self.number}" in name]
        assert not left and not os.listdir(self.machine.dir / "journal")
        return {volume.id: volume for volume in manifest.volumes}

    async def _context(self, hv: Hypervisor, writer: RepositoryWriter, config: Config,
                       options: BackupOptions) -> BackupContext:
        domain = await hv.domain(self.machine.uuid)
        job = f"j{self.number}"
        journal = Journal.create(self.machine.dir / "journal", Header(job, "backup", domain.name, domain.uuid))
        undo = UndoContext(hv, job, domain.name, domain.uuid)
        ctx = BackupContext(job, domain.name, options, config, hv, JobObserver(lambda _: None), journal, undo, domain,
                            UdevWatch(), writer, Bases(self.repository, writer, domain.uuid))
        ctx.undo.helper = cast(Any, self.helper)
        ctx.report = await self.helper.probe()
        ctx.coverage = coverage.decide(domain, ctx.report, (), t2=ctx.t2_wish)
        helper = journal.record("unlink", socket=f"{self.machine.dir}/channels/c", path=f"{self.machine.dir}/none")
        ctx.entries["helper"] = helper
        original = ctx.engine

        async def engine(*words: Any, **more: Any) -> Any:
            during, self.during = self.during, lambda: None
            during()
            return await original(*words, **more)

        ctx.engine = engine  # type: ignore[method-assign]
        return ctx

    def image(self, record: VolumeRecord) -> bytes:
        """The disk at T1."""
        assert record.tree is not None
        return self.repository.image(record.tree).read(0, record.size)
