"""A file that a restore or an export makes: written beside its final name, given that name when all of it is complete.

So a half-written file never bears the name it is to have, and a file that is replaced stays whole when the work fails.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from vmbackupd.errors import TargetRefused

PART = ".part"  # a file has this after its name until it is complete

log = logging.getLogger("host.newfile")

Withdraw = Callable[[], None]

#: Told of an effect before it happens: the name of its undo (``unlink``, ``rmdir``, ``undefine``) and what to undo.
#: Returns a function that withdraws it, called when the effect did not happen (the file is somebody else's) or is
#: undone already.
OnEffect = Callable[[str, str], Withdraw]


class NewFile:
    """The file that will be ``path``. ``replace``: whether something may be there already."""

    def __init__(self, path: str, replace: bool, on_effect: OnEffect) -> None:
        self.path = path
        self.part = path + PART
        self._replace = replace
        self._on_effect = on_effect
        self._ours: dict[str, Withdraw] = {}

    def reserve(self) -> int:
        """Make the part file, empty, readable by root only; returns a file descriptor that writes to it."""
        withdraw = self._on_effect("unlink", self.part)
        try:
            # Exclusive: two restores to one place must not write into each other's file, nor through somebody's link.
            fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            withdraw()
            raise TargetRefused(f"{self.part} cannot be made ({error.strerror})") from error
        self._ours[self.part] = withdraw
        return fd

    def rename(self) -> None:
        """Give the complete file its name, durably."""
        if self._replace:
            os.rename(self.part, self.path)
        else:
            self._take_name()
        self._ours.pop(self.part)()
        sync(os.path.dirname(self.path))

    def _take_name(self) -> None:
        """Rename without ever replacing a file that has come up meanwhile: an empty file of ours takes the name
        first."""
        withdraw = self._on_effect("unlink", self.path)
        try:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        except OSError as error:
            withdraw()
            raise TargetRefused(f"{self.path} cannot be made ({error.strerror}); it was not there when the work began:"
                                " move it away and try again") from error
        self._ours[self.path] = withdraw
        os.rename(self.part, self.path)

    def keep(self) -> None:
        """The work is complete: nothing of this file is to be undone any more."""
        for path in list(self._ours):
            self._ours.pop(path)()

    def remove(self) -> None:
        """Remove what is ours of it. What cannot be removed is logged and left to the caller's undo."""
        for path, withdraw in list(self._ours.items()):
            try:
                os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.error("%s could not be removed: %s", path, error)
                continue
            del self._ours[path]
            withdraw()


def sync(path: str | Path) -> None:
    """Make a file, or the names in a directory, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
