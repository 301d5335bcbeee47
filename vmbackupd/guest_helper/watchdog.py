"""The dead-man: a forked process that thaws the guest when nobody else does.

It is forked right before the freeze, locked into memory, and needs nothing but ioctls on descriptors it already has.
When the host has not disarmed it in time, or the helper dies, it resumes every volume that is suspended and thaws every
filesystem. It goes on until it is told to end: a helper that was stopped half way may suspend again later, and an agent
whose freeze waited for a hook freezes when that has ended.
"""

import errno
import fcntl
import os
import select
import signal
import socket
import struct
import time
from typing import Callable, Iterable, List, Optional, Set

from . import memory, mounts
from .dm import STATUS, SUSPEND, SUSPENDED, Dm, code, request, resume_request
from .failures import HelperError

FITHAW = 0xC0045878
_MAX_NESTED = 16  # freezes of one filesystem by different tools
_INTERVAL = 0.5
_LONGEST_ROUNDS = 4096  # after it has fired: buffers are made beforehand


class Watchdog:
    """The parent's side."""

    def __init__(
        self,
        seconds: float,
        dm: Optional[Dm],
        volumes: Iterable[int],
        thaw: bool,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """Fork. ``volumes`` are the dm devices to resume, ``thaw`` whether filesystems are thawed as well; ``close``
        runs in the child and lets go of what only one process may have open."""
        descriptors = open_filesystems() if thaw else []
        try:
            ours, theirs = socket.socketpair()
            parent = os.getpid()
            self.pid = os.fork()
            if self.pid == 0:
                try:
                    ours.close()
                    close()
                    _Child(theirs, parent, dm, list(volumes), descriptors).run(seconds)
                finally:
                    os._exit(1)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        theirs.close()
        self._socket = ours
        ours.settimeout(10.0)
        if self._receive() != b"r":
            self._reap()
            raise HelperError("NoWatchdog", "the watchdog process did not start")
        memory.lock()  # the fork made our pages shared again

    @property
    def fired(self) -> bool:
        """Whether it has thawed the guest already, or is no more."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def disarm(self) -> bool:
        """End it; True when it had thawed the guest. Raises ``HelperError`` when it was lost: nobody guarded the
        freeze."""
        try:
            self._socket.sendall(b"d")
        except OSError:
            pass  # it is gone: the answer says so
        answer = self._receive()
        self._reap()
        if answer not in (b"0", b"1"):
            raise HelperError("WatchdogLost", "the watchdog process was killed")
        return answer == b"1"

    def _receive(self) -> bytes:
        """The last word on the socket: ``r`` ready, ``f`` fired, then ``0`` or ``1`` as the answer to a disarm."""
        try:
            answer = self._socket.recv(1)
            if answer == b"f":
                answer = self._socket.recv(1)
            return answer
        except OSError:
            return b""

    def _reap(self) -> None:
        self._socket.close()
        try:
            os.kill(self.pid, signal.SIGKILL)
        except OSError:
            pass
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass


def require(guard: Optional[Watchdog]) -> None:
    """Raises ``HelperError`` unless the freeze is guarded, and has not been ended by the guard."""
    if guard is None or guard.fired:
        raise HelperError("DeadmanFired" if guard else "NotArmed", "no dead-man guards the freeze")


class _Child:
    """The forked side; never returns to its caller."""

    def __init__(
        self, line: socket.socket, parent: int, dm: Optional[Dm], volumes: List[int], filesystems: List[int]
    ) -> None:
        self._line, self._parent, self._filesystems = line, parent, filesystems
        self._dm = dm.fd if dm is not None else -1
        self._status, self._suspend = code(STATUS), code(SUSPEND)
        self._blank = [bytes(request(number)) for number in volumes]
        self._resumes = [bytes(resume_request(number)) for number in volumes]
        self._buffer = bytearray(1024)

    def run(self, seconds: float) -> None:
        memory.set_name(b"vmbk-watchdog")
        memory.lock()
        with memory.Still():
            signal.pthread_sigmask(signal.SIG_BLOCK, [memory.Still.wake])
            self._line.sendall(b"r")
            self._guard(time.monotonic() + seconds)
        os._exit(0)

    def _guard(self, deadline: float) -> None:
        word = self._listen(max(0.0, deadline - time.monotonic()))
        if word == b"d":
            self._say(b"0")
            return
        if word is None:
            try:  # a suspend that waits for a disk which does not answer would keep us out as well
                os.kill(self._parent, memory.Still.wake)
            except OSError:
                pass
        self._resume()
        self._thaw()
        if word == b"":
            return
        self._say(b"f")
        for _ in range(_LONGEST_ROUNDS):
            word = self._listen(_INTERVAL)
            self._resume()
            self._thaw()
            if word == b"d":
                self._say(b"1")
            if word is not None:
                return

    def _listen(self, seconds: float) -> Optional[bytes]:
        """A word of the parent's, empty when the parent is gone, None when time is up."""
        if not select.select([self._line], [], [], seconds)[0]:
            return None
        try:
            return self._line.recv(1)
        except OSError:
            return b""

    def _say(self, word: bytes) -> None:
        try:
            self._line.send(word)
        except OSError:
            pass

    def _resume(self) -> None:
        """Resume what is suspended. Others are left alone: a resume would swap in the table that waits for T1."""
        buffer, dm = self._buffer, self._dm
        for blank, resume in zip(self._blank, self._resumes):
            try:
                buffer[:] = blank
                fcntl.ioctl(dm, self._status, buffer)
                if struct.unpack_from("=I", buffer, 28)[0] & SUSPENDED:
                    buffer[:] = resume
                    fcntl.ioctl(dm, self._suspend, buffer)
            except OSError:
                continue  # the others still have to be resumed

    def _thaw(self) -> None:
        for descriptor in self._filesystems:
            for _ in range(_MAX_NESTED):
                try:
                    fcntl.ioctl(descriptor, FITHAW, 0)
                except OSError:
                    break  # EINVAL: not frozen (any more)


def open_filesystems() -> List[int]:
    """A descriptor on each mounted filesystem that a freeze could reach: opened before it, used to thaw."""
    opened: List[int] = []
    seen: Set[str] = set()
    for mount in mounts.own_mounts():
        if mount.devno in seen:
            continue
        try:
            descriptor = os.open(mount.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                for descriptor in opened:
                    os.close(descriptor)
                raise HelperError("TooManyFilesystems", "cannot open every mounted filesystem: %s" % error.strerror)
            continue  # not there any more
        device = os.fstat(descriptor).st_dev
        if mount.fstype != "btrfs" and "%d:%d" % (os.major(device), os.minor(device)) != mount.devno:
            os.close(descriptor)  # something else is mounted over it: another mount of it may be open to us
            continue
        opened.append(descriptor)
        seen.add(mount.devno)
    return opened
