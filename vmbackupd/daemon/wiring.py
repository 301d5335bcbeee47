"""Which parts the daemon is made of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from vmbackupd.config import Config
from vmbackupd.errors import ConfigError
from vmbackupd.hypervisor.base import Hypervisor
from vmbackupd.job.job import Runner

RunnerFactory = Callable[[Config], AbstractAsyncContextManager[Runner]]


@asynccontextmanager
async def job_runner(config: Config) -> AsyncIterator[Runner]:
    """The real work, on libvirt or on QEMU alone. Raises ``HypervisorError`` when libvirt cannot be reached."""
    # Imported here so that a wrong command line or configuration is told without libvirt and the engine.
    from vmbackupd.job.runner import JobRunner

    hypervisor = _hypervisor(config)
    await hypervisor.open()
    try:
        yield JobRunner(config, hypervisor)
    finally:
        await hypervisor.close()


def _hypervisor(config: Config) -> Hypervisor:
    if config.hypervisor.is_qmp:
        from vmbackupd.hypervisor.qmp.hypervisor import QmpHypervisor

        return QmpHypervisor(config.machines, config.state_directory)
    from vmbackupd.hypervisor.libvirt import LibvirtHypervisor

    return LibvirtHypervisor(config.hypervisor.uri)


def make_directories(config: Config) -> None:
    """Make the directories the daemon works in.

    QEMU, which runs under another user, has to get through to the scratch disks and no further. Raises ``ConfigError``.
    """
    directories = [(config.state_directory, 0o711), (config.runtime_directory, 0o700),
                   (config.scratch.directory, 0o711)]
    if config.repository.url:
        directories.append((config.cache_directory, 0o700))  # index files of an object store
    for directory, mode in directories:
        try:
            _make(directory, mode)
        except OSError as error:
            raise ConfigError(f"cannot make the directory {directory}: {error}") from error


def _make(directory: Path, mode: int) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True)
        directory.chmod(mode)  # not mkdir's mode, which the umask cuts
