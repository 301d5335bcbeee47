"""A volume of a backup as a file in a common format: raw, or qcow2, compressed where that is asked for."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

from vmbackupd.engine.copyloop import copy_out
from vmbackupd.engine.fileout import write_file
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.padded import PaddedSource
from vmbackupd.engine.progress import Progress
from vmbackupd.engine.sink import ChunkSource
from vmbackupd.errors import BackupError, HypervisorError, InvalidArgument, TargetError, TargetRefused
from vmbackupd.exchange.observer import Observer, in_thread
from vmbackupd.exchange.volumes import find_volume
from vmbackupd.host.imagelocks import lock_users
from vmbackupd.host.newfile import NewFile, OnEffect, sync
from vmbackupd.hypervisor.images import check_image, shrink_image
from vmbackupd.hypervisor.storage_daemon import ImageSpec, NbdExport, StorageDaemon, create_qcow2
from vmbackupd.repository import Repository
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.t1 import t1_image
from vmbackupd.units import MiB, human

FORMATS = ("raw", "qcow2")
COMPRESSIONS = ("zlib", "zstd")
SECTOR = 512  # QEMU's images are whole sectors
CLUSTER = 65536  # of a qcow2 image, QEMU's default
CHECK = 3600.0  # seconds; the check reads the tables, a few MiB for each 100 GiB
ALMOST_FULL = 64 * MiB

log = logging.getLogger("exchange.export")


@dataclass(frozen=True, slots=True)
class ExportTarget:
    """Where an export goes. ``path`` is absolute; ``compression`` (``zlib``, ``zstd``; qcow2 only) None stores clusters
    as they are; ``replace`` allows that a file is there already."""

    path: str
    format: str = "raw"
    compression: str | None = None
    replace: bool = False

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or self.path.endswith("/") or "\0" in self.path:
            raise InvalidArgument(f"{self.path!r} is not the absolute path of a file")
        if self.format not in FORMATS:
            raise InvalidArgument(f"format {self.format!r} cannot be exported: expected {' or '.join(FORMATS)}")
        if self.compression is not None and self.compression not in COMPRESSIONS:
            raise InvalidArgument(f"compression {self.compression!r}: expected {' or '.join(COMPRESSIONS)}")
        if self.compression is not None and self.format != "qcow2":
            raise InvalidArgument(f"a {self.format} image cannot be compressed: choose qcow2, or no compression")


async def export_volume(
    repository: Repository,
    manifest: Manifest,
    volume: str,
    target: ExportTarget,
    *,
    storage_daemon: Callable[[], StorageDaemon],
    observer: Observer,
    on_effect: OnEffect,
) -> dict[str, object]:
    """Write volume ``volume`` of a backup, as of T1, to a new sparse file; returns what was done.

    The file bears its name when it is complete, durable and (qcow2) checked; until then it is ``PATH.part``, of which
    ``on_effect`` is told before it is made. On an error or a cancellation it is gone when this raises. The manifest's
    trees must stay in the repository meanwhile. Raises ``NotFound``, ``TargetRefused`` (nothing was written),
    ``TargetError``, ``RepositoryCorrupt``, ``StoreCorrupt``, ``StorageError``, ``HypervisorError``.
    """
    record = find_volume(manifest, volume)
    began = time.monotonic()
    observer.step("prepare-target")
    await asyncio.to_thread(_check_target, target)
    image = await asyncio.to_thread(t1_image, repository, manifest, record)
    await asyncio.to_thread(_check_space, image, target)
    file = NewFile(target.path, target.replace, on_effect)
    try:
        if target.format == "raw" and isinstance(image, ImageSource):
            await _write_straight(image, target, file, observer)
        else:
            await _write_through_qemu(image, target, file, storage_daemon, observer)
        if target.format == "qcow2":
            observer.step("check-image")
            await check_image(file.part, target.format, CHECK)
        observer.step("finish-target")
        await asyncio.to_thread(sync, file.part)
        allocated = os.stat(file.part).st_blocks * 512
        await asyncio.to_thread(file.rename)
    except BaseException as error:
        file.remove()
        if isinstance(error, (OSError, BackupError)):
            raise _told(error, f"volume {volume} was not exported to {target.path}", target) from error
        raise
    file.keep()
    return {
        "backup": manifest.id,
        "volume": volume,
        "path": target.path,
        "format": target.format,
        "compression": target.compression,
        "size": record.size,
        "allocated": allocated,
        "seconds": round(time.monotonic() - began, 3),
    }


# ---- before


def _check_target(target: ExportTarget) -> None:
    directory = os.path.dirname(target.path)
    if not os.path.isdir(directory):
        raise TargetRefused(f"directory {directory} does not exist: make it, or name another file")
    try:
        found = os.lstat(target.path)
    except FileNotFoundError:
        return
    if not target.replace:
        raise TargetRefused(f"{target.path} exists already: name another file, or replace it with --force")
    if not stat.S_ISREG(found.st_mode):
        raise TargetRefused(f"{target.path} is no regular file: an export never replaces it")
    fd = os.open(target.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        users = lock_users(fd)
    finally:
        os.close(fd)
    if users:
        raise TargetRefused(f"{target.path} is in use: {users[0]}; name another file (--force does not change this)")


def _check_space(image: ChunkSource, target: ExportTarget) -> None:
    """Refuse at once what cannot fit. How small a compressed image becomes is not known."""
    if target.compression is not None:
        return
    need = _data_bytes(image)
    free = _free(target.path)
    if need > free:
        raise TargetRefused(
            f"{target.path}: the image has {human(need)} of data, its filesystem has"
            f" {human(free)} free; free some, or name another place"
        )


def _data_bytes(image: ChunkSource) -> int:
    """Bytes that are no holes: what a sparse file will take. 0 where that is not known without making the image."""
    return image.data_bytes() if isinstance(image, ImageSource) else 0


def _free(path: str) -> int:
    status = os.statvfs(os.path.dirname(path))
    return status.f_bavail * status.f_frsize


# ---- meanwhile


async def _write_straight(image: ImageSource, target: ExportTarget, file: NewFile, observer: Observer) -> None:
    """Write a raw file ourselves: several threads read, decompress and write, and QEMU would add nothing."""
    fd = await asyncio.to_thread(file.reserve)
    try:
        observer.step("write-image")
        progress = Progress(image.size)
        await in_thread(
            lambda: write_file(image, fd, progress, label=target.path),
            progress,
            lambda: observer.progress(progress.bytes_done, image.size),
        )
        os.ftruncate(fd, _whole(image.size, SECTOR))
    finally:
        os.close(fd)


async def _write_through_qemu(
    image: ChunkSource,
    target: ExportTarget,
    file: NewFile,
    storage_daemon: Callable[[], StorageDaemon],
    observer: Observer,
) -> None:
    """Write whatever format QEMU knows: it opens the new file in a process of its own and exports it over NBD."""
    size = _whole(image.size, SECTOR)
    # Compressed data is written in whole clusters, and a chunk is what we write at least.
    cluster = min(CLUSTER, image.chunk_size) if target.format == "qcow2" else SECTOR
    written = _whole(size, cluster) if target.compression is not None else size
    await _create(file, written, cluster, target)
    source = image if written == image.size else PaddedSource(image, written)
    observer.step("write-image")
    progress = Progress(written)

    def copy(export: NbdExport) -> None:
        with closing(NbdConnection(unix=export.socket, export=export.name)) as connection:
            copy_out(source, connection, progress, target_is_zero=True)

    async with storage_daemon() as daemon:
        spec = ImageSpec(target.format, file.part, compress=target.compression is not None)
        export = await daemon.export("export", spec, writable=True)
        await in_thread(
            lambda: copy(export), progress, lambda: observer.progress(min(progress.bytes_done, image.size), image.size)
        )
    if written != size:
        await shrink_image(file.part, target.format, size)


async def _create(file: NewFile, size: int, cluster: int, target: ExportTarget) -> None:
    """Make the file under its part name: the empty image."""
    fd = await asyncio.to_thread(file.reserve)
    try:
        if target.format == "raw":
            os.ftruncate(fd, size)
    finally:
        os.close(fd)
    if target.format == "qcow2":
        os.unlink(file.part)  # create_qcow2 makes its file itself, as exclusively as reserve does
        await create_qcow2(file.part, size, compression=target.compression or "zlib", cluster_size=cluster)


def _whole(size: int, block: int) -> int:
    """``size``, rounded up to whole blocks."""
    return -(-size // block) * block


def _told(error: OSError | BackupError, what: str, target: ExportTarget) -> BackupError:
    """The error with what it means to a person. A full filesystem has many ways to show."""
    kind: type[BackupError] = type(error) if isinstance(error, BackupError) else TargetRefused
    free = _free(target.path)
    if free < ALMOST_FULL and isinstance(error, (OSError, TargetError, HypervisorError)):
        full = f"its filesystem is full ({human(free)} free); free some, or name another place"
        return TargetError(f"{what}: {full} ({error})")
    return kind(f"{what}: {error}")
