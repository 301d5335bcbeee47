"""Exports, imports and servers as jobs: vmbackupd.exchange does them, here they get a repository, a journal and a
socket."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from vmbackupd.config import Config
from vmbackupd.exchange.export import ExportTarget, export_volume
from vmbackupd.exchange.import_image import ImageFile, import_images
from vmbackupd.exchange.serve import VolumeServer
from vmbackupd.host.newfile import OnEffect
from vmbackupd.hypervisor.base import Hypervisor
from vmbackupd.hypervisor.storage_daemon import StorageDaemon
from vmbackupd.job.backupid import backup_id
from vmbackupd.job.care import RepositoryCare
from vmbackupd.job.context import to_the_end
from vmbackupd.job.job import JobContext, Result
from vmbackupd.job.journal import Header, Journal
from vmbackupd.job.options import ExportOptions, ImportOptions, ServeOptions
from vmbackupd.job.undo import UndoContext, unwind

COMPRESSION = "zstd"  # of exported qcow2 images; QEMU reads it since 5.1


class Exchange(RepositoryCare):
    """The part of the runner that exchanges volumes with others."""

    def __init__(self, config: Config, hypervisor: Hypervisor) -> None:
        super().__init__(config)
        self.hypervisor = hypervisor

    @property
    def journals(self) -> Path:
        """The directory of the undo journals."""
        return self.config.state_directory / "journal"

    async def export(self, job: JobContext, backup: str, volume: str, file: str, options: ExportOptions) -> Result:
        """Write a volume into an image file."""
        target = ExportTarget(file, options.format, COMPRESSION if options.compress else None, options.force)
        async with (
            self.repositories.reading(backup) as (repository, manifest),
            self.journal(job, "export") as on_effect,
        ):
            return await export_volume(
                repository,
                manifest,
                volume,
                target,
                storage_daemon=self.storage_daemon,
                observer=job.observer,
                on_effect=on_effect,
            )

    async def import_image(self, job: JobContext, file: str, name: str, options: ImportOptions) -> Result:
        """Make an image file a backup."""
        image = ImageFile(file, options.volume, options.format)
        began = time.monotonic()
        async with self.repositories.using() as repository:
            manifest = await import_images(
                repository,
                backup_id(name, time.time()),
                name,
                [image],
                storage_daemon=self.storage_daemon,
                observer=job.observer,
                allow_backing=options.allow_backing,
            )
        return {
            "backup": manifest.id,
            "vm": name,
            "path": file,
            "size": sum(record.size for record in manifest.volumes),
            "bytes_read": sum(record.bytes_read for record in manifest.volumes),
            "bytes_stored": sum(record.bytes_stored for record in manifest.volumes),
            "seconds": round(time.monotonic() - began, 3),
        }

    async def serve(self, job: JobContext, backup: str, volume: str, options: ServeOptions) -> Result:
        """Serve a volume until the job is cancelled."""
        path = options.socket or str(self.config.runtime_directory / f"serve-{job.id}.sock")
        job.observer.step("open")
        async with (
            self.repositories.reading(backup) as (repository, manifest),
            self.journal(job, "serve") as on_effect,
            VolumeServer(repository, manifest, volume, path, on_effect=on_effect, group=options.group) as server,
        ):
            job.observer.step(f"serving {path}")
            await server.ended()
        return {}

    @property
    def storage_daemon(self) -> Callable[[], StorageDaemon]:
        """What makes a storage daemon for a job."""
        return partial(StorageDaemon, self.config.runtime_directory)

    @asynccontextmanager
    async def journal(self, job: JobContext, kind: str, vm: str = "", uuid: str = "") -> AsyncIterator[OnEffect]:
        """The journal of a job that undoes its own effects when it fails; what it could not is tried once more here,
        and then left to a recovery."""
        journal = Journal.create(self.journals, Header(job.id, kind, vm, uuid))
        try:
            yield partial(_record, journal)
            for entry in journal.pending:
                journal.done(entry)
        except BaseException:
            await to_the_end(unwind(UndoContext(self.hypervisor, job.id, vm, uuid), journal))
            raise
        finally:
            journal.close()


def _record(journal: Journal, undo: str, argument: str) -> Callable[[], None]:
    """Write an undo down; returns what takes it back when there is nothing to undo after all."""
    entry = journal.record(undo, **{"uuid" if undo == "undefine" else "path": argument})
    return partial(journal.done, entry)
