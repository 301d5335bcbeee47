"""A private bus, a small runner, and ways to talk to what they serve."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dbus_fast import Message, MessageType, Variant
from dbus_fast.aio import MessageBus

from vmbackupd.api.bus import Bus, connect
from vmbackupd.api.names import BUS_NAME, MANAGER, ROOT
from vmbackupd.api.service import Service
from vmbackupd.errors import FreezeBudgetExceeded, NotFound, RepositoryMissing, UncoveredVolume
from vmbackupd.job.manager import JobContext, JobManager, Result
from vmbackupd.job.options import (
    BackupOptions,
    ExportOptions,
    GcOptions,
    ImportOptions,
    InitOptions,
    KeyOptions,
    PruneOptions,
    RestoreOptions,
    ServeOptions,
    VerifyOptions,
)

ROOT_DIRECTORY = Path(__file__).parents[3]
DEADLINE = 30.0

CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path={directory}/bus</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/>
    <allow own="*"/>
  </policy>
  {extra}
</busconfig>
"""


RECOVERY_KEY = "ABCDE-FGHIJ"


class BusDaemon:
    """A dbus-daemon of our own, with ``address``, as a context manager."""

    def __init__(self, extra: str = "") -> None:
        self._extra = extra

    def __enter__(self) -> BusDaemon:
        self.directory = Path(tempfile.mkdtemp(prefix="vmbackupd-bus-"))
        self.directory.chmod(0o755)  # other users' processes connect as well
        config = self.directory / "bus.conf"
        config.write_text(CONFIG.format(directory=self.directory, extra=self._extra))
        self.process = subprocess.Popen(
            ["dbus-daemon", "--nofork", "--nopidfile", f"--config-file={config}", "--print-address=1"],
            stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip().partition(",")[0]
        assert self.address, "dbus-daemon did not start"
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        shutil.rmtree(self.directory)

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait(DEADLINE)
        assert self.process.stdout is not None
        self.process.stdout.close()


class SmallRunner:
    """Work without hypervisor and guest. The name of a VM says what happens to its backup:

    ``web`` succeeds; ``gaps`` succeeds with an uncovered volume; ``lun`` fails as uncovered; ``cold`` fails on the
    freeze budget; ``bug`` raises what is no error of ours; ``slow`` works until :attr:`go` is set or it is cancelled,
    and then undoes until :attr:`undone` is set; ``none`` does not exist. ``NAME-alias`` is another name of ``NAME``.
    """

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.undone = asyncio.Event()
        self.undone.set()
        self.running = asyncio.Event()
        self.undoing = asyncio.Event()
        self.calls: list[tuple[Any, ...]] = []
        self.backups: list[Result] = []
        self.left_frozen: dict[str, str] = {}
        self.answers = asyncio.Event()  # the guest agent of what is left frozen
        self.active = 0
        self.most_active = 0

    async def backup(self, job: JobContext, vm: str, options: BackupOptions) -> Result:
        self.calls.append(("backup", vm, options))
        job.observer.expect(1000)
        job.observer.step("inspect")
        if vm == "none":
            raise NotFound("there is no VM none")
        job.claim(f"vm:uuid-of-{vm.removesuffix('-alias')}")
        if vm == "lun":
            raise UncoveredVolume("VM lun: sdb is passed through and cannot be captured")
        if vm == "cold":
            raise FreezeBudgetExceeded("VM cold: frozen for 7.1 s, the budget is 5.0 s")
        if vm == "bug":
            raise ZeroDivisionError("a bug")
        job.observer.step("passthrough-copy")
        job.observer.progress(400)
        if vm.startswith("slow"):
            await self._wait(job)
        job.observer.progress(1000)
        job.observer.step("seal")
        result: Result = {"backup": f"{vm}-1", "t1": 1700000000.25, "freeze_ms": 12.5, "uncovered": []}
        if vm == "gaps":
            job.observer.warning("sdb is not in this backup")
            result["uncovered"] = ["serial:sdb"]
        return result

    async def _wait(self, job: JobContext) -> None:
        self.active += 1
        self.most_active = max(self.active, self.most_active)
        self.running.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            job.observer.step("undo")
            self.undoing.set()
            await self.undone.wait()
            raise
        finally:
            self.active -= 1

    async def restore(self, job: JobContext, backup: str, options: RestoreOptions) -> Result:
        self.calls.append(("restore", backup, options))
        return {"backup": backup, "name": options.name, "problems": ["volume vda: /new/vda.qcow2 is not empty"],
                "volumes": [{"id": "vda", "kind": "virtual", "size": 4096, "target": "/new/vda.qcow2", "revert": False,
                             "now": {"content": "data", "what": "an ext4 filesystem"}}],
                "present_to_guest": [{"volume": "wwn:1", "target": "iscsi://h/i/1", "how": "log in to i"}],
                **({"bytes_written": {"vda": 1024}} if options.in_place else {})}

    async def inspect(self, job: JobContext, vm: str) -> Result:
        self.calls.append(("inspect", vm))
        return {"vm": vm, "uuid": "u", "uncovered": [], "would_fail": vm == "lun", "coverage": [
            {"device": "vda", "id": "vda", "size": 1 << 30, "kind": "virtual", "method": "guest-snapshot",
             "decision": "captured", "reason": ""},
            {"device": "sr0", "id": "sda", "size": 0, "kind": "virtual", "method": None, "decision": "excluded",
             "reason": "a \x1b[31mCD-ROM"}]}

    async def recover(self, job: JobContext) -> Result:
        self.calls.append(("recover", job.others()))
        return {"recovered": [{"job": "j00000000", "vm": "web", "undone": ["thaw"], "failed": []}]}

    def unthawed(self, running: Collection[str]) -> Mapping[str, str]:
        return dict(self.left_frozen)

    async def thaw(self, job: JobContext, uuid: str, vm: str) -> Result:
        self.calls.append(("thaw", uuid, vm))
        await self.answers.wait()
        del self.left_frozen[uuid]
        return {"recovered": []}

    async def forget(self, job: JobContext, backups: tuple[str, ...], dry_run: bool) -> Result:
        self.calls.append(("forget", backups, dry_run))
        if "none" in backups:
            raise NotFound("there is no backup none")
        until = {"locked_until": 1700000000.0} if "locked-1" in backups else {}
        return {"dry_run": dry_run, "forgotten": list(backups), "waiting": ["reader session 00ff of host-b"], **until,
                "decisions": [{"backup": item, "keep": False, "reason": "named"} for item in backups]}

    async def prune(self, job: JobContext, vm: str | None, options: PruneOptions) -> Result:
        self.calls.append(("prune", vm, options))
        return {"dry_run": options.dry_run, "forgotten": ["web-1"], "waiting": [], "decisions": [
            {"backup": "web-2", "keep": True, "reason": "keep-last 1"},
            {"backup": "web-1", "keep": False, "reason": "no rule keeps it"}]}

    async def gc(self, job: JobContext, options: GcOptions) -> Result:
        self.calls.append(("gc", options))
        job.observer.expect(1000)
        job.observer.step("mark")
        if options.threshold == 1.0:
            await self._wait(job)
        return {"dry_run": options.dry_run, "condemned_packs": 5, "removed_packs": 3, "freed_bytes": 5 << 20,
                "repacked_bytes": 4096, "waiting_packs": 2, "waiting_for": ["reader session 00ff of host-b"],
                "damaged_packs": [], "reasons": {"nothing is needed": 4, "mostly waste": 1}}

    async def verify(self, job: JobContext, options: VerifyOptions) -> Result:
        self.calls.append(("verify", options))
        if "slow" in options.backups:
            await self._wait(job)
        damaged = "bad-1" in options.backups
        damage = {"backup": "bad-1", "volume": "vda", "offset": 65536, "length": 65536,
                  "reason": "pack 00ff is damaged"}
        return {"sound": not damaged, "data": options.data, "backups": ["bad-1", "web-1"], "packs": 7,
                "bytes_read": 1 << 20, "damaged_packs": {"00ff": "a record is damaged"} if damaged else {},
                "damage": [damage] if damaged else [], "damaged_indexes": [], "unreadable": {}, "resumed": False}

    async def export(self, job: JobContext, backup: str, volume: str, file: str, options: ExportOptions) -> Result:
        self.calls.append(("export", backup, volume, file, options))
        if backup == "slow":
            await self._wait(job)
        return {"backup": backup, "volume": volume, "path": file, "format": options.format, "size": 1 << 30}

    async def import_image(self, job: JobContext, file: str, name: str, options: ImportOptions) -> Result:
        self.calls.append(("import", file, name, options))
        return {"backup": f"{name}-1", "path": file, "size": 1 << 30, "bytes_stored": 4096}

    async def serve(self, job: JobContext, backup: str, volume: str, options: ServeOptions) -> Result:
        self.calls.append(("serve", backup, volume, options))
        if backup == "none":
            raise NotFound("there is no backup none")
        job.observer.step(f"serving {options.socket or '/run/own.sock'}")
        await self._wait(job)
        return {}

    async def protect(self, backup: str, protected: bool) -> Result:
        self.calls.append(("protect", backup, protected))
        return {"backup": backup, "protected": protected}

    async def list_keys(self) -> list[Result]:
        return [{"id": "0011223344556677", "kind": "keyfile", "label": "the vault", "created": 1700000000.0}]

    async def add_key(self, options: KeyOptions) -> Result:
        self.calls.append(("add_key", options, options.secret, options.unlock))
        if options.reveal is not None:
            options.reveal(RECOVERY_KEY)
        return {"id": "8899aabbccddeeff", "kind": options.kind, "label": options.label, "created": 1700000000.0}

    async def revoke_key(self, slot: str) -> Result:
        self.calls.append(("revoke_key", slot))
        return {"revoked": slot}

    async def list_machines(self) -> list[Result]:
        return [{"name": "web", "uuid": "uuid-of-web", "running": True}, {"name": "db", "uuid": "u2", "running": False}]

    async def list_backups(self, vm: str | None) -> list[Result]:
        return [backup for backup in self.backups if vm in (None, backup["vm"])]

    async def show_backup(self, backup: str) -> Result:
        if backup != "web-1":
            raise NotFound(f"there is no backup {backup}")
        return {"id": "web-1", "vm": {"name": "web", "uuid": "u"}, "created": 1700000001.0, "t1": 1700000000.25,
                "t2": 1700000003.5, "freeze_ms": 12.5, "revert": "backup", "volumes": [
                    {"id": "vda", "kind": "virtual", "method": "guest-snapshot", "consistency": "application",
                     "size": 1 << 30, "bytes_read": 1 << 20, "bytes_stored": 4096, "reverted_chunks": 7}]}

    async def init_repository(self, options: InitOptions) -> Result:
        self.calls.append(("init", options.encrypt, options.reveal is not None))
        if not options.encrypt:
            return {"id": "r1", "path": "/repository"}
        if options.reveal is not None:
            options.reveal(RECOVERY_KEY)
        return {"id": "r1", "encrypted": True, "keys": [{"id": "0011223344556677", "kind": "keyfile"}]}

    async def repository_info(self) -> Result:
        raise RepositoryMissing("there is no repository at /repository")


@asynccontextmanager
async def served(address: str, *, parallel: int = 4,
                 runner: SmallRunner | None = None) -> AsyncIterator[tuple[JobManager, SmallRunner, Bus]]:
    """A manager on the bus; everything is stopped at the end."""
    runner = runner or SmallRunner()
    manager = JobManager(runner, parallel=parallel)
    bus = await connect(address)
    service = Service(bus, manager)
    try:
        await service.start()
        yield manager, runner, bus
    finally:
        runner.undone.set()
        await manager.close()
        await service.stop()
        await bus.close()


class Peer:
    """A D-Bus client that shares no code with the project's own."""

    def __init__(self, bus: MessageBus) -> None:
        self.bus = bus
        self.signals: list[Message] = []
        self._news = asyncio.Event()
        bus.add_message_handler(self._message)

    def _message(self, message: Message) -> None:
        if message.message_type is MessageType.SIGNAL and message.sender != "org.freedesktop.DBus":
            self.signals.append(message)
            self._news.set()

    async def listen(self) -> None:
        """Receive every signal."""
        await self.call("/org/freedesktop/DBus", "org.freedesktop.DBus", "AddMatch", "s", "type='signal'",
                        to="org.freedesktop.DBus")

    async def raw(self, path: str, interface: str, member: str, signature: str = "", *body: Any,
                  to: str = BUS_NAME, descriptors: list[int] | None = None) -> Message:
        reply = await asyncio.wait_for(self.bus.call(Message(
            destination=to, path=path, interface=interface, member=member, signature=signature, body=list(body),
            unix_fds=descriptors or [])), DEADLINE)
        assert reply is not None
        return reply

    async def call(self, path: str, interface: str, member: str, signature: str = "", *body: Any,
                   to: str = BUS_NAME) -> Any:
        reply = await self.raw(path, interface, member, signature, *body, to=to)
        assert reply.message_type is MessageType.METHOD_RETURN, (reply.error_name, reply.body)
        return reply.body[0] if reply.body else None

    async def error(self, path: str, interface: str, member: str, signature: str = "", *body: Any) -> tuple[str, str]:
        reply = await self.raw(path, interface, member, signature, *body)
        assert reply.message_type is MessageType.ERROR, reply.body
        assert reply.error_name is not None
        return reply.error_name, reply.body[0]

    async def manager(self, member: str, signature: str = "", *body: Any, **options: Variant) -> Any:
        return await self.call(ROOT, MANAGER, member, signature + "a{sv}", *body, options)

    async def manager_error(self, member: str, signature: str = "", *body: Any, **options: Variant) -> tuple[str, str]:
        return await self.error(ROOT, MANAGER, member, signature + "a{sv}", *body, options)

    async def signal(self, accept: Callable[[Message], bool]) -> Message:
        """The first signal that ``accept`` takes, waiting for it if need be."""
        async with asyncio.timeout(DEADLINE):
            while True:
                for message in self.signals:
                    if accept(message):
                        return message
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def peer(address: str) -> AsyncIterator[Peer]:
    """A client on the bus."""
    bus = await MessageBus(bus_address=address, negotiate_unix_fd=True).connect()
    try:
        yield Peer(bus)
    finally:
        bus.disconnect()
        await asyncio.gather(bus.wait_for_disconnect(), return_exceptions=True)


def cli_environment(address: str) -> dict[str, str]:
    """The environment of a ``vmbackupctl`` that talks to the bus at ``address``."""
    return {**os.environ, "VMBACKUPD_BUS_ADDRESS": address, "PYTHONPATH": str(ROOT_DIRECTORY), "COLUMNS": "120"}


def cli_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "vmbackupd.cli", *arguments]
