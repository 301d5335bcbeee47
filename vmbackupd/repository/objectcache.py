"""Copies of immutable objects in a local directory, so that each is downloaded once.

Whatever is in it may be removed at any time, by anybody. Several processes may share it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

from vmbackupd.errors import StorageError

YOUNG = 3600.0  # seconds in which a file that is not in a listing may be newer than the listing


class ObjectCache:
    """Files below ``directory``, named as their objects. It is made when it is needed, for its owner only."""

    def __init__(self, directory: Path | None) -> None:
        """Without a directory every ``open`` gets a fresh temporary file."""
        self.directory = directory

    def open(self, name: str, download: Callable[[int], None]) -> int:
        """A descriptor to read an object from; ``download`` writes the object to the descriptor it is given if there is
        no copy yet. StorageError, and what ``download`` raises."""
        if self.directory is None:
            return self._unnamed(download)
        path = self.directory / name
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return self._add(path, download)
        except OSError as reason:
            raise StorageError(f"cache {path}: {reason.strerror}") from reason

    def forget(self, name: str) -> None:
        """Remove the copy of an object, if there is one."""
        if self.directory is not None:
            with contextlib.suppress(OSError):
                (self.directory / name).unlink()

    def keep_only(self, part: str, names: Collection[str]) -> None:
        """Remove copies of objects in directory ``part`` that are none of ``names``, what the store lists."""
        if self.directory is None:
            return
        with contextlib.suppress(OSError), os.scandir(self.directory / part) as entries:
            for entry in entries:
                if f"{part}/{entry.name}" not in names and time.time() - entry.stat().st_mtime > YOUNG:
                    os.unlink(entry.path)

    def _unnamed(self, download: Callable[[int], None]) -> int:
        directory = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None  # /tmp is memory on many hosts
        try:
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                download(file.fileno())
                return os.dup(file.fileno())
        except OSError as reason:
            if isinstance(reason, FileNotFoundError):
                raise
            raise StorageError(f"temporary file in {directory or tempfile.gettempdir()}: {reason}") from reason

    def _add(self, path: Path, download: Callable[[int], None]) -> int:
        """Download to a file beside, then name it: a copy is whole or not there."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            for directory in (*reversed(path.parent.parents), path.parent):  # mkdir(parents=True) forgets the mode
                if not directory.exists():
                    directory.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as reason:
            raise StorageError(f"cache {path.parent}: {reason.strerror}") from reason
        try:
            download(descriptor)
            os.rename(temporary, path)
            return descriptor
        except BaseException as reason:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(reason, OSError) and not isinstance(reason, FileNotFoundError):
                raise StorageError(f"cache {path}: {reason.strerror}") from reason
            raise
