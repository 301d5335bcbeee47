"""The bpf(2) system call (linux/bpf.h): maps that are shared with programs through memory, programs on raw
tracepoints, and their pins in bpffs."""

import ctypes
import errno
import mmap
import os
import platform
import struct
from typing import Any, NamedTuple, Tuple

from .failures import HelperError

_NUMBERS = {  # bpf, membarrier
    "x86_64": (321, 324),
    "aarch64": (280, 283),
    "riscv64": (280, 283),
    "ppc64le": (361, 365),
}
_MAP_CREATE, _UPDATE, _PROG_LOAD, _PIN, _GET = 0, 2, 5, 6, 7
_INFO, _RAW_TRACEPOINT_OPEN = 15, 17
_ARRAY, _PROGRAMS, _RAW_TRACEPOINT = 2, 3, 17
_MMAPABLE = 1 << 10
_LICENCE = b"Dual BSD/GPL"  # bpf_probe_read_kernel is given to programs under the GPL only
_LOG = 1 << 20
_NAME = 16
_MEMBARRIER_GLOBAL = 1

_libc = ctypes.CDLL(None, use_errno=True)


class MapInfo(NamedTuple):
    """A map of this kernel: ``ident`` is its number until the next boot."""

    kind: int
    ident: int
    key_size: int
    value_size: int
    entries: int
    flags: int

    def is_array(self, value_size: int, entries: int) -> bool:
        """Whether ``create_array`` makes such a map."""
        return self[0] == _ARRAY and self[2:] == (4, value_size, entries, _MMAPABLE)


def create_array(name: str, value_size: int, entries: int) -> int:
    """The descriptor of a new array map that can be mapped into memory. Raises ``OSError``."""
    attributes = struct.pack("=5I8x16s", _ARRAY, 4, value_size, entries, _MMAPABLE, name.encode()[: _NAME - 1])
    return _bpf(_MAP_CREATE, attributes)


def create_jump(name: str, program: int) -> int:
    """The descriptor of a map through which other programs go on with ``program``. Raises ``OSError``.

    The kernel empties it with its last descriptor and pin."""
    jump = _bpf(_MAP_CREATE, struct.pack("=5I8x16s", _PROGRAMS, 4, 4, 1, 0, name.encode()[: _NAME - 1]))
    key, value = ctypes.c_uint32(0), ctypes.c_uint32(program)
    try:
        _bpf(_UPDATE, struct.pack("=I4xQQQ", jump, ctypes.addressof(key), ctypes.addressof(value), 0))
    except BaseException:
        os.close(jump)
        raise
    return jump


def map_memory(descriptor: int, length: int) -> mmap.mmap:
    """The values of an array map, one after the other, as memory that the kernel's programs see. Never paged out."""
    return mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def load(name: str, code: bytes) -> int:
    """The descriptor of a program for a raw tracepoint. Raises ``HelperError`` with the end of the verifier's log."""
    try:
        return _load(name, code, None)
    except OSError as error:
        log = ctypes.create_string_buffer(_LOG)
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.EPERM, errno.E2BIG):
            raise
        try:
            return _load(name, code, log)
        except OSError:
            said = " ".join(log.value.decode("utf-8", "replace").split("\n")[-6:]).strip()[-600:]
            raise HelperError("NoTracking", "the kernel refuses the program %s: %s %s" % (name, error.strerror, said))


def attach(program: int, event: str) -> int:
    """The descriptor of a link that runs ``program`` at the tracepoint; it ends with its last descriptor and pin."""
    name = ctypes.create_string_buffer(event.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI4x", ctypes.addressof(name), program))


def pin(descriptor: int, path: str) -> None:
    """Keep a map or link alive under a name in bpffs. Raises ``OSError``."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_PIN, struct.pack("=QII", ctypes.addressof(name), descriptor, 0))


def get(path: str) -> int:
    """The descriptor of what is pinned. Raises ``OSError``."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_GET, struct.pack("=QII", ctypes.addressof(name), 0, 0))


def map_info(descriptor: int) -> MapInfo:
    """What kind of map this is. Raises ``OSError``."""
    return MapInfo(*struct.unpack_from("=6I", _info(descriptor, 80)))


def wait_for_programs() -> None:
    """Return when every program that was running has ended. Raises ``OSError`` where the kernel cannot tell."""
    _call(_numbers()[1], _MEMBARRIER_GLOBAL, 0, 0)


def mount(path: str) -> None:
    """Mount a bpffs on a directory, where there is none. Raises ``HelperError``, ``OSError``."""
    if not os.path.isdir(path):
        raise HelperError("NoTracking", "the guest's kernel was built without BPF: there is no %s" % path)
    with open("/proc/self/mounts", "rb") as file:
        if any(line.split(b" ")[1:3] == [os.fsencode(path), b"bpf"] for line in file):
            return
    if _libc.mount(b"bpf", os.fsencode(path), b"bpf", 0, None) != 0:
        raise HelperError("NoTracking", "cannot mount bpffs on %s: %s" % (path, os.strerror(ctypes.get_errno())))


def _load(name: str, code: bytes, log: Any) -> int:
    text, licence = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(_LICENCE)
    attributes = struct.pack(
        "=IIQQIIQII16s",
        _RAW_TRACEPOINT,
        len(code) // 8,
        ctypes.addressof(text),
        ctypes.addressof(licence),
        1 if log is not None else 0,
        len(log) if log is not None else 0,
        ctypes.addressof(log) if log is not None else 0,
        0,
        0,
        name.encode()[: _NAME - 1],
    )
    return _bpf(_PROG_LOAD, attributes)


def _info(descriptor: int, length: int) -> bytes:
    """The kernel's description of an object, zeros where it knows less than ``length`` bytes."""
    info = ctypes.create_string_buffer(length)
    _bpf(_INFO, struct.pack("=IIQ", descriptor, length, ctypes.addressof(info)))
    return info.raw


def _bpf(command: int, attributes: bytes) -> int:
    return _call(_numbers()[0], command, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes))


def _numbers() -> Tuple[int, int]:
    try:
        return _NUMBERS[platform.machine()]
    except KeyError:
        raise HelperError("NoTracking", "tracking is not made for %s" % platform.machine())


def _call(number: int, *arguments: object) -> int:
    result = _libc.syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(result)
