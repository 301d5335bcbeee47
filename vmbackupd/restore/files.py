"""The directories a restore makes, and the domain's small files, with their way back."""

from __future__ import annotations

import logging
import os

from vmbackupd.host.newfile import NewFile, OnEffect, Withdraw, sync
from vmbackupd.restore.check import missing_directories
from vmbackupd.restore.plan import RestorePlan

log = logging.getLogger("restore.files")


class WrittenFiles:
    """What is written besides volumes. :meth:`remove` takes back all that was done so far."""

    def __init__(self, plan: RestorePlan, on_effect: OnEffect) -> None:
        self._plan = plan
        self._on_effect = on_effect
        self._directories: list[tuple[str, Withdraw]] = []
        self._files: list[NewFile] = []

    def make_directories(self) -> None:
        """Make the plan's directories. QEMU runs as a user of its own and has to pass through; the images in them are
        for their owner only."""
        for path in self._plan.directories:
            self._make_directory(path, 0o755)

    def write(self, blobs: dict[str, bytes]) -> None:
        """Write the plan's files from ``blobs`` (blob id -> content), and its command, under their part names."""
        for blob in self._plan.blobs:
            for missing in missing_directories(os.path.dirname(blob.path)):
                self._make_directory(missing, 0o711)
            self._write(blob.path, blobs[blob.blob], 0o600)
        command = self._plan.command
        if command is not None and command.path is not None:
            self._write(command.path, command.text.encode(), 0o700)

    def _write(self, path: str, content: bytes, mode: int) -> None:
        file = NewFile(path, os.path.lexists(path), self._on_effect)
        with open(file.reserve(), "wb") as out:
            self._files.append(file)
            out.write(content)
            out.flush()
            os.fchmod(out.fileno(), mode)
            os.fsync(out.fileno())

    def rename(self) -> None:
        """Give the files their names."""
        for file in self._files:
            file.rename()

    def keep(self) -> None:
        """The restore is complete: nothing of this is to be undone any more."""
        for file in self._files:
            file.keep()
        while self._directories:
            self._directories.pop()[1]()

    def remove(self) -> None:
        """Remove the files and directories that were made."""
        for file in self._files:
            file.remove()
        for path, withdraw in reversed(self._directories):
            try:
                os.rmdir(path)
            except OSError as error:
                log.error("directory %s could not be removed: %s", path, error)
                continue
            withdraw()
        self._directories.clear()

    def _make_directory(self, path: str, mode: int) -> None:
        withdraw = self._on_effect("rmdir", path)
        try:
            os.mkdir(path, 0o700)
            os.chmod(path, mode)  # whatever the daemon's umask is
        except FileExistsError:
            withdraw()  # somebody else's by now
        except OSError:
            withdraw()
            raise
        else:
            self._directories.append((path, withdraw))
            sync(os.path.dirname(path))
