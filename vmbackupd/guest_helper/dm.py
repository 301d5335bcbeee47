"""Device-mapper through its ioctls (linux/dm-ioctl.h), without processes and without udev.

A request's buffer is used once: the kernel writes name and uuid into it, and refuses a second use with EINVAL. Devices
are addressed by number, because names may hold anything and udev's nodes lag behind.
"""

import contextlib
import errno
import fcntl
import os
import struct
import time
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence

from .failures import HelperError

LIST_DEVICES, CREATE, REMOVE, SUSPEND, STATUS, LOAD, CLEAR, TABLE, LIST_VERSIONS = 2, 3, 4, 6, 7, 9, 10, 12, 13
MESSAGE = 14

READONLY = 1 << 0
SUSPENDED = 1 << 1
STATUS_TABLE = 1 << 4
ACTIVE_PRESENT = 1 << 5
INACTIVE_PRESENT = 1 << 6
BUFFER_FULL = 1 << 8
SKIP_LOCKFS = 1 << 10
NOFLUSH = 1 << 11
QUERY_INACTIVE = 1 << 12
SECURE_DATA = 1 << 15

NO_UDEV_RULES = (0x1 | 0x2 | 0x4 | 0x8) << 16
"""Event number that tells udev's rules to leave a device alone. For our own devices only: on a volume's own resume
it would take the volume's /dev/mapper link away."""

_CONTROL = "/dev/mapper/control"
_HEADER = struct.Struct("=3I5i2IQ128s129s7x")
_TARGET = struct.Struct("=QQiI16s")
_SMALL = 1024
_LIMIT = 16 << 20


class Target(NamedTuple):
    """A row of a table: ``length`` sectors from ``start`` are mapped by ``kind`` with ``params``."""

    start: int
    length: int
    kind: str
    params: str


class Info(NamedTuple):
    """A device as DM_DEV_STATUS shows it. ``number`` is the kernel's encoding, ``flags`` the ioctl's."""

    name: str
    uuid: str
    number: int
    flags: int
    open_count: int

    @property
    def devno(self) -> str:
        return devno_of(self.number)

    @property
    def suspended(self) -> bool:
        return bool(self.flags & SUSPENDED)

    @property
    def inactive(self) -> bool:
        """Whether a table waits in the inactive slot."""
        return bool(self.flags & INACTIVE_PRESENT)

    @property
    def active(self) -> bool:
        """Whether a table is live."""
        return bool(self.flags & ACTIVE_PRESENT)


def devno_of(number: int) -> str:
    """``major:minor`` of a device number as the kernel encodes it."""
    return "%d:%d" % ((number >> 8) & 0xFFF, (number & 0xFF) | ((number >> 12) & 0xFFF00))


def number_of(devno: str) -> int:
    """The kernel's encoding of ``major:minor``."""
    major, minor = (int(part) for part in devno.split(":"))
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def request(
    number: int = 0,
    flags: int = 0,
    name: str = "",
    uuid: str = "",
    rows: Sequence[Target] = (),
    event: int = 0,
    size: int = _SMALL,
) -> bytearray:
    """The buffer of one ioctl on the device ``number`` (or ``name``, where there is no number yet)."""
    payload = b"".join(_row(row) for row in rows)
    size = max(size, (_HEADER.size + len(payload) + 4095) & ~4095) if payload else size
    head = _HEADER.pack(
        4, 0, 0, size, _HEADER.size, len(rows), 0, flags, event, 0, number, name.encode(), uuid.encode()
    )
    return bytearray((head + payload).ljust(size, b"\0"))


def code(command: int) -> int:
    """The number of an ioctl: _IOWR(0xfd, command, struct dm_ioctl)."""
    return (3 << 30) | (_HEADER.size << 16) | (0xFD << 8) | command


def _row(row: Target) -> bytes:
    text = row.params.encode() + b"\0"
    text = text.ljust((len(text) + 7) & ~7, b"\0")
    return _TARGET.pack(row.start, row.length, 0, _TARGET.size + len(text), row.kind.encode()) + text


def present() -> bool:
    """Whether the kernel has device-mapper, loaded. Where it has not, there is nothing of ours in it."""
    return os.path.exists("/sys/class/misc/device-mapper/dev")


class Dm:
    """The open control device."""

    def __init__(self) -> None:
        try:
            self.fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise HelperError("NoDeviceMapper", "cannot open %s: %s" % (_CONTROL, error.strerror))

    def close(self) -> None:
        os.close(self.fd)

    @contextlib.contextmanager
    def alone(self, seconds: float = 60.0) -> Iterator[None]:
        """Keep other processes of ours out: two releases would take devices from under each other."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise HelperError("Busy", "another helper is still cleaning up")
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(self.fd, fcntl.LOCK_UN)

    def call(self, command: int, buffer: bytearray) -> bytearray:
        """One ioctl; ``buffer`` then holds the reply."""
        fcntl.ioctl(self.fd, code(command), buffer)
        return buffer

    def devices(self) -> List[Info]:
        """Every device, with or without a table (sysfs shows only those that had one)."""
        reply, found = self._grown(LIST_DEVICES, 0, 0), []
        at = _data_start(reply)
        while True:
            number, following = struct.unpack_from("=QI", reply, at)
            if number:
                try:
                    found.append(self.info(number))
                except OSError as error:
                    if error.errno != errno.ENXIO:
                        raise  # ENXIO: removed meanwhile
            if not following:
                return found
            at += following

    def info(self, number: int) -> Info:
        """The device's names and state. Raises ``OSError`` ENXIO when there is none."""
        return _info(self.call(STATUS, request(number)))

    def table(self, number: int, inactive: bool = False) -> List[Target]:
        """The live table, or the one in the inactive slot."""
        flags = STATUS_TABLE | (QUERY_INACTIVE if inactive else 0)
        return _rows(self._grown(TABLE, number, flags))

    def status(self, number: int) -> List[Target]:
        """The status of each target, in the place of its parameters. Flushes nothing."""
        return _rows(self._grown(TABLE, number, NOFLUSH))

    def targets(self) -> Dict[str, bool]:
        """The target types the kernel has loaded."""
        reply, found = self._grown(LIST_VERSIONS, 0, 0), {}
        at = _data_start(reply)
        while at + 16 <= len(reply):
            following = struct.unpack_from("=I", reply, at)[0]
            found[_text(reply, at + 16)] = True
            if not following:
                break
            at += following
        return found

    def create(self, name: str, uuid: str, rows: Sequence[Target], flags: int = 0) -> int:
        """Make a device of our own with a live table; returns its number."""
        made = _info(self.call(CREATE, request(0, flags, name, uuid, event=NO_UDEV_RULES)))
        self.load(made.number, rows, flags)
        self.call(SUSPEND, request(made.number, flags | SKIP_LOCKFS, event=NO_UDEV_RULES))  # without SUSPENDED: resume
        return made.number

    def load(self, number: int, rows: Sequence[Target], flags: int = 0) -> None:
        """Put a table into the inactive slot."""
        if any(row.kind == "crypt" for row in rows):
            flags |= SECURE_DATA  # the kernel wipes its copy of the key
        self.call(LOAD, request(number, flags, rows=rows))

    def clear(self, number: int) -> None:
        """Empty the inactive slot."""
        self.call(CLEAR, request(number))

    def remove(self, number: int, seconds: float = 15.0) -> None:
        """Remove a device of ours. One that udev still looks at is busy for a moment; none any more is no error."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                self.call(REMOVE, request(number, event=NO_UDEV_RULES))
                return
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)

    def _grown(self, command: int, number: int, flags: int) -> bytearray:
        """The reply of a command whose size is not known beforehand."""
        size = 16384
        while True:
            reply = self.call(command, request(number, flags, size=size))
            if not struct.unpack_from("=I", reply, 28)[0] & BUFFER_FULL:
                return reply
            if size >= _LIMIT:
                raise HelperError("TableTooLong", "device %s has a table of over %d bytes" % (devno_of(number), _LIMIT))
            size *= 8


def suspend_request(number: int) -> bytearray:
    """A suspend that waits for what is in flight and leaves filesystems alone (see ``snapshot``)."""
    return request(number, SUSPENDED | SKIP_LOCKFS)


def resume_request(number: int) -> bytearray:
    """A resume. It also swaps in a table that waits in the inactive slot, suspending the device for it if it is not
    suspended: hence no lockfs here either."""
    return request(number, SKIP_LOCKFS)


def message_request(number: int, text: str) -> bytearray:
    """A message to the target of a device that has one target."""
    buffer = request(number)
    payload = struct.pack("=Q", 0) + text.encode() + b"\0"
    buffer[_HEADER.size : _HEADER.size + len(payload)] = payload
    return buffer


def _info(reply: bytearray) -> Info:
    open_count, flags = struct.unpack_from("=iI", reply, 24)
    number = struct.unpack_from("=Q", reply, 40)[0]
    return Info(_text(reply, 48, 128), _text(reply, 176, 129), number, flags, open_count)


def _rows(reply: bytearray) -> List[Target]:
    start, count = struct.unpack_from("=II", reply, 16)
    rows, at = [], start
    for _ in range(count):
        first, length, _, following, kind = _TARGET.unpack_from(reply, at)
        rows.append(Target(first, length, kind.rstrip(b"\0").decode(), _text(reply, at + _TARGET.size)))
        at = start + following
    return rows


def _data_start(reply: bytearray) -> int:
    start: int = struct.unpack_from("=I", reply, 16)[0]
    return start


def _text(reply: bytearray, at: int, limit: Optional[int] = None) -> str:
    end = reply.find(b"\0", at)
    if limit is not None:
        end = min(end, at + limit)
    return reply[at:end].decode("utf-8", "replace").strip()
