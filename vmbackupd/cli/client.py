"""The daemon over D-Bus: calls, and the changes of a job. The only module of the command line that knows D-Bus."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dbus_fast import BusType, DBusError, Message, MessageType, Variant
from dbus_fast.aio import MessageBus

from vmbackupd.api.names import BUS_NAME, ERROR_PREFIX, JOB, MANAGER, ROOT, job_path
from vmbackupd.errors import BackupError, NotFound

BUS = "org.freedesktop.DBus"
PROPERTIES = "org.freedesktop.DBus.Properties"
FINAL_STATES = ("succeeded", "failed", "cancelled")

_NOT_THERE = ("ServiceUnknown", "NameHasNoOwner", "Spawn.ChildExited", "Spawn.ExecFailed", "Spawn.ServiceNotFound",
              "Disconnected", "NoReply")
_NO_OBJECT = ("UnknownObject", "UnknownMethod", "UnknownInterface")


class DaemonUnreachable(BackupError):
    """vmbackupd does not answer on the bus."""

    code = "DaemonUnreachable"


class DaemonLost(BackupError):
    """vmbackupd, or the bus, went away while we waited for a job."""

    code = "DaemonLost"


class RemoteError(BackupError):
    """An error the daemon answered with: ``code`` is the one it gave."""

    code = "Remote"

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class JobView:
    """A job as its properties tell. ``created`` and ``ended`` are Unix times, ``ended`` 0 while it has not."""

    id: str
    kind: str
    vm: str
    state: str
    step: str
    done: int
    total: int
    warnings: tuple[str, ...]
    result: dict[str, Any]
    error: RemoteError | None
    created: float
    ended: float

    @property
    def final(self) -> bool:
        return self.state in FINAL_STATES

    @classmethod
    def from_properties(cls, values: Mapping[str, Any]) -> JobView:
        """From the plain values of the properties of the Job interface."""
        error = None
        if name := str(values["ErrorName"]):
            error = RemoteError(name.removeprefix(ERROR_PREFIX), str(values["ErrorMessage"]))
        done, total = values["Progress"]
        return cls(values["Id"], values["Kind"], values["VM"], values["State"], values["Step"], done, total,
                   tuple(values["Warnings"]), json.loads(values["Result"]), error, values["Created"], values["Ended"])


class JobWatch:
    """The changes of one job, from :meth:`Client.watch`."""

    def __init__(self) -> None:
        self._properties: dict[str, Any] = {}
        self._updates: deque[Mapping[str, Any]] = deque()
        self._changed = asyncio.Event()
        self._lost: DaemonLost | None = None

    @property
    def view(self) -> JobView:
        """The job as of the last :meth:`change`."""
        return JobView.from_properties(self._properties)

    async def change(self) -> JobView:
        """The next change, waiting for it if need be.

        Raises :class:`DaemonLost` when there will be none and the job has not ended.
        """
        while not self._updates:
            if self._lost is not None:
                if self.view.final:
                    return self.view
                raise self._lost
            self._changed.clear()
            await self._changed.wait()
        self._properties.update(self._updates.popleft())
        return self.view

    def begin(self, properties: Mapping[str, Any]) -> None:
        """All properties, as of a moment when the updates so far were known."""
        self._properties = dict(properties)
        while self._updates:
            self._properties.update(self._updates.popleft())

    def update(self, values: Mapping[str, Any]) -> None:
        """Take in changed properties."""
        self._updates.append(values)
        self._changed.set()

    def lose(self, why: str) -> None:
        """Nothing more will come."""
        job = self._properties.get("Id", "")
        self._lost = DaemonLost(
            f"{why} while job {job} ran; when vmbackupd starts again it undoes what the job did. See"
            " `journalctl -u vmbackupd` and, if something is left, `vmbackupctl recover`")
        self._changed.set()


class Client:
    """A connection to vmbackupd. Calls raise :class:`RemoteError` with the daemon's code, or
    :class:`DaemonUnreachable`."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._watches: dict[str, JobWatch] = {}
        self._end = asyncio.ensure_future(self._bus_ended())

    @classmethod
    async def connect(cls, address: str | None) -> Client:
        """Connect to the bus at ``address``, None for the system bus, and listen for changes of jobs.

        Raises :class:`DaemonUnreachable`.
        """
        try:
            bus = MessageBus(bus_address=address, bus_type=BusType.SYSTEM, negotiate_unix_fd=True)
            await bus.connect()
        except (OSError, EOFError, ValueError, DBusError) as error:  # wrong addresses and refusals are ValueErrors
            where = f"the bus at {address}" if address else "the system bus"
            raise DaemonUnreachable(f"cannot connect to {where}: {error}") from error
        client = cls(bus)
        try:
            bus.add_message_handler(client._message)
            for rule in (f"type='signal',sender='{BUS_NAME}',path_namespace='{ROOT}'",
                         f"type='signal',sender='{BUS}',member='NameOwnerChanged',arg0='{BUS_NAME}'"):
                await client._send(Message(destination=BUS, path="/org/freedesktop/DBus", interface=BUS,
                                           member="AddMatch", signature="s", body=[rule]))
        except BackupError:
            await client.close()
            raise
        return client

    async def close(self) -> None:
        """Disconnect."""
        if self._bus.connected:
            self._bus.disconnect()
        await self._end

    async def call(self, member: str, signature: str = "", *arguments: object,
                   options: Mapping[str, Variant] | None = None) -> Any:
        """Call a method of the manager, which ends with ``options``; returns the one value it returns."""
        return (await self._call(ROOT, MANAGER, member, signature + "a{sv}", *arguments, dict(options or {})))[0]

    async def listing(self, member: str, signature: str = "", *arguments: object,
                      options: Mapping[str, Variant] | None = None) -> Any:
        """:meth:`call` a method that returns JSON."""
        return json.loads(await self.call(member, signature, *arguments, options=options))

    async def start(self, member: str, signature: str = "", *arguments: object,
                    options: Mapping[str, Variant] | None = None) -> JobWatch:
        """:meth:`call` a method that starts a job, and watch that job."""
        path = str(await self.call(member, signature, *arguments, options=options))
        try:
            return await self._watch(path)
        except NotFound as error:
            raise DaemonLost(f"vmbackupd was restarted before job {path} had begun to be watched") from error

    async def watch(self, job_id: str) -> JobWatch:
        """Watch a job that runs or has ended.

        Raises ``NotFound``.
        """
        try:
            return await self._watch(job_path(job_id))
        except NotFound as error:
            raise NotFound(f"there is no job {job_id}") from error

    async def cancel(self, job_id: str) -> None:
        """Ask a job to stop.

        Raises ``NotFound``.
        """
        try:
            await self._call(job_path(job_id), JOB, "Cancel", "a{sv}", {})
        except NotFound as error:
            raise NotFound(f"there is no job {job_id}") from error

    async def jobs(self) -> list[JobView]:
        """Every job the daemon knows, oldest first."""
        objects = (await self._call(ROOT, "org.freedesktop.DBus.ObjectManager", "GetManagedObjects", ""))[0]
        jobs = [plain(interfaces[JOB]) for interfaces in objects.values() if JOB in interfaces]
        return sorted(map(JobView.from_properties, jobs), key=lambda view: view.created)

    async def _watch(self, path: str) -> JobWatch:
        # Registered first: a change may arrive with the reply. Everything the reply holds was also announced before it,
        # so changes that arrived meanwhile are never older than the reply and go on top.
        watch = self._watches[path] = JobWatch()
        try:
            watch.begin(plain((await self._call(path, PROPERTIES, "GetAll", "s", JOB))[0]))
        except BackupError:
            del self._watches[path]
            raise
        return watch

    async def _call(self, path: str, interface: str, member: str, signature: str, *body: object) -> list[Any]:
        # What travels is a position in the message's list of descriptors.
        descriptors: list[int] = []
        arguments = [_positions(value, descriptors) if isinstance(value, dict) else value for value in body]
        return await self._send(Message(destination=BUS_NAME, path=path, interface=interface, member=member,
                                        signature=signature, body=arguments, unix_fds=descriptors))

    async def _send(self, message: Message) -> list[Any]:
        try:
            if not self._bus.connected:
                raise EOFError("it was closed")
            reply = await self._bus.call(message)
        except (OSError, EOFError) as error:
            raise DaemonUnreachable(f"the bus connection ended: {error}") from error
        if reply is None:
            raise DaemonUnreachable("the bus connection ended before the answer")
        if reply.message_type is MessageType.ERROR:
            raise _error(reply.error_name or "", str(reply.body[0]) if reply.body else "")
        return list(reply.body)

    def _message(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        watch = self._watches.get(message.path or "")
        if message.member == "NameOwnerChanged" and message.sender == BUS:
            if message.body[0] == BUS_NAME and message.body[1]:
                self._lose("vmbackupd ended")
        elif watch is not None and message.interface == PROPERTIES and message.body[0] == JOB:
            watch.update(plain(message.body[1]))

    async def _bus_ended(self) -> None:
        try:
            await self._bus.wait_for_disconnect()  # type: ignore[no-untyped-call]
        except (OSError, EOFError, DBusError):
            pass
        self._lose("the bus connection ended")

    def _lose(self, why: str) -> None:
        for watch in self._watches.values():
            watch.lose(why)


def text_option(value: str) -> Variant:
    """An option of type text."""
    return Variant("s", value)


def flag_option(value: bool) -> Variant:
    """An option of type yes or no."""
    return Variant("b", value)


def number_option(value: float) -> Variant:
    """An option of type number."""
    return Variant("d", float(value))


def count_option(value: int) -> Variant:
    """An option of type count."""
    return Variant("u", value)


def texts_option(values: list[str]) -> Variant:
    """An option of type list of texts."""
    return Variant("as", values)


def mapping_option(values: Mapping[str, str]) -> Variant:
    """An option of type text to text."""
    return Variant("a{ss}", dict(values))


def descriptor_option(descriptor: int) -> Variant:
    """An option that hands an open file over. It stays ours to close, after the call."""
    return Variant("h", descriptor)


def _positions(options: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any]:
    """``options`` with places in ``descriptors``, to which theirs are added, instead of descriptors."""
    result = dict(options)
    for name, value in options.items():
        if isinstance(value, Variant) and value.signature == "h":
            descriptors.append(value.value)
            result[name] = Variant("h", len(descriptors) - 1)
    return result


def plain(value: Any) -> Any:
    """``value`` without variants."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _error(name: str, text: str) -> BackupError:
    """The error to raise for a D-Bus error."""
    if name.startswith(ERROR_PREFIX):
        return RemoteError(name.removeprefix(ERROR_PREFIX), text)
    short = name.removeprefix("org.freedesktop.DBus.Error.")
    if short in _NOT_THERE:
        return DaemonUnreachable(f"vmbackupd does not answer on the bus ({text}); is it running?"
                                 " See `systemctl status vmbackupd`")
    if short == "AccessDenied":
        return RemoteError("NotAuthorized", f"the bus does not let this user talk to vmbackupd: {text}")
    if short in _NO_OBJECT:
        return NotFound(text)
    return RemoteError("Failed", f"{name}: {text}")
