"""A target while it is written: made or claimed, exported over NBD, and at the end finished or given up."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from contextlib import AsyncExitStack

from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import BackupError, TargetRefused
from vmbackupd.host.imagelocks import lock_users
from vmbackupd.host.newfile import NewFile, OnEffect, sync
from vmbackupd.hypervisor.images import qcow2_obstacle
from vmbackupd.hypervisor.storage_daemon import create_qcow2
from vmbackupd.restore.address import TargetKind
from vmbackupd.restore.look import StorageDaemonFactory, image_spec
from vmbackupd.restore.plan import VolumePlan, Writing

log = logging.getLogger("restore.targets")


class OpenTarget:
    """One volume's target. :meth:`close` when it is complete, :meth:`give_up` when it will not be."""

    def __init__(self, plan: VolumePlan, vm: str, on_effect: OnEffect) -> None:
        self.plan = plan
        self._vm = vm
        self._stack = AsyncExitStack()
        in_place = plan.writing is Writing.IN_PLACE
        self._new = None if in_place else NewFile(plan.target.file, plan.writing is Writing.REPLACE, on_effect)
        #: A new raw file is written straight, with no server in between: nobody else knows of it yet.
        self.fd: int | None = None
        self._direct = self._new is not None and plan.target.kind is TargetKind.RAW and not plan.revert
        self._socket = ""
        self._export = ""

    @property
    def is_zero(self) -> bool:
        """Whether what is not written reads as zeros. A device that looks empty was sampled only."""
        return self._new is not None

    async def open(self, storage_daemon: StorageDaemonFactory) -> None:
        """Make the file where there is one to make, claim what is there, and export it, unless it is written straight.
        Raises ``TargetRefused``."""
        try:
            if self._new is None:
                await asyncio.to_thread(self._claim)
                if self.plan.target.kind is TargetKind.QCOW2:
                    obstacle = await qcow2_obstacle(self.plan.target.file, self.plan.size)
                    if obstacle is not None:
                        raise TargetRefused(f"it {obstacle}")
            else:
                await self._create(self._new)
            if self._direct:
                return
            daemon = await self._stack.enter_async_context(storage_daemon())
            spec = image_spec(self.plan.target, self._new.part if self._new is not None else None)
            self._socket, self._export = await daemon.export(self.plan.record.id, spec, writable=True)
            await asyncio.to_thread(self._check_size)
        except (OSError, BackupError) as error:
            raise TargetRefused(f"VM {self._vm}: volume {self.plan.record.id}: {self.plan.target} cannot be opened"
                                " for writing"
                                f" ({error}): free it or name another target") from error

    def connect(self) -> NbdConnection:
        """A connection that writes to the target. Blocks."""
        return NbdConnection(unix=self._socket, export=self._export)

    async def _create(self, file: NewFile) -> None:
        fd = file.reserve()
        if self._direct:
            self.fd = fd
            self._stack.callback(os.close, fd)
            return
        try:
            if self.plan.target.kind is TargetKind.RAW:
                os.ftruncate(fd, self.plan.size)
        finally:
            os.close(fd)
        if self.plan.target.kind is TargetKind.QCOW2:
            os.unlink(file.part)  # create_qcow2 makes its file itself, as exclusively as reserve does
            await create_qcow2(file.part, self.plan.size)

    def _claim(self) -> None:
        """Look again who uses what is there: the plan may be minutes old. A block device stays claimed while it is
        written, so that the kernel lets nobody mount it; QEMU's own locks do the same for files."""
        target = self.plan.target
        if target.kind is TargetKind.BLOCK:
            try:
                fd = os.open(target.file, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise TargetRefused("it is in use") from error
                raise
            self._stack.callback(os.close, fd)
        elif target.is_file:
            fd = os.open(target.file, os.O_RDWR | os.O_CLOEXEC)
            try:
                if users := lock_users(fd):
                    raise TargetRefused(users[0])
                if target.kind is TargetKind.QCOW2:
                    return
                # A raw file takes the volume's exact size: the guest must not see the rest of what was there.
                if os.fstat(fd).st_size > self.plan.size:
                    os.ftruncate(fd, self.plan.size)
            finally:
                os.close(fd)

    def _check_size(self) -> None:
        connection = self.connect()
        try:
            if connection.size < self.plan.size:
                raise TargetRefused(f"it has {connection.size} bytes, the volume {self.plan.size}")
        finally:
            connection.close()

    async def close(self) -> None:
        """End the export: everything written is on stable storage afterwards."""
        await self._stack.aclose()
        if self.plan.target.path is not None:
            await asyncio.to_thread(sync, self._new.part if self._new is not None else self.plan.target.file)

    def rename(self) -> None:
        """Give a new file its name; it must be closed."""
        if self._new is not None:
            self._new.rename()

    def keep(self) -> None:
        """The restore is complete: the file stays."""
        if self._new is not None:
            self._new.keep()

    async def give_up(self) -> None:
        """Close without care for what was written, and remove the file where this restore made one."""
        try:
            await self._stack.aclose()
        except (BackupError, OSError) as error:
            log.warning("VM %s: closing %s: %s", self._vm, self.plan.target, error)
        if self._new is not None:
            self._new.remove()
