"""The manager on the bus: everything that starts a job or reads the repository."""

from __future__ import annotations

from collections.abc import Mapping

from dbus_fast import Variant

from vmbackupd import __version__
from vmbackupd.api import marshal
from vmbackupd.api.authorise import Authority
from vmbackupd.api.exposed import Exposed, exposed_method, exposed_property
from vmbackupd.api.names import MANAGER, job_path
from vmbackupd.job.manager import JobManager

Options = Mapping[str, Variant]


class ManagerObject(Exposed):
    """``org.vmbackupd1.Manager``. Methods that take long return the path of a job at once."""

    def __init__(self, manager: JobManager, authority: Authority) -> None:
        super().__init__(MANAGER, authority)
        self._manager = manager

    @exposed_method("Inspect", "o", vm="s", options="a{sv}")
    async def inspect(self, vm: str, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return job_path(self._manager.start_inspect(vm).id)

    @exposed_method("Backup", "o", vm="s", options="a{sv}")
    async def backup(self, vm: str, options: Options) -> str:
        return job_path(self._manager.start_backup(vm, marshal.backup_options(options)).id)

    @exposed_method("Restore", "o", backup="s", options="a{sv}")
    async def restore(self, backup: str, options: Options) -> str:
        return job_path(self._manager.start_restore(backup, marshal.restore_options(options)).id)

    @exposed_method("Recover", "o", options="a{sv}")
    async def recover(self, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return job_path(self._manager.start_recover().id)

    @exposed_method("ListMachines", "s", options="a{sv}")
    async def list_machines(self, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return marshal.to_json(await self._manager.list_machines())

    @exposed_method("ListBackups", "s", vm="s", options="a{sv}")
    async def list_backups(self, vm: str, options: Options) -> str:
        marshal.read_options(options, marshal.PAGE_OPTIONS)  # refuses before the listing is made
        return marshal.to_json(marshal.page(await self._manager.list_backups(vm or None), options))

    @exposed_method("ShowBackup", "s", backup="s", options="a{sv}")
    async def show_backup(self, backup: str, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return marshal.to_json(await self._manager.show_backup(backup))

    @exposed_method("InitRepository", "s", options="a{sv}")
    async def init_repository(self, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return marshal.to_json(await self._manager.init_repository())

    @exposed_method("RepositoryInfo", "s", options="a{sv}")
    async def repository_info(self, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return marshal.to_json(await self._manager.repository_info())

    Version = exposed_property("Version", "s", lambda self: __version__)
