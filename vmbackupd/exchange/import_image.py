"""Image files as a backup: what some other tool wrote, or a disk nobody backs up otherwise."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import vmbackupd
from vmbackupd.engine.copyloop import copy_in
from vmbackupd.engine.filein import file_size, read_file
from vmbackupd.engine.image import ImageSink
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import BackupError, InvalidArgument, SourceError
from vmbackupd.exchange.formats import check_header, find_format
from vmbackupd.exchange.observer import Observer, in_thread
from vmbackupd.host.imagelocks import lock_writers
from vmbackupd.hypervisor.storage_daemon import ImageSpec, StorageDaemon, image_info
from vmbackupd.model import Consistency, Method, RevertMode, VolumeKind, VolumeRecord
from vmbackupd.repository import Manifest, Repository, RepositoryWriter, VmIdentity

SIZE_LIMIT = 1 << 50  # bytes of an image, the repository's own limit
_NAMESPACE = uuid.UUID("8c6f0a53-5f5a-4f0e-9d3b-0d9d6c5f2b11")  # of the identities of imported VMs: a constant


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image to import. ``path`` (absolute): a file, or a block device (raw). ``format`` None: what the file's name
    and content agree upon. ``volume``: the id it gets in the backup."""

    path: str
    volume: str = "vda"
    format: str | None = None

    def __post_init__(self) -> None:
        if not self.path.startswith("/") or "\0" in self.path:
            raise InvalidArgument(f"{self.path!r} is not an absolute path")
        if not self.volume or len(self.volume) > 255 or not self.volume.isprintable() or "/" in self.volume:
            raise InvalidArgument(f"{self.volume!r} cannot be the id of a volume: expected a name such as vda")


@dataclass(frozen=True, slots=True)
class _Source:
    """An image that is open. ``size``: bytes of the disk it holds."""

    file: ImageFile
    fd: int
    format: str
    size: int


async def import_images(
    repository: Repository,
    backup: str,
    name: str,
    images: Sequence[ImageFile],
    *,
    storage_daemon: Callable[[], StorageDaemon],
    observer: Observer,
    allow_backing: bool = False,
) -> Manifest:
    """Store image files as the backup ``backup`` of a VM ``name``; returns the manifest that was published.

    Imports under one name count as backups of one VM. Images that lead to other files are refused; ``allow_backing``
    follows backing files, each of which must be local and recorded with its format. Raises ``InvalidArgument`` (nothing
    was stored), ``SourceError``, ``HypervisorError``, ``RepositoryFull``, ``StorageError``: nothing is published then.
    """
    _check_request(name, images)
    with ExitStack() as stack:
        observer.step("open-images")
        sources = []
        for image in images:
            fd, format = stack.enter_context(_opened(image, allow_backing))
            sources.append(_Source(image, fd, format, await _size(image, fd, format)))
        observer.step("read-images")
        writer = await asyncio.to_thread(repository.writer, backup)
        try:
            return await _store(writer, backup, name, sources, storage_daemon, observer)
        finally:
            await asyncio.to_thread(writer.abort)  # removes what is not published


def _check_request(name: str, images: Sequence[ImageFile]) -> None:
    if not name.strip() or not name.isprintable() or len(name.encode()) > 200 or "/" in name or name.startswith("."):
        raise InvalidArgument(
            f"{name!r} cannot be the name of a VM: expected printable characters without a slash or a"
            " leading dot, at most 200 bytes"
        )
    if not images:
        raise InvalidArgument("there is no image to import")
    volumes = [image.volume for image in images]
    if len(set(volumes)) != len(volumes):
        raise InvalidArgument(f"volumes {', '.join(volumes)}: each image needs an id of its own")


@contextmanager
def _opened(image: ImageFile, allow_backing: bool) -> Iterator[tuple[int, str]]:
    """The image's descriptor and format, when it is what may be imported. Raises ``InvalidArgument``."""
    try:
        # not blocking: a FIFO would wait for a writer
        fd = os.open(image.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidArgument(f"{image.path} cannot be opened: {error.strerror}") from error
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISBLK(mode):
            _check_device(image.path)
        elif not stat.S_ISREG(mode):
            raise InvalidArgument(f"{image.path} is neither a regular file nor a block device")
        if users := lock_writers(fd):
            raise InvalidArgument(f"{image.path} cannot be imported: {users[0]}; shut the VM down, or back it up")
        format = find_format(image.path, fd, image.format)
        check_header(image.path, fd, format, backing=allow_backing)
        yield fd, format
    finally:
        os.close(fd)


def _check_device(path: str) -> None:
    """A device somebody has mounted or assembled into another one changes while it is read."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise InvalidArgument(f"{path} cannot be opened: {error.strerror}") from error
        raise InvalidArgument(f"{path} is in use (mounted, or part of another device): free it first") from error


async def _size(image: ImageFile, fd: int, format: str) -> int:
    size = file_size(fd, image.path) if format == "raw" else (await image_info(image.path, format)).size
    if not 0 < size <= SIZE_LIMIT:
        raise InvalidArgument(f"{image.path}: an image of {size} bytes cannot be imported")
    return size


async def _store(
    writer: RepositoryWriter,
    backup: str,
    name: str,
    sources: Sequence[_Source],
    storage_daemon: Callable[[], StorageDaemon],
    observer: Observer,
) -> Manifest:
    began = time.time()
    total = sum(source.size for source in sources)
    done, records = 0, []
    for source in sources:
        progress = Progress(source.size)

        def report(progress: Progress = progress, before: int = done) -> None:
            observer.progress(before + progress.bytes_done, total)

        try:
            records.append(await _store_one(writer, source, progress, report, storage_daemon))
        except BackupError as error:
            kind = type(error)
            raise kind(f"{source.file.path} was not imported: {error}") from error
        done += source.size
        observer.progress(done, total)
    observer.step("seal")
    manifest = Manifest(
        id=backup,
        vm=VmIdentity(name, str(uuid.uuid5(_NAMESPACE, name))),
        created=time.time(),
        t1=began,
        t2=began,
        freeze_ms=0.0,
        revert=RevertMode.BACKUP,
        volumes=tuple(records),
        guest={"imported": True, "imported_on": socket.gethostname()},
        tool_version=vmbackupd.__version__,
    )
    # Publishing is not cut off half way: a cancellation that comes now waits, and comes too late.
    publishing = asyncio.ensure_future(asyncio.to_thread(writer.publish, manifest))
    while not publishing.done():
        try:
            await asyncio.wait({publishing})
        except asyncio.CancelledError:
            continue
    publishing.result()
    return manifest


async def _store_one(
    writer: RepositoryWriter,
    source: _Source,
    progress: Progress,
    report: Callable[[], None],
    storage_daemon: Callable[[], StorageDaemon],
) -> VolumeRecord:
    sink = writer.image(source.size)
    if source.format == "raw":
        await in_thread(lambda: read_file(source.fd, sink, progress, label=source.file.path), progress, report)
    else:
        await _through_qemu(source, sink, progress, report, storage_daemon)
    tree = await asyncio.to_thread(sink.finish)
    return VolumeRecord(
        id=source.file.volume,
        kind=VolumeKind.VIRTUAL,
        method=Method.IMPORT,
        consistency=Consistency.CRASH,
        size=source.size,
        tree=tree,
        bytes_read=progress.bytes_read,
        bytes_stored=sink.bytes_stored,
        details={"imported": {"path": source.file.path, "format": source.format}},
    )


async def _through_qemu(
    source: _Source,
    sink: ImageSink,
    progress: Progress,
    report: Callable[[], None],
    storage_daemon: Callable[[], StorageDaemon],
) -> None:
    """Formats only QEMU reads: it exports the image read-only, in a process of its own."""
    async with storage_daemon() as daemon:
        export = await daemon.export("import", ImageSpec(source.format, source.file.path))

        def copy() -> None:
            with closing(NbdConnection(unix=export.socket, export=export.name)) as connection:
                if connection.size < source.size:
                    raise SourceError(f"it has {connection.size} bytes, expected {source.size}: it is changing")
                copy_in(connection, sink, progress)

        await in_thread(copy, progress, report)
