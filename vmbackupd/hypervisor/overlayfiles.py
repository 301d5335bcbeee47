"""What taking overlays out of chains has in common, whoever runs the domain: the rounds, and the files."""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass

from vmbackupd.errors import HypervisorError, InvalidArgument, NotFound, NotRunning
from vmbackupd.host.newfile import sync
from vmbackupd.hypervisor.base import DomainDisk, HypervisorLost
from vmbackupd.hypervisor.images import create_overlay, qcow2_in_use

log = logging.getLogger("hypervisor.overlay")

ROUNDS = 8
FAILURES = 3
POLL = 1.0

Progress = Callable[[int, int], None]


class Refused(HypervisorError):
    """Somebody else has to act first: trying again is of no use."""

    code = "HypervisorRefused"


@dataclass(frozen=True, slots=True)
class Below:
    """What an overlay is put on: an image of ``size`` bytes."""

    path: str
    format: str
    size: int


def check_disks(vm: str | None, disks: Iterable[DomainDisk], targets: Iterable[str]) -> None:
    """Refuse, before anything is touched, what must not or cannot be snapshotted.

    A ``lun`` above all: the guest's SCSI commands go around QEMU's block layer, and a layer under them makes the
    guest's writes fail.
    """
    known = {disk.target: disk for disk in disks}
    wanted = list(targets)
    for target in wanted:
        disk = known.get(target)
        if disk is None:
            raise InvalidArgument(f"VM {vm} has no disk {target}")
        if disk.device != "disk":
            raise InvalidArgument(f"VM {vm}: disk {target} is a {disk.device} and is never snapshotted")
        if disk.read_only or disk.source is None:
            raise InvalidArgument(f"VM {vm}: disk {target} is read-only or empty: nothing to snapshot")
    if not wanted:
        raise InvalidArgument(f"VM {vm}: a snapshot of no disk")


async def drop_in_rounds(path: str, one_round: Callable[[], Awaitable[bool]]) -> None:
    """Call ``one_round`` until it says that the overlay ``path`` is gone.

    Each round looks at the domain as it is and does the one next thing. What that is never depends on what an earlier
    round, or an earlier daemon, believed to have done.
    """
    failures = 0
    for number in range(ROUNDS):
        try:
            if await one_round():
                return
        except (HypervisorLost, NotRunning, NotFound) as error:
            if number == ROUNDS - 1:
                raise
            log.info("overlay %s: %s; looking again", path, error)
        except HypervisorError as error:
            failures += 1
            if isinstance(error, Refused) or failures == FAILURES:
                raise
            log.warning("overlay %s: %s; trying again", path, error)
            await asyncio.sleep(POLL)  # the domain may have changed under our hands: let it come to rest
    raise HypervisorError(f"overlay {path} is still in use after {ROUNDS} attempts to drop it")


async def make_overlays(wanted: Mapping[str, Below]) -> None:
    """Make an empty overlay at each path. Those made are removed again when one fails."""
    made: list[str] = []
    try:
        for path, below in wanted.items():
            await create_overlay(path, below.size, below.path, below.format)
            made.append(path)
            await asyncio.to_thread(_like, below.path, path)
    except BaseException:
        for path in made:
            os.unlink(path)
        raise


def _like(base: str, path: str) -> None:
    """Give a new overlay the owner and mode of its base: whoever runs QEMU may write to that one. libvirt labels it
    on top where it is told to (dynamic_ownership, SELinux, AppArmor)."""
    status = os.stat(base)
    if stat.S_ISREG(status.st_mode):
        os.chown(path, status.st_uid, status.st_gid)
        os.chmod(path, stat.S_IMODE(status.st_mode))


async def delete_overlay(path: str, name: str) -> None:
    """Delete an overlay that no chain of the domain ``name`` holds, as far as anybody knows."""
    if not os.path.lexists(path):
        return
    if await qcow2_in_use(path):
        raise HypervisorError(f"VM {name}: overlay {path} is in no chain that is known, but a process has it open; it"
                              " is kept")
    await asyncio.to_thread(_unlink, path)
    log.info("overlay %s is gone", path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise HypervisorError(f"cannot delete the overlay {path}: {error.strerror}") from error
    sync(os.path.dirname(path) or ".")  # the journal must not forget the overlay before the disk does
