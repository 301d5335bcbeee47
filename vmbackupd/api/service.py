"""Puts the manager and its jobs on the bus and keeps them there."""

from __future__ import annotations

from collections.abc import Callable

from dbus_fast import NameFlag, RequestNameReply

from vmbackupd.api.authorise import Authority
from vmbackupd.api.bus import Bus, BusUnavailable
from vmbackupd.api.exposed import remember_sender
from vmbackupd.api.job_object import JobObject
from vmbackupd.api.manager_object import ManagerObject
from vmbackupd.api.names import BUS_NAME, ROOT, job_path
from vmbackupd.job.manager import Job, JobManager


class Service:
    """``manager`` as ``org.vmbackupd1`` on ``bus``, which must be connected."""

    def __init__(self, bus: Bus, manager: JobManager) -> None:
        self._bus = bus
        self._manager = manager
        self._authority = Authority(bus)
        self._objects: dict[str, JobObject] = {}
        self._unsubscribe: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Export everything, then take the name.

        Raises :class:`BusUnavailable` when somebody else owns the name.
        """
        self._bus.add_message_handler(remember_sender)
        self._bus.export(ROOT, ManagerObject(self._manager, self._authority))
        for job in self._manager.jobs.values():
            self._export(job)
        self._unsubscribe = self._manager.subscribe(self._job_changed)
        reply = await self._bus.request_name(BUS_NAME, NameFlag.DO_NOT_QUEUE)
        if reply is not RequestNameReply.PRIMARY_OWNER:
            self._unsubscribe()
            raise BusUnavailable(f"the name {BUS_NAME} is taken on this bus: another vmbackupd runs")

    async def stop(self) -> None:
        """Give the name back and take everything off the bus."""
        self._unsubscribe()
        if not self._bus.connected:
            return
        await self._bus.release_name(BUS_NAME)
        for path in [job_path(job_id) for job_id in self._objects] + [ROOT]:
            self._bus.unexport(path)
        self._objects.clear()

    def _job_changed(self, job: Job, changed: set[str]) -> None:
        if "new" in changed:
            self._export(job)
        elif "removed" in changed:
            if self._objects.pop(job.id, None) is not None and self._bus.connected:
                self._bus.unexport(job_path(job.id))
        elif job.id in self._objects and self._bus.connected:
            self._objects[job.id].announce(changed)

    def _export(self, job: Job) -> None:
        if self._bus.connected:
            self._objects[job.id] = JobObject(job, self._authority)
            self._bus.export(job_path(job.id), self._objects[job.id])
