"""One daemon for each state directory: two would undo each other's work."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from vmbackupd.errors import BackupError


class AlreadyRunning(BackupError):
    """Another daemon works with the same state directory."""

    code = "AlreadyRunning"


class StateLock:
    """An exclusive lock on a state directory, held as a context manager. The kernel drops it when the process dies.

    Raises :class:`AlreadyRunning` on entry when somebody holds it, ``OSError`` when the file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._fd = -1

    def __enter__(self) -> StateLock:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(fd, 32).decode("ascii", "replace").strip()
            os.close(fd)
            raise AlreadyRunning(f"another vmbackupd (process {holder or '?'}) uses {self._path.parent}; give this"
                                 " one another --state-directory") from None
        except OSError:
            os.close(fd)
            raise
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self._fd = fd
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        # The file stays: removing it would let a second daemon lock a new file while a third waits for this one.
        os.close(self._fd)
