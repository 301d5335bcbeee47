"""Keeps a process able to run while the root filesystem stands still: nothing of it is ever paged in or out.

Locks are not inherited by a forked child, and after a fork the first write to each page copies it: both sides lock
again.
"""

import ctypes
import gc
import mmap
import signal
from typing import Set

from .failures import HelperError

_MCL_CURRENT, _MCL_FUTURE = 1, 2
_PR_SET_PDEATHSIG, _PR_SET_NAME, _PR_SET_IO_FLUSHER = 1, 15, 57

_libc = ctypes.CDLL(None, use_errno=True)


def lock() -> None:
    """Lock all memory, now and later, and break copy-on-write of what a fork shares."""
    if _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE) != 0:
        raise HelperError("NoMemoryLock", "cannot lock the helper's memory (errno %d)" % ctypes.get_errno())
    # Memory is then not reclaimed by writing to the very disks that are suspended (Linux 5.6; older ones refuse).
    _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def reserve(size: int) -> mmap.mmap:
    """``size`` bytes that are in memory now and stay there; forked children share them. Raises ``HelperError``."""
    try:
        memory = mmap.mmap(-1, size)
    except OSError as error:
        raise HelperError("NoMemory", "cannot reserve %d bytes of memory: %s" % (size, error.strerror))
    view = (ctypes.c_char * size).from_buffer(memory)
    locked = _libc.mlock(ctypes.byref(view), ctypes.c_size_t(size)) == 0
    del view  # else the memory could not be given back
    if not locked:
        memory.close()
        raise HelperError("NoMemory", "cannot lock %d bytes of memory (errno %d)" % (size, ctypes.get_errno()))
    return memory


def available() -> int:
    """Bytes that processes can still be given without swapping."""
    with open("/proc/meminfo") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def unlock() -> None:
    """Let the kernel page the process again."""
    _libc.munlockall()
    _libc.prctl(_PR_SET_IO_FLUSHER, 0, 0, 0, 0)


def set_name(name: bytes) -> None:
    """The process's name in ``/proc/PID/comm``."""
    _libc.prctl(_PR_SET_NAME, name, 0, 0, 0)


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def set_oom_score(score: int) -> None:
    """How soon the kernel kills this process when memory is short: -1000 never."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("%d" % score)
    except OSError:
        pass  # in a container


class Still:
    """While this context lasts no garbage is collected and no signal arrives except ``wake``, which only interrupts a
    system call."""

    wake = signal.SIGUSR1

    def __init__(self) -> None:
        self._before: Set[int] = set()

    def __enter__(self) -> None:
        gc.disable()
        every = set(range(1, signal.NSIG)) - {int(self.wake), 32, 33}  # 32 and 33 belong to the C library
        self._before = {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, every)}

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)
        gc.enable()


def interruptible() -> None:
    """Let ``Still.wake`` interrupt a system call, and do nothing else."""
    signal.signal(Still.wake, _nothing)


def _nothing(number: int, frame: object) -> None:
    """SIG_IGN would not interrupt anything."""
