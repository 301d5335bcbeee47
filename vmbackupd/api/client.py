"""The client's side of the API: calls, and the changes of a job."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dbus_fast import DBusError, Message, MessageType, Variant

from vmbackupd.api.bus import Bus, bus_call, connect, reply_body
from vmbackupd.api.names import BUS_NAME, ERROR_PREFIX, JOB, MANAGER, ROOT, job_path
from vmbackupd.errors import BackupError, NotFound

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

    def __init__(self, client: Client, path: str, properties: dict[str, Any]) -> None:
        self._client = client
        self._path = path
        self._properties = properties
        self._changed = asyncio.Event()
        self._lost: DaemonLost | None = None

    @property
    def view(self) -> JobView:
        """The job as it is known now."""
        return JobView.from_properties(self._properties)

    async def change(self) -> JobView:
        """Wait for a change since the last call; several make one.

        Raises :class:`DaemonLost`, also when the job had not ended.
        """
        await self._changed.wait()
        self._changed.clear()
        if self._lost is not None and not self.view.final:
            raise self._lost
        return self.view

    def update(self, values: Mapping[str, Any]) -> None:
        """Take in changed properties."""
        self._properties.update(values)
        self._changed.set()

    def lose(self, why: str) -> None:
        """Nothing more will come."""
        self._lost = DaemonLost(
            f"{why} while job {self.view.id} ({self.view.kind} {self.view.vm}) ran; when vmbackupd starts again it undoes"
            " what the job did. See `journalctl -u vmbackupd`, `vmbackupctl jobs` and, if something is left,"
            " `vmbackupctl recover`")
        self._changed.set()


class Client:
    """A connection to vmbackupd. Errors are :class:`RemoteError` with the daemon's code, or :class:`DaemonUnreachable`."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._watches: dict[str, JobWatch] = {}
        self._end = asyncio.ensure_future(self._bus_ended())

    @classmethod
    async def connect(cls, address: str | None) -> Client:
        """Connect to the bus at ``address``, None for the system bus, and listen for changes of jobs.

        Raises ``BusUnavailable``.
        """
        client = cls(await connect(address))
        try:
            client._bus.add_message_handler(client._message)
            for rule in (f"type='signal',sender='{BUS_NAME}',path_namespace='{ROOT}'",
                         f"type='signal',sender='org.freedesktop.DBus',member='NameOwnerChanged',arg0='{BUS_NAME}'"):
                await bus_call(client._bus, "AddMatch", "s", rule)
        except DBusError as error:
            await client.close()
            raise DaemonUnreachable(f"the bus refuses to pass the signals of vmbackupd: {error}") from error
        return client

    async def close(self) -> None:
        await self._bus.close()
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
        return await self._watch(path)

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
        views = [JobView.from_properties(plain(interfaces[JOB])) for interfaces in objects.values() if JOB in interfaces]
        return sorted(views, key=lambda view: view.created)

    async def _watch(self, path: str) -> JobWatch:
        # Signals that come between the reply and the registration below are older than the reply, or handled after it.
        values = plain((await self._call(path, PROPERTIES, "GetAll", "s", JOB))[0])
        self._watches[path] = JobWatch(self, path, values)
        return self._watches[path]

    async def _call(self, path: str, interface: str, member: str, signature: str, *body: object) -> list[Any]:
        try:
            return reply_body(await self._bus.call(Message(
                destination=BUS_NAME, path=path, interface=interface, member=member, signature=signature,
                body=list(body))))
        except (DBusError, OSError, EOFError) as error:
            raise _translate(error) from error

    def _message(self, message: Message) -> None:
        if message.message_type is not MessageType.SIGNAL:
            return
        watch = self._watches.get(message.path or "")
        if message.member == "NameOwnerChanged" and message.sender == "org.freedesktop.DBus":
            if message.body[0] == BUS_NAME and message.body[1]:
                self._lose("vmbackupd ended")
        elif watch is not None and message.interface == PROPERTIES and message.body[0] == JOB:
            watch.update(plain(message.body[1]))

    async def _bus_ended(self) -> None:
        await self._bus.gone()
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


def plain(value: Any) -> Any:
    """``value`` without variants."""
    if isinstance(value, Variant):
        return plain(value.value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


def _translate(error: Exception) -> BackupError:
    if not isinstance(error, DBusError):
        return DaemonUnreachable(f"the bus connection ended: {error}")
    name = error.type
    if name.startswith(ERROR_PREFIX):
        return RemoteError(name.removeprefix(ERROR_PREFIX), error.text)
    short = name.removeprefix("org.freedesktop.DBus.Error.")
    if short in _NOT_THERE:
        return DaemonUnreachable(f"vmbackupd does not answer on the bus ({error.text}); is it running?"
                                 " See `systemctl status vmbackupd`")
    if short == "AccessDenied":
        return RemoteError("NotAuthorized", f"the bus does not let this user talk to vmbackupd: {error.text}")
    if short in _NO_OBJECT:
        return NotFound(error.text)
    return RemoteError("Failed", f"{name}: {error.text}")
