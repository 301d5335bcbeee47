"""The scratch disk: the whole virtio disk that the host plugged in for the COW stores."""

import os
import stat
import time
from typing import NamedTuple

from . import devices
from .failures import HelperError

WAIT = 30.0  # seconds for a disk that the host has just plugged in


class Scratch(NamedTuple):
    """The disk's ``major:minor``, its node and its size in bytes."""

    devno: str
    path: str
    size: int


def find(serial: str, seconds: float = WAIT) -> Scratch:
    """The disk with this serial number, waited for. Raises ``HelperError``, also when somebody uses it."""
    deadline = time.monotonic() + seconds
    while True:
        for name in os.listdir("/sys/block"):
            if devices.read("/sys/block/%s/serial" % name) == serial:
                found = _scratch(name)
                if found is not None:
                    return found
        if time.monotonic() > deadline:
            raise HelperError("NoScratchDisk", "no disk with serial number %s appeared within %d s" % (serial, seconds))
        time.sleep(0.05)


def _scratch(name: str) -> "Scratch | None":
    """None while the kernel has not finished with it: its node is there before it can be opened."""
    base = "/sys/block/" + name
    size = devices.read(base + "/size")
    path, devno = "/dev/" + name, devices.devno_of_name(name)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        holders = os.listdir(base + "/holders")
    except OSError:
        return None
    if not size.isdigit() or int(size) == 0 or not stat.S_ISBLK(status.st_mode):
        return None
    if "%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev)) != devno:
        return None
    if holders:
        raise HelperError("ScratchInUse", "the scratch disk %s is already in use" % name)
    return Scratch(devno, path, int(size) * devices.SECTOR)


def zero(scratch: Scratch, offset: int, length: int) -> None:
    """Write zeros: the kernel takes a store whose first chunk is zero for a new one."""
    descriptor = os.open(scratch.path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < length:
            done += os.pwrite(descriptor, bytes(min(1 << 20, length - done)), offset + done)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
