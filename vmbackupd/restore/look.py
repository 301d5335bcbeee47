"""A look at a target before anything is written: what is there, what it can hold, who it is, who uses it."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from contextlib import closing

from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import BackupError
from vmbackupd.host.imagelocks import lock_users
from vmbackupd.host.udev import identify
from vmbackupd.hypervisor.storage_daemon import ImageSpec, IscsiLun, StorageDaemon
from vmbackupd.restore.address import Target, TargetKind
from vmbackupd.restore.existing import device_size, first_data, first_file_data
from vmbackupd.restore.inuse import block_users
from vmbackupd.restore.plan import Content, Found

StorageDaemonFactory = Callable[[], StorageDaemon]


class CannotLook(Exception):
    """The target cannot be looked at, so it cannot be written either; the text says why."""


async def look(target: Target, storage_daemon: StorageDaemonFactory) -> Found:
    """What lies at ``target``, without the domains that use it. Raises :class:`CannotLook`."""
    try:
        if target.kind is TargetKind.ISCSI:
            return await _look_at_lun(target, storage_daemon)
        return await asyncio.to_thread(_look_at_block if target.kind is TargetKind.BLOCK else _look_at_file, target)
    except OSError as error:
        raise CannotLook(f"it cannot be examined ({error.strerror})") from error


def _look_at_file(target: Target) -> Found:
    try:
        status = os.stat(target.file)
    except FileNotFoundError:
        return Found(Content.ABSENT)
    if not stat.S_ISREG(status.st_mode):
        raise CannotLook("it is a directory" if stat.S_ISDIR(status.st_mode) else "it is neither a file nor a block"
                                                                                  " device")
    fd = os.open(target.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        users = tuple(lock_users(fd))
        if status.st_size == 0:
            return Found(Content.EMPTY, what="an empty file", users=users)
        if target.kind is TargetKind.QCOW2:
            return Found(Content.DATA, what="an image", users=users)  # replaced, so that its size is no limit
        data = first_file_data(fd, status.st_size)
        return Found(Content.EMPTY if data is None else Content.DATA, status.st_size, data or "zeros", users=users)
    finally:
        os.close(fd)


def _look_at_block(target: Target) -> Found:
    device = identify(target.file)
    if device is not None and device.read_only:
        raise CannotLook("the device is read-only")
    facts = () if device is None else tuple(
        (key, value) for key, value in (("vendor", device.vendor), ("model", device.model), ("serial", device.serial),
                                        ("wwn", device.wwn), ("bus", device.bus)) if value)
    fd = os.open(target.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = device_size(fd)
        data = first_data(lambda offset, length: os.pread(fd, length, offset), size)
    finally:
        os.close(fd)
    users = tuple(block_users(target.file))
    return Found(Content.EMPTY if data is None else Content.DATA, size, data or "zeros", facts, users)


async def _look_at_lun(target: Target, storage_daemon: StorageDaemonFactory) -> Found:
    try:
        async with storage_daemon() as daemon:
            socket, export = await daemon.export("target", image_spec(target))
            return await asyncio.to_thread(_sample, socket, export)
    except BackupError as error:
        raise CannotLook(f"QEMU's iSCSI initiator cannot open it ({error})") from error


def _sample(socket: str, export: str) -> Found:
    with closing(NbdConnection(unix=socket, export=export)) as connection:
        data = first_data(connection.pread, connection.size)
        return Found(Content.EMPTY if data is None else Content.DATA, connection.size, data or "zeros")


def image_spec(target: Target, path: str | None = None) -> ImageSpec:
    """``target`` as the storage daemon opens it; ``path`` instead of the target's own while it has another name."""
    if target.iscsi is not None:
        return ImageSpec(driver="raw", iscsi=IscsiLun(target.iscsi.portal, target.iscsi.iqn, target.iscsi.lun))
    return ImageSpec(driver="qcow2" if target.kind is TargetKind.QCOW2 else "raw", path=path or target.file)
