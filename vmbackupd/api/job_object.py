"""A job on the bus."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dbus_fast import Variant

from vmbackupd.api.authorise import Authority
from vmbackupd.api.exposed import Exposed, exposed_method, exposed_property, exposed_signal
from vmbackupd.api.marshal import JOB_PROPERTIES, NO_OPTIONS, read_options
from vmbackupd.api.names import JOB
from vmbackupd.job.manager import Job


class JobObject(Exposed):
    """``org.vmbackupd1.Job``: the properties of a job, ``Cancel`` and ``Finished``."""

    def __init__(self, job: Job, authority: Authority) -> None:
        super().__init__(JOB, authority)
        self.job = job

    @exposed_method("Cancel", options="a{sv}")
    async def cancel(self, options: Mapping[str, Variant]) -> None:
        read_options(options, NO_OPTIONS)
        self.job.cancel()

    @exposed_signal("Finished", "s")
    def finished(self) -> str:
        return self.job.state.value

    def announce(self, changed: set[str]) -> None:
        """Tell the bus that attributes of the job changed."""
        values = {name: get(self.job) for name, (_, get, sources) in JOB_PROPERTIES.items() if sources & changed}
        if values:
            self.emit_properties_changed(values)
        if "ended" in changed:
            self.finished()


def _add_property(name: str, kind: str, get: Callable[[Job], Any]) -> None:
    setattr(JobObject, name, exposed_property(name, kind, lambda self: get(self.job)))


for _name, (_kind, _get, _) in JOB_PROPERTIES.items():
    _add_property(_name, _kind, _get)
