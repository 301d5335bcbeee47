"""qemu-storage-daemon: opens disk images and exports them over NBD on a unix socket of ours.

One daemon process for each :class:`StorageDaemon`. It is driven over QMP on a socket pair, so there is no monitor
socket to find, and the kernel kills it when this process dies. NBD's unix socket lies in the runtime directory.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vmbackupd.errors import HypervisorError, InvalidArgument
from vmbackupd.host.process import Child, CommandFailed
from vmbackupd.hypervisor.images import ImageInfo, create_qcow2, image_chain, image_info
from vmbackupd.hypervisor.qmpclient import COMMAND, QmpClient, QmpLost

__all__ = ["ImageInfo", "ImageSpec", "IscsiLun", "NbdExport", "StorageDaemon", "create_qcow2", "end_leftovers",
           "image_info"]

START = 20.0
ENDED = 30.0  # until an export has let go of its clients
QUIT = 20.0  # it writes back what it holds
OPEN = 60.0  # opening may log in to an iSCSI target
SOCKET_PATH_LIMIT = 107  # sun_path without its NUL

log = logging.getLogger("hypervisor.storage_daemon")

_MAY_HAVE_BACKING = {"qcow2", "qed", "vmdk"}  # drivers that know the option

_serial = itertools.count(1)


@dataclass(frozen=True, slots=True)
class IscsiLun:
    """A LUN that QEMU's own initiator reaches. ``portal`` is ``host`` or ``host:port``."""

    portal: str
    iqn: str
    lun: int

    def __str__(self) -> str:
        return f"iscsi://{self.portal}/{self.iqn}/{self.lun}"


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """An image to open: ``driver`` is its format (qcow2, raw), given and never probed; exactly one of ``path`` (a file
    or a block device) and ``iscsi``. Backing files follow the headers, each of which must name the next one's format.

    ``compress``: what is written to it is stored compressed; writes must be whole clusters then. ``live``: somebody
    else writes to it meanwhile, past this machine's cache, so nothing is read from there.
    """

    driver: str
    path: str | None = None
    iscsi: IscsiLun | None = None
    compress: bool = False
    live: bool = False

    def __post_init__(self) -> None:
        if (self.path is None) == (self.iscsi is None):
            raise InvalidArgument("an image is either a path or an iSCSI LUN")

    def __str__(self) -> str:
        return str(self.iscsi or self.path)


class NbdExport(NamedTuple):
    """Where an export is: unix socket and export name."""

    socket: str
    name: str


class StorageDaemon:
    """``async with StorageDaemon(runtime_dir) as daemon: await daemon.export(...)``. Errors are ``HypervisorError``."""

    def __init__(self, runtime_dir: str | os.PathLike[str]) -> None:
        base = Path(runtime_dir) / f"qsd-{os.getpid()}-{next(_serial)}"
        self.socket = f"{base}.nbd"
        self._pidfile = Path(f"{base}.pid")
        if len(os.fsencode(self.socket)) > SOCKET_PATH_LIMIT:
            raise InvalidArgument(f"runtime directory {runtime_dir}: its path is too long for a unix socket in it")
        self._child: Child | None = None
        self._qmp = QmpClient("qemu-storage-daemon")
        self._exports: dict[str, str] = {}  # export name: id of export and node
        self._numbers = itertools.count()

    async def __aenter__(self) -> StorageDaemon:
        await self.open()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Start the process, connect, start its NBD server."""
        self._pidfile.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._child = await Child.spawn(
                    ["qemu-storage-daemon", "--pidfile", str(self._pidfile),
                     "--chardev", f"socket,id=qmp,fd={theirs.fileno()}", "--monitor", "chardev=qmp"],
                    pass_fds=[theirs.fileno()])
            ours.setblocking(False)
            await self._qmp.use(ours, timeout=START)
            await self._execute("nbd-server-start", {
                "addr": {"type": "unix", "data": {"path": self.socket}}, "max-connections": 0})
        except (CommandFailed, HypervisorError, OSError) as error:
            await self.close()
            told = self._child.stderr if self._child else ""
            raise HypervisorError(f"qemu-storage-daemon did not start: {error}"
                                  + (f" ({told})" if told else "")) from error
        except BaseException:
            await self.close()
            raise
        finally:
            if not self._qmp.connected:
                ours.close()

    async def close(self) -> None:
        """End the process: asked first, killed if it does not go. Its sockets are removed. Can be called again."""
        follows = False
        try:
            if self._qmp.connected:
                try:
                    await self._execute("quit", {}, timeout=QUIT)
                    follows = True
                except HypervisorError as error:
                    log.warning("%s; it will be killed", error)
        finally:
            try:
                await self._qmp.close()
            finally:
                await self._reap(QUIT if follows else 0)

    async def _reap(self, patience: float) -> None:
        try:
            if self._child is not None:
                try:
                    await self._child.wait(patience)
                except TimeoutError:
                    pass
                await self._child.stop("kill", 0)
        finally:
            self._exports.clear()
            for path in (self.socket, self._pidfile):
                Path(path).unlink(missing_ok=True)

    async def export(self, name: str, spec: ImageSpec, *, writable: bool = False,
                     bitmap: str | None = None) -> NbdExport:
        """Open an image and export it as ``name``, with the dirty bitmap of that name in the image, if asked. Read-only
        opening shares the image with other readers, such as the QEMU that has it as a backing file."""
        if name in self._exports:
            raise InvalidArgument(f"qemu-storage-daemon: there is an export named {name} already")
        node = f"e{next(self._numbers)}"
        blockdev = await self._blockdev(spec, writable)
        if spec.compress:
            blockdev = {"driver": "compress", "file": blockdev, "read-only": not writable}
        if spec.live:
            _without_cache(blockdev)
        await self._execute("blockdev-add", {"node-name": node, **blockdev}, timeout=OPEN, about=str(spec))
        try:
            await self._execute("block-export-add", {
                "type": "nbd", "id": node, "node-name": node, "name": name, "writable": writable,
                "bitmaps": [] if bitmap is None else [bitmap]}, about=str(spec))
        except BaseException:
            try:
                await self._execute("blockdev-del", {"node-name": node})
            except HypervisorError:
                pass  # the first error is the one to tell
            raise
        self._exports[name] = node
        return NbdExport(self.socket, name)

    async def unexport(self, name: str) -> None:
        """End an export, cutting off its clients, and close the image (what was written is flushed). No such export is
        no error."""
        node = self._exports.get(name)
        if node is None:
            return
        with self._qmp.listen("BLOCK_EXPORT_DELETED") as deleted:
            await self._execute("block-export-del", {"id": node, "mode": "hard"}, about=name)
            while True:
                event = await deleted.next(ENDED)
                if event is None:
                    raise HypervisorError(f"qemu-storage-daemon: export {name} does not end")
                if event["data"]["id"] == node:
                    break
        del self._exports[name]
        await self._execute("blockdev-del", {"node-name": node}, timeout=OPEN, about=name)

    async def _blockdev(self, spec: ImageSpec, writable: bool) -> dict[str, object]:
        if spec.iscsi is not None:
            lun = spec.iscsi
            file: dict[str, object] = {"driver": "iscsi", "transport": "tcp", "portal": lun.portal, "target": lun.iqn,
                                       "lun": lun.lun, "read-only": not writable}
            return _node(spec.driver, file, writable)
        assert spec.path is not None
        if spec.driver == "raw":
            return _node("raw", _file(spec.path, writable), writable)
        chain = await image_chain(spec.path, spec.driver)
        backing: dict[str, object] | None = None
        for image in reversed(chain):
            top = image is chain[0]
            node = _node(image.format, _file(image.path, writable and top), writable and top)
            if image.format in _MAY_HAVE_BACKING:
                node["backing"] = backing  # None closes the chain: nothing is opened that is not named here
            backing = node
        assert backing is not None
        return backing

    async def _execute(self, command: str, arguments: dict[str, object], *, timeout: float = COMMAND,
                       about: str = "") -> None:
        try:
            await self._qmp.execute(command, arguments, timeout=timeout, about=about)
        except QmpLost as error:
            told = self._child.stderr if self._child else ""
            raise HypervisorError(f"{error}" + (f": {told}" if told else "")) from error


def _node(driver: str, file: dict[str, object], writable: bool) -> dict[str, object]:
    node: dict[str, object] = {"driver": driver, "read-only": not writable, "file": file}
    if writable:
        node["discard"] = "unmap"
    return node


def _without_cache(node: dict[str, object]) -> None:
    """Every read goes to the storage. For a block device that is past the page cache; the iscsi driver would remember
    what the target had said of allocation, and go on reading as zeros what was written since (``allocmap`` there)."""
    node["cache"] = {"direct": True}
    file = node.get("file")
    if isinstance(file, dict):
        _without_cache(file)


def _file(path: str, writable: bool) -> dict[str, object]:
    try:
        block = stat.S_ISBLK(os.stat(path).st_mode)
    except OSError as error:
        raise HypervisorError(f"cannot open the image {path}: {error.strerror}") from error
    node: dict[str, object] = {"driver": "host_device" if block else "file", "filename": path,
                               "read-only": not writable}
    if writable:
        node["discard"] = "unmap"
    return node


def end_leftovers(runtime_dir: str | os.PathLike[str]) -> list[int]:
    """End storage daemons of dead processes of ours and remove their sockets; the process ids that were killed.

    The kernel kills a child when its parent dies; what is left is the moment before the child could ask for that.
    """
    ended = []
    for pidfile in Path(runtime_dir).glob("qsd-*.pid"):
        if not _owner_alive(pidfile) and (pid := _daemon(pidfile)) is not None:
            os.kill(pid, signal.SIGKILL)
            ended.append(pid)
    for path in Path(runtime_dir).glob("qsd-*"):
        if not _owner_alive(path):
            path.unlink(missing_ok=True)
    return ended


def _owner_alive(path: Path) -> bool:
    owner = path.name.split("-")[1]
    return owner.isdecimal() and (int(owner) == os.getpid() or Path("/proc", owner).exists())


def _daemon(pidfile: Path) -> int | None:
    """The process of ``pidfile`` if it still is the daemon that wrote it."""
    try:
        pid = int(pidfile.read_text())
        words = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(pidfile) in words else None
