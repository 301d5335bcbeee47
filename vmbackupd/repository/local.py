"""A local directory as storage.

Order of a write: data to a file without a name (or with a temporary one where the filesystem has no ``O_TMPFILE``),
fsync, name, fsync of the directory. So an object is there whole or not at all, and what a killed writer leaves behind
is nothing, or a ``.tmp-`` file that nobody holds locked.

Everything is relative to one descriptor of the root directory: when another filesystem is mounted over it or it is
unmounted lazily, objects never land beside the repository.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vmbackupd.errors import RepositoryFull, RepositoryMissing, StorageError
from vmbackupd.repository.storage import ObjectInfo, check_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

TEMPORARY = ".tmp-"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What open(2) and link(2) answer where a filesystem has no unnamed files or no hard links.
UNSUPPORTED = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS, errno.EPERM}
RENAME_NOREPLACE = 1


class LocalStorage:
    """Objects as files below ``path``, readable by their owner only."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Nothing is opened yet; ``path`` must exist when the first object is used, unless ``create`` is called."""
        self.path = Path(path)
        self._root: int | None = None
        self._lock = threading.Lock()
        self._directories: set[str] = set()
        self._unnamed = True  # does the filesystem have O_TMPFILE? found out by trying

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[str]]:
        """Pickled by place: the copy opens it for itself."""
        return LocalStorage, (os.path.abspath(self.path),)

    def __repr__(self) -> str:
        return f"LocalStorage({str(self.path)!r})"

    @property
    def place(self) -> str:
        return str(self.path)

    def create(self) -> None:
        """Make the directory (not its parents) if it does not exist."""
        with self._errors(""):
            try:
                self.path.mkdir(mode=0o700)
            except FileExistsError:
                return
            except FileNotFoundError as reason:
                raise StorageError(
                    f"{self.path.parent} does not exist: create it or mount what belongs there"
                ) from reason
            self._sync_directory(os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def close(self) -> None:
        with self._lock:
            root, self._root = self._root, None
            self._directories.clear()
        if root is not None:
            os.close(root)

    # ---- reading

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        descriptor = self.open(name)
        with self._errors(name):
            try:
                if length is None:
                    length = max(os.fstat(descriptor).st_size - offset, 0)
                parts = []
                while length:
                    part = os.pread(descriptor, length, offset)
                    if not part:
                        break
                    parts.append(part)
                    offset += len(part)
                    length -= len(part)
                return b"".join(parts)
            finally:
                os.close(descriptor)

    def open(self, name: str) -> int:
        with self._errors(name):
            return os.open(check_name(name), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._root_descriptor())

    def stat(self, name: str) -> ObjectInfo | None:
        with self._errors(name):
            try:
                return ObjectInfo(name, os.stat(check_name(name), dir_fd=self._root_descriptor()).st_size)
            except FileNotFoundError:
                return None

    def list(self, prefix: str, *, sizes: bool = True) -> Iterator[ObjectInfo]:
        first, _, rest = prefix.partition("/")
        with self._errors(prefix):
            yield from self._list(check_name(first), rest, sizes)

    def _list(self, directory: str, prefix: str, sizes: bool) -> Iterator[ObjectInfo]:
        """Files below ``directory`` whose path relative to it begins with ``prefix``."""
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._root_descriptor())
        except FileNotFoundError:
            return
        first, deeper, rest = prefix.partition("/")
        try:
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    name = f"{directory}/{entry.name}"
                    if entry.name.startswith(TEMPORARY) or not entry.name.startswith(first):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if not deeper or entry.name == first:
                            yield from self._list(name, rest, sizes)
                    elif not deeper and entry.is_file(follow_symlinks=False):
                        with contextlib.suppress(FileNotFoundError):  # deleted by somebody else meanwhile
                            yield ObjectInfo(name, entry.stat(follow_symlinks=False).st_size if sizes else -1)
        finally:
            os.close(descriptor)

    def free_bytes(self) -> int:
        with self._errors(""):
            figures = os.fstatvfs(self._root_descriptor())
        return figures.f_bavail * figures.f_frsize

    # ---- writing

    def put_if_absent(self, name: str, parts: Iterable[Buffer]) -> bool:
        descriptor, taken = self._write(name, parts, lock=False)
        os.close(descriptor)
        return taken

    def delete(self, name: str) -> bool:
        with self._errors(name):
            root = self._root_descriptor()
            try:
                os.unlink(check_name(name), dir_fd=root)
            except FileNotFoundError:
                return False
            self._sync_directory(os.open(_parent(name), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root))
            return True

    def delete_many(self, names: Iterable[str]) -> int:
        count, directories = 0, set()
        root = self._root_descriptor()
        try:
            for name in names:
                with self._errors(name), contextlib.suppress(FileNotFoundError):
                    os.unlink(check_name(name), dir_fd=root)
                    directories.add(_parent(name))
                    count += 1
        finally:
            for directory in directories:
                with self._errors(directory):
                    self._sync_directory(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root))
        return count

    def renew(self, names: Iterable[str]) -> int:
        return 0

    def _write(self, name: str, parts: Iterable[Buffer], *, lock: bool) -> tuple[int, bool]:
        """Write and name an object: its open descriptor, and False if the name was taken."""
        try:
            with self._errors(name):
                return self._write_and_name(name, parts, lock)
        except FileNotFoundError as reason:
            self._directories.clear()
            raise StorageError(f"{self.path / name}: its directory was removed") from reason

    def _write_and_name(self, name: str, parts: Iterable[Buffer], lock: bool) -> tuple[int, bool]:
        root = self._root_descriptor()
        directory = self._directory(root, _parent(check_name(name)))
        descriptor, temporary = self._temporary(root, directory)
        try:
            if lock:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
            taken = self._name(root, descriptor, temporary, name)
            self._sync_directory(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root))
        except BaseException:
            os.close(descriptor)
            raise
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=root)
        return descriptor, taken

    def _temporary(self, root: int, directory: str) -> tuple[int, str | None]:
        """A file to write to, and its name if it has one."""
        if self._unnamed:
            try:
                return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=root), None
            except OSError as reason:
                if reason.errno not in UNSUPPORTED:
                    raise
                self._unnamed = False
        temporary = f"{directory}/{TEMPORARY}{secrets.token_hex(8)}"
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=root)
        # Held while it is written: see remove_temporaries(). A filesystem without locks keeps its leftovers.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return descriptor, temporary

    def _name(self, root: int, descriptor: int, temporary: str | None, name: str) -> bool:
        """Give the written file its name, atomically and only if nothing has it; False if something has."""
        source = temporary if temporary is not None else f"/proc/self/fd/{descriptor}"
        try:
            # follow_symlinks with a dst_dir_fd: linkat(AT_SYMLINK_FOLLOW), the way to name an unnamed file
            os.link(source, name, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=temporary is None)
            return True
        except FileExistsError:
            return False
        except OSError as reason:
            if temporary is None or reason.errno not in UNSUPPORTED | {errno.EMLINK}:
                raise
        return _rename_if_absent(root, temporary, name)

    def _directory(self, root: int, directory: str) -> str:
        """Make sure the directory of an object is there, durably."""
        if directory not in self._directories and directory != ".":
            above = _parent(directory)
            self._directory(root, above)
            with contextlib.suppress(FileExistsError):
                os.mkdir(directory, 0o700, dir_fd=root)
            self._sync_directory(os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root))
            self._directories.add(directory)
        return directory

    # ---- claims and leftovers

    @property
    def certain_ends(self) -> bool:
        return True  # the kernel drops the lock of a process that ended, and of no other

    def claim(self, name: str, data: bytes) -> LocalClaim:
        descriptor, taken = self._write(name, [data], lock=True)
        if not taken:
            os.close(descriptor)
            raise StorageError(f"{self.path / name} exists already")
        return LocalClaim(self, name, descriptor)

    def abandoned(self, name: str) -> bool:
        try:
            descriptor = self.open(name)
        except FileNotFoundError:
            return False  # it was released: whoever made it ended in good order
        try:
            # without a name: it was released after we opened it, and its maker ended in good order
            return _lock_is_free(descriptor) and os.fstat(descriptor).st_nlink > 0
        finally:
            os.close(descriptor)

    def remove_temporaries(self) -> int:
        count = 0
        with self._errors(""):
            root = self._root_descriptor()
            for _directory, _, files, handle in os.fwalk(".", dir_fd=root):
                for file in files:
                    if not file.startswith(TEMPORARY):
                        continue
                    try:
                        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=handle)
                    except FileNotFoundError:
                        continue
                    try:
                        if _lock_is_free(descriptor):
                            os.unlink(file, dir_fd=handle)
                            count += 1
                    except FileNotFoundError:
                        pass
                    finally:
                        os.close(descriptor)
        return count

    # ---- helpers

    def __del__(self) -> None:
        if self._root is not None:
            os.close(self._root)

    def _root_descriptor(self) -> int:
        with self._lock:
            if self._root is None:
                try:
                    self._root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except (FileNotFoundError, NotADirectoryError) as reason:
                    raise RepositoryMissing(
                        f"{self.path} does not exist: mount it, or make a repository with `vmbackupctl repository init`"
                    ) from reason
            return self._root

    @staticmethod
    def _sync_directory(descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turns what the filesystem says into the errors of the interface."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as reason:
            message = f"{self.path / name}: {reason.strerror or reason}"
            if reason.errno in FULL:
                raise RepositoryFull(message) from reason
            raise StorageError(message) from reason


class LocalClaim:
    """A file that is locked as long as this process lives."""

    def __init__(self, storage: LocalStorage, name: str, descriptor: int) -> None:
        self._storage = storage
        self._name = name
        self._descriptor: int | None = descriptor

    def __del__(self) -> None:
        # A claim that nobody holds any more is abandoned, though its process lives on.
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @property
    def lost(self) -> bool:
        descriptor = self._descriptor
        try:
            return descriptor is None or os.fstat(descriptor).st_nlink == 0
        except OSError:
            return True

    def release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            try:
                self._storage.delete(self._name)
            finally:
                os.close(descriptor)


def _parent(name: str) -> str:
    return name.rpartition("/")[0] or "."


def _lock_is_free(descriptor: int) -> bool:
    """Does nobody hold this file locked? False where the filesystem has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _rename_if_absent(root: int, source: str, target: str) -> bool:
    """renameat2(RENAME_NOREPLACE), which Python does not have; False if the target exists."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(root, os.fsencode(source), root, os.fsencode(target), RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    raise OSError(code, os.strerror(code))
