"""The locks QEMU holds on the image files it has open: OFD locks on single bytes, one a permission."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

# Lock bytes at 100..199 tell which permissions are in use, those at 200..299 which ones are not shared with others:
# block/file-posix.c. The bits of permissions: include/block/block-common.h.
_USED, _NOT_SHARED = 100, 200
_WRITE, _RESIZE = 1, 3
_F_OFD_GETLK = 36  # include/uapi/asm-generic/fcntl.h; not in Python's fcntl before 3.14
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


def lock_users(fd: int) -> list[str]:
    """Whether a QEMU process has the file open: it holds locks as long as it does. ``fd`` must be open for reading."""
    return ["a QEMU process has it open"] if _locked(fd, _USED, 100) or _locked(fd, _NOT_SHARED, 100) else []


def lock_writers(fd: int) -> list[str]:
    """Whether a QEMU process may write to the file, or resize it."""
    return ["a QEMU process writes to it"] if any(_locked(fd, _USED + bit, 1) for bit in (_WRITE, _RESIZE)) else []


def _locked(fd: int, start: int, length: int) -> bool:
    query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        answer = fcntl.fcntl(fd, _F_OFD_GETLK, query)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            return False  # a filesystem without such locks, where QEMU cannot hold them either
        raise
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
