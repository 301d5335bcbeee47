"""Files of the guest's administrator: read as they are, replaced whole or not at all."""

import os
import shutil


def read(path: str) -> str:
    """A text file, with whatever bytes are in it; empty where there is none."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def write(path: str, text: str) -> None:
    """Make or replace a file, durably. One that is there gives the new one its mode, owner and label; a link stays."""
    path = os.path.realpath(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    fresh = "%s.vmbackupd-%d" % (path, os.getpid())
    try:
        with open(fresh, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
            file.flush()
            if os.path.exists(path):
                shutil.copystat(path, fresh)
                owner = os.stat(path)
                os.chown(fresh, owner.st_uid, owner.st_gid)
            os.fsync(file.fileno())
        os.rename(fresh, path)
    except BaseException:
        remove(fresh)
        raise
    _sync(os.path.dirname(path))


def remove(path: str) -> None:
    """Remove a file; none is no error."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    _sync(os.path.dirname(path))


def _sync(directory: str) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
