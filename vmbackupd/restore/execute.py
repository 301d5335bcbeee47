"""Carries out a plan: every volume, then the small files, then the domain. All of it or nothing stays."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Sequence
from typing import Protocol, TypeVar

from vmbackupd.errors import BackupError, NotFound, TargetRefused
from vmbackupd.host.newfile import OnEffect, Withdraw
from vmbackupd.hypervisor.base import Hypervisor
from vmbackupd.repository import Repository
from vmbackupd.repository.manifest import Manifest
from vmbackupd.restore.copying import write_volumes
from vmbackupd.restore.files import WrittenFiles
from vmbackupd.restore.look import StorageDaemonFactory
from vmbackupd.restore.plan import DomainPlan, RestorePlan
from vmbackupd.restore.targets import OpenTarget

log = logging.getLogger("restore")

T = TypeVar("T")


class Observer(Protocol):
    """Who is told how far the restore is. Called in the event loop."""

    def step(self, name: str) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def warning(self, text: str) -> None: ...


async def execute(plan: RestorePlan, *, repository: Repository, manifest: Manifest,
                  storage_daemon: StorageDaemonFactory, hypervisor: Hypervisor | None, observer: Observer,
                  on_effect: OnEffect) -> dict[str, object]:
    """Restore; returns the plan as a dict, with what was done added.

    Each effect that a crash would leave behind is told to ``on_effect`` before it happens; undone newest first, they
    leave the host as it was. On failure and on cancellation this coroutine has undone them itself when it raises, on
    success it has withdrawn them. Once the domain is defined the restore is complete: a cancellation comes too late
    then, and a domain that does not start is a warning. Raises ``TargetRefused``, ``TargetError``,
    ``RepositoryCorrupt``, ``StorageError``, ``StoreCorrupt``, ``HypervisorError``.
    """
    plan.require_sound()
    for note in plan.notes:
        observer.warning(note)
    files = WrittenFiles(plan, on_effect)
    targets = [OpenTarget(volume, plan.vm, on_effect) for volume in plan.volumes]
    began = time.monotonic()
    try:
        observer.step("prepare-targets")
        files.make_directories()
        for target in targets:
            await target.open(storage_daemon)
        observer.step("write-volumes")
        written = await write_volumes(repository, manifest, targets, plan.vm, observer.progress)
        observer.step("finish-targets")
        for target in targets:
            await target.close()
        blobs = {blob.blob: await asyncio.to_thread(repository.blob, blob.blob) for blob in plan.blobs}
        files.write(blobs)
        files.rename()
        for target in targets:
            target.rename()
        withdraw = None
        if plan.domain is not None:
            observer.step("define-domain")
            withdraw = await _to_the_end(_define(plan.domain, hypervisor, on_effect))
    except BaseException as error:
        observer.step("undo")
        await _to_the_end(_give_up(targets, files))
        if isinstance(error, OSError):
            raise TargetRefused(f"VM {plan.vm}: backup {plan.backup} was not restored: {error}; what had been made was"
                                " removed") from error
        raise
    # The domain last: a crash in between must not delete the files of a domain that stays defined.
    for target in targets:
        target.keep()
    files.keep()
    if withdraw is not None:
        withdraw()
    started = await _start(plan, hypervisor, observer)
    seconds = round(time.monotonic() - began, 3)
    return {**plan.as_dict(), "seconds": seconds, "started": started,
            "reverted_chunks": {volume: done.reverted for volume, done in written.items()},
            "bytes_written": {volume: done.bytes_written for volume, done in written.items()}}


async def _define(domain: DomainPlan, hypervisor: Hypervisor | None, on_effect: OnEffect) -> Withdraw:
    """Define the domain. Where that fails half way, the domain is taken back before its files are."""
    assert hypervisor is not None
    withdraw = on_effect("undefine", domain.uuid)
    try:
        await hypervisor.define(domain.xml)
    except BaseException:
        try:
            await hypervisor.undefine(domain.uuid)
        except NotFound:
            pass
        except BackupError as error:
            log.error("domain %s could not be undefined: %s", domain.name, error)
            raise
        withdraw()
        raise
    return withdraw


async def _give_up(targets: Sequence[OpenTarget], files: WrittenFiles) -> None:
    for target in targets:
        await target.give_up()
    files.remove()


async def _start(plan: RestorePlan, hypervisor: Hypervisor | None, observer: Observer) -> bool:
    """Start the restored domain if that was asked for. The restore is complete whether it starts or not."""
    if not plan.start or plan.domain is None or hypervisor is None:
        return False
    observer.step("start-domain")
    try:
        await _to_the_end(hypervisor.start(plan.domain.uuid))
    except BackupError as error:
        observer.warning(f"VM {plan.domain.name} is restored but did not start: {error}")
        return False
    return True


async def _to_the_end(work: Awaitable[T]) -> T:
    """Run ``work`` to its end, whatever cancellation comes meanwhile: it comes too late, or undoing has begun
    already."""
    task = asyncio.ensure_future(work)
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            log.info("a cancellation came too late")
    return task.result()
