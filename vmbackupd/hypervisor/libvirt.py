"""libvirt: the connection, its events and errors, and on top of it the :class:`Hypervisor` interface.

The only module that imports libvirt. Its calls block, so they run in threads; its events come from a thread of their
own and are handed to the event loop. libvirtd may be restarted at any time: the next call connects again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import threading
import uuid as uuids
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import libvirt
import libvirt_qemu

from vmbackupd.errors import (
    BackupError,
    GuestAgentUnavailable,
    HypervisorError,
    NotFound,
    NotRunning,
)
from vmbackupd.hypervisor import checkpoint, events, fleece, guestagent, hotplug, overlay, snapshot
from vmbackupd.hypervisor import domain as dx
from vmbackupd.hypervisor.base import DiskSource, DomainDisk, DomainInfo, FleeceExport, HypervisorLost
from vmbackupd.hypervisor.events import Event, EventHub

log = logging.getLogger("hypervisor.libvirt")

T = TypeVar("T")

THREADS = 16
CONNECT = 30.0  # for one attempt
RECONNECT = 60.0  # how long a restart of libvirtd may take
RETRY_PAUSE = 0.5
CALL = 60.0  # a call waits up to 30 s in libvirt for another job on the same domain
PIVOT = 300.0
KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 5, 4
AGENT_MARGIN = 45.0  # libvirt's own waits around an agent command: its sync, another agent job


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A block job on a disk; ``done`` of ``total`` bytes. ``kind`` is pull, copy, commit, active-commit or backup."""

    kind: str
    done: int
    total: int


_JOB_KINDS = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL: "pull",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COPY: "copy",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT: "commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT: "active-commit",
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_BACKUP: "backup",
}
_JOB_STATES = {
    libvirt.VIR_DOMAIN_BLOCK_JOB_COMPLETED: "completed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED: "failed",
    libvirt.VIR_DOMAIN_BLOCK_JOB_CANCELED: "cancelled",
    libvirt.VIR_DOMAIN_BLOCK_JOB_READY: "ready",
}
_LIFECYCLE = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: events.STARTED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: events.STOPPED,
}
_AGENT_SILENT = {
    libvirt.VIR_ERR_AGENT_UNRESPONSIVE,
    libvirt.VIR_ERR_AGENT_UNSYNCED,
    getattr(libvirt, "VIR_ERR_AGENT_COMMAND_TIMEOUT", libvirt.VIR_ERR_AGENT_UNRESPONSIVE),  # libvirt 11.1
}
_NO_AGENT = {libvirt.VIR_ERR_ARGUMENT_UNSUPPORTED, libvirt.VIR_ERR_OPERATION_UNSUPPORTED}


def translate(error: libvirt.libvirtError, what: str) -> BackupError:
    """libvirt's error as ours; ``what`` begins the message and names the VM."""
    code, text = error.get_error_code(), error.get_error_message() or str(error)
    message = f"{what}: {text}"
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFound(message)
    if ((code == libvirt.VIR_ERR_OPERATION_INVALID and "not running" in text)
            or (code == libvirt.VIR_ERR_OPERATION_UNSUPPORTED and "for inactive domain" in text)):
        return NotRunning(message)
    if code in _AGENT_SILENT:
        return GuestAgentUnavailable(message)
    return HypervisorError(message)


def translate_agent(error: libvirt.libvirtError, what: str) -> BackupError:
    """The error of a guest agent command: who did not answer, and who answered no."""
    code, text = error.get_error_code(), error.get_error_message() or str(error)
    if refused := guestagent.refusal(text, what):
        return refused
    if code in _NO_AGENT and "agent" in text:
        return GuestAgentUnavailable(f"{what}: {text}")
    return translate(error, what)


class _EventLoop:
    """libvirt's event loop: one for the process, in a daemon thread, begun at the first connection."""

    _lock = threading.Lock()
    _started = False

    @classmethod
    def start(cls) -> None:
        with cls._lock:
            if cls._started:
                return
            # Errors are raised, and told by whoever handles them; libvirt would print each to stderr as well.
            libvirt.registerErrorHandler(lambda _ctx, _error: None, None)
            libvirt.virEventRegisterDefaultImpl()
            threading.Thread(target=cls._run, name="libvirt-events", daemon=True).start()
            cls._started = True

    @staticmethod
    def _run() -> None:
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError:
                log.exception("libvirt's event loop failed")


@dataclass(eq=False)
class _Session:
    """One connection and the events registered on it."""

    conn: Any
    callbacks: list[int]

    def silence(self) -> None:
        """In a thread: no more events."""
        try:
            for number in self.callbacks:
                self.conn.domainEventDeregisterAny(number)
            self.conn.unregisterCloseCallback()
        except libvirt.libvirtError:
            pass  # a connection that is gone

    def close(self) -> None:
        self.silence()
        try:
            self.conn.close()
        except libvirt.libvirtError:
            pass


class LibvirtConnection:
    """Calls libvirt without blocking the event loop. One domain operation a method, errors translated.

    A call that is cancelled is waited for, since its thread cannot be stopped: the caller's undo must come after it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.hub = EventHub()
        self._session: _Session | None = None
        self._lock = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._revival: asyncio.Task[None] | None = None

    # --- connection

    async def open(self) -> None:
        """Connect. Raises ``HypervisorError`` at once when there is nobody to connect to."""
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="libvirt")
        try:
            await self._connected(patience=0)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of libvirt. Can be called again."""
        revival, self._revival = self._revival, None
        if revival is not None:
            revival.cancel()
            await asyncio.wait({revival}, timeout=CALL)
        pool, self._pool = self._pool, None
        if pool is None:
            return
        session, self._session = self._session, None
        loop = asyncio.get_running_loop()
        try:
            if session is not None:
                await asyncio.wait({loop.run_in_executor(pool, session.close)}, timeout=CONNECT)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    async def _connected(self, patience: float = RECONNECT) -> _Session:
        async with self._lock:
            if self._session is not None:
                return self._session
            end = self._now() + patience
            while True:
                try:
                    return await self._in_thread(self._connect, CONNECT, f"connecting to {self.uri}")
                except libvirt.libvirtError as error:
                    if self._now() >= end:
                        raise HypervisorError(f"cannot connect to libvirt at {self.uri}: {error}") from error
                await asyncio.sleep(RETRY_PAUSE)  # nobody tells when a restarting libvirtd listens again

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _connect(self) -> _Session:
        _EventLoop.start()
        conn = libvirt.open(self.uri)
        try:
            conn.setKeepAlive(KEEPALIVE_INTERVAL, KEEPALIVE_COUNT)
        except libvirt.libvirtError:
            pass  # drivers without a daemon behind them
        session = _Session(conn, [])
        for number, receive in (
            (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle),
            (libvirt.VIR_DOMAIN_EVENT_ID_BLOCK_JOB_2, self._on_block_job),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED, self._on_device_removed),
            (libvirt.VIR_DOMAIN_EVENT_ID_DEVICE_REMOVAL_FAILED, self._on_device_kept),
            (libvirt.VIR_DOMAIN_EVENT_ID_AGENT_LIFECYCLE, self._on_agent),
        ):
            try:
                session.callbacks.append(conn.domainEventRegisterAny(None, number, receive, None))
            except libvirt.libvirtError as error:
                log.debug("%s gives no events of type %d: %s", self.uri, number, error)
        try:
            conn.registerCloseCallback(self._on_close, session)
        except libvirt.libvirtError:
            pass
        self._session = session  # here, so that it is kept also when the caller was cancelled meanwhile
        return session

    def _lost(self, session: _Session) -> None:
        """In the event loop: the connection is dead. A closed connection tells nothing more about the domains, so
        while anybody watches one, a new connection is made without waiting for the next call."""
        if self._session is not session:
            return
        self._session = None
        pool = self._pool
        if pool is None:
            return
        log.warning("the connection to libvirt at %s is lost; connecting again", self.uri)
        # Not closed: other threads may be in calls on it. It closes when the last of them lets go of it.
        pool.submit(session.silence)
        self.hub.dispatch(Event(events.LOST, None))
        if self.hub.watched and (self._revival is None or self._revival.done()):
            self._revival = asyncio.create_task(self._revive(), name="libvirt reconnect")

    async def _revive(self) -> None:
        try:
            for uuid in self.hub.watched:
                try:
                    running = await self.is_active(uuid)
                except NotFound:
                    running = False
                if not running:
                    self.hub.dispatch(Event(events.STOPPED, uuid, detail="while libvirt was away"))
        except BackupError as error:
            log.error("no new connection to libvirt at %s: %s", self.uri, error)

    # --- events, in libvirt's thread

    def _tell(self, event: Event) -> None:
        self._later(self.hub.dispatch, event)

    def _later(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            pass  # the event loop is closed: nobody listens any more

    def _on_lifecycle(self, _conn: Any, dom: Any, event: int, detail: int, _opaque: Any) -> None:
        kind = _LIFECYCLE.get(event)
        if kind is not None:
            self._tell(Event(kind, dom.UUIDString(), detail=str(detail)))

    def _on_block_job(self, _conn: Any, dom: Any, disk: str, _kind: int, status: int, _opaque: Any) -> None:
        self._tell(Event(events.BLOCK_JOB, dom.UUIDString(), disk, _JOB_STATES.get(status, str(status))))

    def _on_device_removed(self, _conn: Any, dom: Any, alias: str, _opaque: Any) -> None:
        self._tell(Event(events.DEVICE_REMOVED, dom.UUIDString(), alias))

    def _on_device_kept(self, _conn: Any, dom: Any, alias: str, _opaque: Any) -> None:
        self._tell(Event(events.DEVICE_KEPT, dom.UUIDString(), alias))

    def _on_agent(self, _conn: Any, dom: Any, state: int, _reason: int, _opaque: Any) -> None:
        connected = state == libvirt.VIR_CONNECT_DOMAIN_EVENT_AGENT_LIFECYCLE_STATE_CONNECTED
        self._tell(Event(events.AGENT_CONNECTED if connected else events.AGENT_DISCONNECTED, dom.UUIDString()))

    def _on_close(self, _conn: Any, _reason: int, session: _Session) -> None:
        self._later(self._lost, session)

    # --- calls

    async def _in_thread(self, function: Callable[[], T], timeout: float, what: str) -> T:
        pool = self._pool
        if pool is None:
            raise HypervisorError(f"{what}: the connection to libvirt is not open")
        future = asyncio.get_running_loop().run_in_executor(pool, function)
        try:
            return await asyncio.wait_for(asyncio.shield(future), timeout)
        except TimeoutError:
            future.add_done_callback(_forget)
            raise HypervisorError(f"{what}: libvirt did not answer within {timeout:g} s") from None
        except asyncio.CancelledError:
            future.add_done_callback(_forget)
            await asyncio.wait({future}, timeout=timeout)
            raise

    async def call(self, function: Callable[[Any], T], what: str, *, timeout: float = CALL, again: bool = False) -> T:
        """``function(connection)`` in a thread. ``again``: it changes nothing, so after a lost connection it is called
        again on a new one; otherwise that is ``HypervisorLost``. ``libvirtError`` passes through untranslated."""
        while True:
            session = await self._connected()
            conn = session.conn
            try:
                return await self._in_thread(lambda: function(conn), timeout, what)  # noqa: B023 - awaited at once
            except libvirt.libvirtError as error:
                if await self._in_thread(lambda: _alive(conn), CALL, what):  # noqa: B023
                    raise
                self._lost(session)
                if not again:
                    raise HypervisorLost(f"{what}: the connection to libvirt was lost: {error}") from error

    async def on_domain(self, uuid: str, function: Callable[[Any], T], what: str, *, timeout: float = CALL,
                        again: bool = False,
                        translator: Callable[[libvirt.libvirtError, str], BackupError] = translate) -> T:
        """``function(domain)`` in a thread, its errors translated and named after the domain."""
        name = uuid

        def work(conn: Any) -> T:
            nonlocal name
            dom = conn.lookupByUUIDString(uuid)
            name = dom.name()
            return function(dom)

        try:
            return await self.call(work, f"VM {uuid}: {what}", timeout=timeout, again=again)
        except libvirt.libvirtError as error:
            raise translator(error, f"VM {name}: {what}") from error

    async def name(self, uuid: str) -> str:
        return await self.on_domain(uuid, lambda dom: str(dom.name()), "look up", again=True)

    async def is_active(self, uuid: str) -> bool:
        return await self.on_domain(uuid, lambda dom: bool(dom.isActive()), "state", again=True)

    async def live(self, uuid: str) -> ET.Element | None:
        """The definition of the running domain, None when it is off."""
        text = await self.on_domain(uuid, lambda dom: str(dom.XMLDesc(0)) if dom.isActive() else None, "definition",
                                    again=True)
        return None if text is None else dx.parse(text)

    async def inactive(self, uuid: str) -> ET.Element | None:
        """What the domain will be at its next start, with secrets; None for a transient one."""
        def read(dom: Any) -> str | None:
            return str(dom.XMLDesc(_INACTIVE)) if dom.isPersistent() else None

        text = await self.on_domain(uuid, read, "definition", again=True)
        return None if text is None else dx.parse(text)

    async def attach_device(self, uuid: str, xml: str) -> None:
        await self.on_domain(uuid, lambda dom: dom.attachDeviceFlags(xml, libvirt.VIR_DOMAIN_AFFECT_LIVE), "hot-plug")

    async def detach_device(self, uuid: str, alias: str) -> None:
        """Ask for a device to be unplugged; its end is told by an event."""
        await self.on_domain(uuid, lambda dom: dom.detachDeviceAlias(alias, libvirt.VIR_DOMAIN_AFFECT_LIVE),
                             f"unplug {alias}")

    async def capacity(self, uuid: str, target: str) -> int:
        """Virtual size of a disk in bytes."""
        return await self.on_domain(uuid, lambda dom: int(dom.blockInfo(target)[0]), f"size of {target}", again=True)

    async def block_job(self, uuid: str, target: str) -> BlockJob | None:
        info = await self.on_domain(uuid, lambda dom: dom.blockJobInfo(target), f"block job of {target}", again=True)
        if not info:
            return None
        return BlockJob(_JOB_KINDS.get(info["type"], str(info["type"])), int(info["cur"]), int(info["end"]))

    async def block_commit(self, uuid: str, target: str, base: str) -> None:
        """Begin the commit of the active image of ``target`` into ``base`` (a path or ``target[index]``)."""
        await self.on_domain(uuid, lambda dom: dom.blockCommit(target, base, None, 0,
                                                               libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE),
                             f"commit {target}")

    async def end_block_job(self, uuid: str, target: str, *, pivot: bool) -> None:
        flags = libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT if pivot else 0
        await self.on_domain(uuid, lambda dom: dom.blockJobAbort(target, flags),
                             f"{'pivot' if pivot else 'abort the block job of'} {target}", timeout=PIVOT)

    async def snapshot(self, uuid: str, xml: str) -> None:
        """External snapshot into overlay files that exist."""
        flags = (libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
                 | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT)
        await self.on_domain(uuid, lambda dom: dom.snapshotCreateXML(xml, flags), "snapshot")

    async def monitor(self, uuid: str, command: str, arguments: Mapping[str, object] | None) -> object:
        """One QMP command to the domain's QEMU; returns its ``return`` value."""
        request = {"execute": command} if arguments is None else {"execute": command, "arguments": arguments}
        return await self.on_domain(uuid, lambda dom: _monitor(dom, request), command, again=arguments is None)

    async def checkpoints(self, uuid: str) -> dict[str, str]:
        """Name and XML of every checkpoint of the domain, whoever made it."""
        return await self.on_domain(
            uuid, lambda dom: {each.getName(): str(each.getXMLDesc(0)) for each in dom.listAllCheckpoints()},
            "checkpoints", again=True)

    async def create_checkpoint(self, uuid: str, xml: str) -> None:
        await self.on_domain(uuid, lambda dom: dom.checkpointCreateXML(xml, 0), "checkpoint")

    async def delete_checkpoint(self, uuid: str, name: str, *, metadata_only: bool = False) -> None:
        """Delete a checkpoint, with its bitmaps unless ``metadata_only``. One that is not there is no error."""
        flags = libvirt.VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY if metadata_only else 0

        def work(dom: Any) -> None:
            try:
                dom.checkpointLookupByName(name).delete(flags)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_CHECKPOINT:
                    raise

        await self.on_domain(uuid, work, f"end checkpoint {name}")

    async def begin_backup(self, uuid: str, xml: str) -> None:
        await self.on_domain(uuid, lambda dom: dom.backupBegin(xml, None, 0), "backup job")

    async def backup_job(self, uuid: str) -> str | None:
        """The XML of the backup job that runs, whoever began it."""
        def read(dom: Any) -> str | None:
            try:
                return str(dom.backupGetXMLDesc(0))
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_BACKUP:
                    raise
                return None

        return await self.on_domain(uuid, read, "backup job", again=True)

    async def abort_job(self, uuid: str) -> None:
        await self.on_domain(uuid, lambda dom: dom.abortJob(), "end the backup job")

    async def has_saved_state(self, uuid: str) -> bool:
        """Whether a managed save waits for the domain's next start."""
        return await self.on_domain(uuid, lambda dom: bool(dom.hasManagedSaveImage()), "saved state", again=True)

    async def volume_path(self, name: str) -> str:
        """Where the ``pool/volume`` lies."""
        try:
            return await self.call(lambda conn: _volume_path(conn, name), f"volume {name}", again=True)
        except libvirt.libvirtError as error:
            raise translate(error, f"volume {name}") from error

    async def define(self, xml: str, name: str) -> str:
        try:
            return await self.call(lambda conn: str(conn.defineXML(xml).UUIDString()), f"define VM {name}")
        except libvirt.libvirtError as error:
            raise translate(error, f"define VM {name}") from error


_INACTIVE = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE


def _forget(future: asyncio.Future[Any]) -> None:
    """Nobody waits for this result any more; taking it keeps asyncio from complaining."""
    if not future.cancelled():
        future.exception()


def _alive(conn: Any) -> bool:
    try:
        return bool(conn.isAlive() == 1)
    except libvirt.libvirtError:
        return False


class LibvirtHypervisor:
    """The domains of one libvirt. Implements :class:`vmbackupd.hypervisor.base.Hypervisor`."""

    defines = True

    def __init__(self, uri: str) -> None:
        self._conn = LibvirtConnection(uri)

    async def open(self) -> None:
        await self._conn.open()

    async def close(self) -> None:
        await self._conn.close()

    async def domains(self) -> Sequence[tuple[str, str, bool]]:
        def read(conn: Any) -> list[tuple[str, str, bool]]:
            return sorted((dom.name(), dom.UUIDString(), bool(dom.isActive())) for dom in conn.listAllDomains())

        try:
            return await self._conn.call(read, "list of VMs", again=True)
        except libvirt.libvirtError as error:
            raise translate(error, "list of VMs") from error

    async def domain(self, name_or_uuid: str) -> DomainInfo:
        try:
            return await self._conn.call(lambda conn: _read_domain(conn, name_or_uuid), f"VM {name_or_uuid}",
                                         again=True)
        except libvirt.libvirtError as error:
            raise translate(error, f"VM {name_or_uuid}") from error

    async def agent(self, uuid: str, command: str, arguments: Mapping[str, object] | None = None, *,
                    timeout: float = 10.0) -> object:
        request: dict[str, object] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        text, seconds = json.dumps(request), max(1, math.ceil(timeout))
        answer = await self._conn.on_domain(
            uuid, lambda dom: libvirt_qemu.qemuAgentCommand(dom, text, seconds, 0), f"guest agent: {command}",
            timeout=timeout + AGENT_MARGIN, translator=translate_agent)
        try:
            return json.loads(answer)["return"]
        except (ValueError, KeyError, TypeError) as error:
            raise GuestAgentUnavailable(f"VM {uuid}: the guest agent's answer to {command} makes no sense: "
                                        f"{answer[:200]!r}") from error

    async def attach_channel(self, uuid: str, name: str) -> str:
        return await hotplug.attach_channel(self._conn, uuid, name)

    async def detach_channel(self, uuid: str, name: str) -> None:
        await hotplug.detach_channel(self._conn, uuid, name)

    async def attach_scratch(self, uuid: str, path: str, serial: str) -> str:
        return await hotplug.attach_scratch(self._conn, uuid, path, serial)

    async def detach_scratch(self, uuid: str, path: str) -> None:
        await hotplug.detach_scratch(self._conn, uuid, path)

    async def prepare_overlays(self, uuid: str, overlays: Mapping[str, str]) -> None:
        await snapshot.prepare_overlays(self._conn, uuid, overlays)

    async def snapshot(self, uuid: str, overlays: Mapping[str, str]) -> None:
        await snapshot.take(self._conn, uuid, overlays)

    async def drop_overlay(self, uuid: str, overlay_path: str,
                           progress: Callable[[int, int], None] | None = None) -> None:
        await overlay.drop(self._conn, uuid, overlay_path, progress)

    async def begin_bitmaps(self, uuid: str, name: str, targets: Sequence[str]) -> dict[str, str | None]:
        return await checkpoint.begin(self._conn, uuid, name, targets)

    async def bitmap_reasons(self, uuid: str, name: str, targets: Sequence[str]) -> dict[str, str | None]:
        return await checkpoint.reasons(self._conn, uuid, name, targets)

    async def drop_bitmaps(self, uuid: str, name: str) -> None:
        await checkpoint.drop(self._conn, uuid, name)

    async def bitmaps(self, uuid: str) -> list[str]:
        return await checkpoint.names(self._conn, uuid)

    async def begin_fleece(self, uuid: str, disks: Mapping[str, str], socket: str,
                           since: Mapping[str, str]) -> dict[str, FleeceExport]:
        return await fleece.begin(self._conn, uuid, disks, socket, since)

    async def end_fleece(self, uuid: str) -> None:
        await fleece.end(self._conn, uuid)

    async def path_users(self, path: str) -> list[str]:
        """Names of the domains, running or not, one of whose disks has ``path`` in its chain."""
        def read(conn: Any) -> list[tuple[str, list[str]]]:
            found = []
            for dom in conn.listAllDomains():
                flags = [0] if dom.isActive() else []
                flags += [libvirt.VIR_DOMAIN_XML_INACTIVE] if dom.isPersistent() else []
                found.append((dom.name(), [dom.XMLDesc(flag) for flag in flags]))
            return found

        try:
            texts = await self._conn.call(read, "definitions of all VMs", again=True)
        except libvirt.libvirtError as error:
            raise translate(error, "definitions of all VMs") from error
        return sorted(name for name, xmls in texts if any(overlay.uses(dx.parse(xml), path) for xml in xmls))

    def watch(self, uuid: str, callback: Callable[[str], None]) -> Callable[[], None]:
        told = {events.STARTED, events.STOPPED, events.AGENT_CONNECTED, events.AGENT_DISCONNECTED, events.LOST}
        return self._conn.hub.watch(uuid, lambda event: callback(event.kind) if event.kind in told else None)

    async def define(self, xml: str) -> str:
        root = dx.parse(xml)
        return await self._conn.define(xml, root.findtext("name") or "without a name")

    async def undefine(self, uuid: str) -> None:
        flags = (libvirt.VIR_DOMAIN_UNDEFINE_NVRAM | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                 | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        await self._conn.on_domain(uuid, lambda dom: dom.undefineFlags(flags), "undefine")

    async def start(self, uuid: str) -> None:
        await self._conn.on_domain(uuid, lambda dom: None if dom.isActive() else dom.create(), "start")

    async def destroy(self, uuid: str) -> None:
        try:
            await self._conn.on_domain(uuid, lambda dom: dom.destroy() if dom.isActive() else None, "power off")
        except NotRunning:
            pass  # it went by itself in between


def _lookup(conn: Any, name_or_uuid: str) -> Any:
    try:
        return conn.lookupByName(name_or_uuid)
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        try:
            uuids.UUID(name_or_uuid)
        except ValueError:
            raise error from None
        return conn.lookupByUUIDString(name_or_uuid)


def _read_domain(conn: Any, name_or_uuid: str) -> DomainInfo:
    """In a thread: all there is to know about a domain."""
    dom = _lookup(conn, name_or_uuid)
    running, persistent = bool(dom.isActive()), bool(dom.isPersistent())
    text = dom.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    root = dx.parse(text)
    places = _pci_places(dom) if running else None
    disks = []
    for disk in dx.parse_disks(root):
        element = dx.disk_element(root, disk.target)
        assert element is not None
        disks.append(replace(
            _resolved(conn, disk), size=_capacity(dom, disk),
            address=dx.guest_address(element, root, places) if places is not None else None))
    config = {"domain.xml": text}
    if persistent:
        config["domain-inactive.xml"] = dom.XMLDesc(_INACTIVE)
    return DomainInfo(
        name=dom.name(), uuid=dom.UUIDString(), running=running, persistent=persistent, has_agent=dx.has_agent(root),
        config=config, disks=tuple(disks), hostdevs=tuple(dx.hostdevs(root)), nvram=dx.nvram_path(root),
        tpm_state=dx.tpm_state(root, _tpm_base(conn)))


def _capacity(dom: Any, disk: DomainDisk) -> int | None:
    if disk.source is None:
        return None
    try:
        return int(dom.blockInfo(disk.target)[0]) or None
    except libvirt.libvirtError:
        return None  # a source that cannot be opened now, or of a kind libvirt does not measure


def _resolved(conn: Any, disk: DomainDisk) -> DomainDisk:
    """A disk in a storage pool, with the path libvirt finds it at."""
    source = disk.source
    if source is None or source.kind != "volume" or not source.name:
        return disk
    try:
        path = _volume_path(conn, source.name)
    except libvirt.libvirtError:
        return disk
    return replace(disk, source=DiskSource("volume", source.format, path=path, name=source.name),
                   chain=(path, *disk.chain))


def _volume_path(conn: Any, name: str) -> str:
    pool, _, volume = name.partition("/")
    return str(conn.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())


def _pci_places(dom: Any) -> dict[str, str] | None:
    try:
        return dx.pci_places(_monitor(dom, {"execute": "query-pci"}))
    except libvirt.libvirtError as error:
        log.info("VM %s: no PCI addresses: %s", dom.name(), error)
        return None


def _monitor(dom: Any, request: Mapping[str, object]) -> object:
    answer = libvirt_qemu.qemuMonitorCommand(dom, json.dumps(request), 0)
    try:
        reply = json.loads(answer)
        if "error" in reply:
            raise HypervisorError(f"VM {dom.name()}: QEMU refuses {request['execute']}: {reply['error'].get('desc')}")
        return reply["return"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HypervisorError(f"VM {dom.name()}: QEMU's answer to {request['execute']} is not understood: "
                              f"{answer[:200]!r}") from error


def _tpm_base(conn: Any) -> str:
    """Where this libvirt keeps the state of emulated TPMs (src/qemu/qemu_conf.c, swtpmStorageDir)."""
    parts = urlsplit(conn.getURI())
    if parts.path == "/embed":
        return f"{parse_qs(parts.query)['root'][0]}/lib/swtpm"
    if parts.path == "/session":
        config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        return f"{config}/libvirt/qemu/swtpm"
    return "/var/lib/libvirt/swtpm"
