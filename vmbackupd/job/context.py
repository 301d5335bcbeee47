"""What the steps of one backup share: who they work with, and what the earlier steps found."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from vmbackupd.config import Config
from vmbackupd.engine.copyloop import Progress
from vmbackupd.errors import SnapshotLost
from vmbackupd.guest.client import GuestHelper
from vmbackupd.guest.report import GuestReport
from vmbackupd.host.udev import UdevWatch
from vmbackupd.hypervisor.base import DomainInfo, FleeceExport, Hypervisor
from vmbackupd.hypervisor.storage_daemon import StorageDaemon
from vmbackupd.job import undo
from vmbackupd.job.bases import Bases, Start
from vmbackupd.job.coverage import Coverage, DiskPlan
from vmbackupd.job.journal import Entry, Journal
from vmbackupd.job.observer import JobObserver
from vmbackupd.job.options import BackupOptions
from vmbackupd.model import T2, ChangeRecord, VolumeMap
from vmbackupd.repository import RepositoryWriter
from vmbackupd.repository.manifest import Manifest

if TYPE_CHECKING:
    from vmbackupd.guest.replies import TrackedDisk
    from vmbackupd.job.pools import Thin
    from vmbackupd.job.reading import Reading

T = TypeVar("T")

PROGRESS_INTERVAL = 0.25  # seconds between looks at the engine's counters


@dataclass
class Captured:
    """What has been copied of one disk so far."""

    plan: DiskPlan
    tree: str | None = None
    t2_tree: str | None = None
    bytes_read: int = 0
    bytes_stored: int = 0
    reverted_chunks: int = 0
    change: ChangeRecord = field(default_factory=ChangeRecord)


@dataclass
class BackupContext:
    """One backup under way. Fields without a default are there from the start; the others appear step by step."""

    job: str
    vm: str
    options: BackupOptions
    config: Config
    hypervisor: Hypervisor
    observer: JobObserver
    journal: Journal
    undo: undo.UndoContext
    # inspect
    domain: DomainInfo
    host_events: UdevWatch
    writer: RepositoryWriter | None = None
    bases: Bases | None = None
    storage: StorageDaemon | None = None
    report: GuestReport | None = None
    coverage: Coverage | None = None
    # prepare
    scratch: str = ""
    scratch_target: str = ""
    data_socket: str = ""
    volume_maps: tuple[VolumeMap, ...] = ()
    tracked: dict[str, TrackedDisk] = field(default_factory=dict)
    untracked: dict[str, str] = field(default_factory=dict)
    untrusted: dict[str, str] = field(default_factory=dict)
    # pre-copy
    pre_copied: dict[str, Reading] = field(default_factory=dict)
    # T1
    starts: dict[str, Start] = field(default_factory=dict)
    thin: dict[str, Thin] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    t1: float = 0.0
    freeze_ms: float = 0.0
    suspend_ms: float = 0.0
    frozen_filesystems: int = 0
    # copies
    captured: dict[str, Captured] = field(default_factory=dict)
    store_tree: str | None = None
    store_size: int = 0
    config_blobs: dict[str, str] = field(default_factory=dict)
    # T2
    t2: float = 0.0
    fleece: dict[str, FleeceExport] = field(default_factory=dict)
    manifest: Manifest | None = None
    entries: dict[str, Entry] = field(default_factory=dict)

    @property
    def t2_wish(self) -> T2:
        """The kind of the second snapshot that is asked for."""
        return self.options.t2 or T2(self.config.virtual_disks.t2)

    @property
    def freeze_budget(self) -> float:
        """Seconds the guest may be frozen."""
        return self.options.freeze_budget or self.config.guest.freeze_budget

    @property
    def data_port(self) -> str:
        """The name of the virtio-serial port on which the helper serves disks."""
        return f"org.vmbackupd.{self.job}.d0"

    @property
    def generation(self) -> str:
        """What the guest's trackers will know this backup's T1 by."""
        assert self.writer is not None
        return self.writer.id.hex()

    @property
    def helper(self) -> GuestHelper:
        """The connection to the guest helper.

        Raises ``SnapshotLost`` when it is gone, and the snapshots with it.
        """
        if self.undo.helper is None:
            raise SnapshotLost(f"VM {self.vm}: the connection to the guest helper is gone")
        return self.undo.helper

    async def effect(self, name: str, undo_name: str, work: Awaitable[T], /, **args: str) -> T:
        """Write down the undo of ``work`` under ``name``, then do ``work`` to its end: an effect that is half begun in
        another thread when its undo runs would outlive it."""
        self.entries[name] = self.journal.record(undo_name, **args)
        return await uninterrupted(work)

    async def uninterrupted(self, work: Awaitable[T]) -> T:
        """See :func:`uninterrupted`."""
        return await uninterrupted(work)

    async def undo_now(self, name: str) -> None:
        """Undo one effect before the end, because the guest need not bear it any longer."""
        await uninterrupted(undo.undo_one(self.undo, self.journal, self.entries.pop(name)))

    async def bound_agent(self, command: str, arguments: Mapping[str, object] | None, timeout: float) -> object:
        """:meth:`agent` in the shape the guest layer calls it."""
        return await self.hypervisor.agent(self.domain.uuid, command, arguments, timeout=timeout)

    async def agent(self, command: str, arguments: Any = None, timeout: float = 30.0) -> object:
        """One guest agent command to this VM."""
        return await self.hypervisor.agent(self.domain.uuid, command, arguments, timeout=timeout)

    async def engine(
        self, progress: Progress, work: Callable[[], T], beside: Callable[[], Awaitable[None]] | None = None
    ) -> T:
        """Run ``work`` in a thread, showing ``progress``, and every second ``beside`` in the loop.

        A cancellation or an error of ``beside`` stops the engine and waits for its thread before it goes on.
        """
        base = self.observer.bytes_done
        thread = asyncio.ensure_future(asyncio.to_thread(work))
        last_beside = asyncio.get_running_loop().time()
        try:
            while not thread.done():
                await asyncio.wait({thread}, timeout=PROGRESS_INTERVAL)
                self.observer.progress(base + progress.bytes_done)
                now = asyncio.get_running_loop().time()
                if beside is not None and now - last_beside >= 1.0:
                    last_beside = now
                    await beside()
        except BaseException:
            progress.cancel()
            await asyncio.wait({thread})
            if not thread.cancelled():
                thread.exception()  # retrieved: the first error is the one that counts
            raise
        self.observer.progress(base + progress.bytes_done)
        return thread.result()

    async def close_helper(self) -> None:
        """Let go of the connection to the guest helper."""
        helper, self.undo.helper = self.undo.helper, None
        if helper is not None:
            await helper.close()

    async def close_storage(self) -> None:
        """End the storage daemon, and with it its locks on the images."""
        storage, self.storage = self.storage, None
        if storage is not None:
            await storage.close()

    async def abort_writer(self) -> None:
        """Give up what was written and not published."""
        writer, self.writer = self.writer, None
        if writer is not None:
            await asyncio.to_thread(writer.abort)


async def to_the_end(work: Awaitable[T]) -> tuple[asyncio.Future[T], bool]:
    """Let ``work`` run to its end; returns its finished future, and whether the caller was cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    return task, cancelled


async def uninterrupted(work: Awaitable[T]) -> T:
    """Run ``work`` to its end even if the job is cancelled meanwhile; the cancellation is delivered afterwards."""
    task, cancelled = await to_the_end(work)
    result = task.result()
    if cancelled:
        raise asyncio.CancelledError
    return result
