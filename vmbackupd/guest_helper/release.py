"""Takes everything of one job out of device-mapper, whoever made it and however far it had got.

Nothing is remembered: the devices' uuids (``VMBK-<job>-<n>-real|cow|snap``) say what is ours, and a volume is hooked
when one of its tables is a ``snapshot-origin`` on one of our ``real`` devices, whose own table is then the volume's.

Suspends here are without lockfs. Swapping tables needs no consistent moment, only that nothing is in flight, which
every flushing suspend waits for; lockfs would freeze the root filesystem under this process, fail where another tool
has frozen a filesystem (Linux 6.1), or leave its device marked as frozen for ever (6.12).
"""

import errno
import re
from typing import Dict, List, NamedTuple

from . import memory, udevrules
from .dm import READONLY, SUSPEND, Dm, Info, Target, resume_request, suspend_request
from .failures import HelperError
from .watchdog import Watchdog

DEADMAN = 60.0  # seconds a volume may stay suspended here, should this process be stopped


class Hook(NamedTuple):
    """A volume that has one of our tables, live or waiting."""

    volume: Info
    real: Info
    live: bool


def prefix(job: str) -> str:
    """How the uuids of a job's devices begin."""
    return "VMBK-%s-" % job


def release(dm: Dm, job: str) -> List[str]:
    """Restore every volume's table, remove the job's devices; returns their names. Nothing there is no error.

    Raises ``HelperError`` or ``OSError`` when something stays; calling again then goes on from there.
    """
    with dm.alone():
        return _release(dm, job)


def _release(dm: Dm, job: str) -> List[str]:
    devices = dm.devices()
    parts = _parts(devices, job)
    hooks = _hooks(dm, devices, parts["real"])
    if hooks:
        _unhook(dm, hooks, parts)
    removed = []
    for part in ("snap", "cow", "real"):
        for device in sorted(parts[part].values()):
            dm.remove(device.number)
            removed.append(device.name)
    if not any(device.uuid.startswith("VMBK-") for device in dm.devices()):
        udevrules.remove()
    return removed


def _parts(devices: List[Info], job: str) -> Dict[str, Dict[str, Info]]:
    """The job's devices: ``{"real": {"0": info}}``."""
    parts: Dict[str, Dict[str, Info]] = {"real": {}, "cow": {}, "snap": {}}
    for device in devices:
        found = re.match(re.escape(prefix(job)) + r"([0-9]+)-(real|cow|snap)\Z", device.uuid)
        if found:
            parts[found.group(2)][found.group(1)] = device
    return parts


def _hooks(dm: Dm, devices: List[Info], reals: Dict[str, Info]) -> List[Hook]:
    by_devno = {device.devno: device for device in reals.values()}
    hooks = []
    for device in devices:
        if device.uuid.startswith("VMBK-"):
            continue
        for inactive in (False, True):
            try:
                rows = dm.table(device.number, inactive)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break  # removed meanwhile
                raise
            if len(rows) == 1 and rows[0].kind == "snapshot-origin" and rows[0].params in by_devno:
                hooks.append(Hook(device, by_devno[rows[0].params], not inactive))
    return hooks


def _unhook(dm: Dm, hooks: List[Hook], parts: Dict[str, Dict[str, Info]]) -> None:
    """Give the volumes their own tables back, one after the other, guarded like the freeze."""
    memory.lock()
    memory.interruptible()
    guard = Watchdog(DEADMAN, dm, [hook.volume.number for hook in hooks], thaw=False)
    try:
        snaps = {
            dm_table[0].params.split(" ")[0]: device
            for device, dm_table in ((device, dm.table(device.number)) for device in parts["snap"].values())
            if dm_table
        }
        for hook in hooks:
            if not hook.live:
                dm.clear(hook.volume.number)
        for hook in hooks:
            if hook.live:
                snap = snaps.get(hook.real.devno)
                _swap(dm, hook, [snap.number] if snap is not None else [])
            elif dm.info(hook.volume.number).suspended:
                dm.call(SUSPEND, resume_request(hook.volume.number))
    finally:
        guard.disarm()
    for hook in hooks:
        _verify(dm, hook)


def _swap(dm: Dm, hook: Hook, snaps: List[int]) -> None:
    """Between suspend and resume there is nothing but ioctls: the volume may be the one this program came from."""
    number, rows = hook.volume.number, dm.table(hook.real.number)
    _require_complete(hook, rows)
    dm.load(number, rows, hook.volume.flags & READONLY)
    suspends = [suspend_request(device) for device in [number] + snaps]
    resume = resume_request(number)
    failure = None
    with memory.Still():
        for buffer in suspends:
            try:
                dm.call(SUSPEND, buffer)
            except OSError as error:
                failure = error
                break
        dm.call(SUSPEND, resume)  # also after a failure; with the right table, which suspends for itself if need be
    if failure is not None:
        raise failure


def _require_complete(hook: Hook, rows: List[Target]) -> None:
    if not rows:
        raise HelperError(
            "NoTable", "%s has lost its table: the volume %s stays on it" % (hook.real.name, hook.volume.name)
        )


def _verify(dm: Dm, hook: Hook) -> None:
    info, number = dm.info(hook.volume.number), hook.volume.number
    expected = dm.table(hook.real.number)
    if dm.table(number) != expected or info.suspended or info.inactive:
        raise HelperError("NotRestored", "the volume %s does not have its own table back" % info.name)
