"""The manager on the bus: everything that starts a job or reads the repository."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from dbus_fast import Variant

from vmbackupd import __version__
from vmbackupd.api import marshal
from vmbackupd.api.authorise import Authority
from vmbackupd.api.exposed import Exposed, exposed_method, exposed_property
from vmbackupd.api.names import MANAGER, job_path
from vmbackupd.api.secret import read_secret, revealer
from vmbackupd.job.manager import JobManager
from vmbackupd.job.options import InitOptions, KeyOptions

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

    @exposed_method("Forget", "o", backups="as", options="a{sv}")
    async def forget(self, backups: list[str], options: Options) -> str:
        values = marshal.read_options(options, marshal.FORGET_OPTIONS)
        return job_path(self._manager.start_forget(tuple(backups), **values).id)

    @exposed_method("Prune", "o", vm="s", options="a{sv}")
    async def prune(self, vm: str, options: Options) -> str:
        return job_path(self._manager.start_prune(vm or None, marshal.prune_options(options)).id)

    @exposed_method("CollectGarbage", "o", options="a{sv}")
    async def collect_garbage(self, options: Options) -> str:
        return job_path(self._manager.start_gc(marshal.gc_options(options)).id)

    @exposed_method("Verify", "o", backups="as", options="a{sv}")
    async def verify(self, backups: list[str], options: Options) -> str:
        return job_path(self._manager.start_verify(marshal.verify_options(backups, options)).id)

    @exposed_method("Export", "o", backup="s", volume="s", file="s", options="a{sv}")
    async def export(self, backup: str, volume: str, file: str, options: Options) -> str:
        return job_path(self._manager.start_export(backup, volume, file, marshal.export_options(options)).id)

    @exposed_method("Import", "o", file="s", name="s", options="a{sv}")
    async def import_image(self, file: str, name: str, options: Options) -> str:
        return job_path(self._manager.start_import(file, name, marshal.import_options(options)).id)

    @exposed_method("Serve", "o", backup="s", volume="s", options="a{sv}")
    async def serve(self, backup: str, volume: str, options: Options) -> str:
        return job_path(self._manager.start_serve(backup, volume, marshal.serve_options(options)).id)

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

    @exposed_method("Protect", "s", backup="s", protected="b", options="a{sv}")
    async def protect(self, backup: str, protected: bool, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return marshal.to_json(await self._manager.protect(backup, protected))

    @exposed_method("InitRepository", "s", takes_descriptors=True, options="a{sv}")
    async def init_repository(self, options: Options) -> str:
        values = marshal.read_options(options, marshal.INIT_OPTIONS)
        reveal = revealer(values["recovery_key"]) if "recovery_key" in values else None
        return marshal.to_json(await self._manager.init_repository(InitOptions(values.get("encrypt", False), reveal)))

    @exposed_method("ListKeys", "s", options="a{sv}")
    async def list_keys(self, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return marshal.to_json(await self._manager.list_keys())

    @exposed_method("AddKey", "s", takes_descriptors=True, kind="s", options="a{sv}")
    async def add_key(self, kind: str, options: Options) -> str:
        values = marshal.read_options(options, marshal.KEY_OPTIONS)
        for secret in ("secret", "unlock"):
            if secret in values:
                values[secret] = await asyncio.to_thread(read_secret, values[secret])
        if "recovery_key" in values:
            values["reveal"] = revealer(values.pop("recovery_key"))
        return marshal.to_json(await self._manager.add_key(KeyOptions(kind, **values)))

    @exposed_method("RevokeKey", "s", slot="s", options="a{sv}")
    async def revoke_key(self, slot: str, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return marshal.to_json(await self._manager.revoke_key(slot))

    @exposed_method("RepositoryInfo", "s", options="a{sv}")
    async def repository_info(self, options: Options) -> str:
        marshal.read_options(options, marshal.NO_OPTIONS)
        return marshal.to_json(await self._manager.repository_info())

    Version = exposed_property("Version", "s", lambda self: __version__)
