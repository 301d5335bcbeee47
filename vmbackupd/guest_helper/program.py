"""The program that the kernel runs at a block tracepoint: it marks the chunks of one disk that a request touches.

Raw tracepoints are used, not the formatted ones: those are skipped, uncounted before Linux 6.7, while any other program
is traced on the same CPU, and show a partition's number and one range where a request may have many. A raw one is only
ever skipped when it interrupts itself.
"""

import struct
from typing import Dict, List, NamedTuple, Optional, Tuple

from .btf import Types
from .failures import HelperError

CHUNK, GROUP, PAGE = 16, 7, 12
"""Logarithms: bytes of a chunk, chunks of a group, bytes of a map's value."""

PASSED, BEYOND, LOST = 0, 1, 2
"""Flags of a side: a command that is not the block layer's own, a place behind the disk's end, a request that could not
be followed to its end. After each of them the whole disk counts as changed."""

SWITCH, UNKNOWN, SWITCH_SIZE = 0, 8, 16
"""What is in the value of the map that all programs share: the number of the active side, and a zero."""

FLAGS = 8  # bytes kept for the flags of a side

REQUESTS = ("block_rq_issue", "block_rq_complete")
BIOS = ("block_bio_queue", "block_bio_complete")

_READ, _FLUSH, _DISCARD = 0, 2, 3
_IN, _OUT = (34, 32), (35, 33)  # commands of drivers: DRV_IN, DRV_OUT, and SCSI's own before Linux 5.14
_ROUNDS = 768  # a request has less than 4 GiB: 512 groups and two ends
_LOOKUP, _TAIL_CALL, _PROBE_READ = 1, 12, 113
_R0, _R1, _R2, _R3, _R6, _R7, _R8, _R9, _FP = 0, 1, 2, 3, 6, 7, 8, 9, 10
_KEY, _OP, _WORD, _AT, _NEXT, _SIDE = -8, -16, -24, -32, -40, -48  # on the stack
_BYTES = {1: 0x10, 4: 0x00, 8: 0x18}
_JUMPS = {"": 0x05, "==": 0x15, "!=": 0x55, ">=": 0x35, "<": 0xA5, "signed <": 0xC5}
_SUMS = {"+": 0x07, "-": 0x17, "*": 0x27, "&": 0x57, "<<": 0x67, ">>": 0x77, "=": 0xB7}
_BY_REGISTER = 0x08


class Disk(NamedTuple):
    """What a program is made for. ``chunks`` is the disk's size. ``marks`` and ``switch`` are the maps' descriptors;
    ``fine`` and ``coarse`` are where side 0 keeps a byte for each chunk and for each group in the first, and side 1
    lies ``stride`` bytes further. ``scattered``: a discard of this disk may have many ranges."""

    major: int
    minor: int
    chunks: int
    marks: int
    switch: int
    fine: int
    coarse: int
    stride: int
    scattered: bool


class Event(NamedTuple):
    """Which argument of an event is looked at, and the offsets in it: the pointers that lead to the disk, the
    operation, the range (sectors, bytes), and a request's list of bios."""

    argument: int
    disk: List[int]
    op: int
    sector: int
    length: int
    bios: Optional[int]


class Fields:
    """Where the kernel keeps what a program looks at. All methods raise ``HelperError`` where it is not."""

    def __init__(self, types: Types) -> None:
        self._types = types
        self.major, self.minor = self._need("gendisk", "major"), self._need("gendisk", "first_minor")
        self.sector, self.length = self._need("bio", "bi_iter", "bi_sector"), self._need("bio", "bi_iter", "bi_size")
        self.next = self._need("bio", "bi_next")

    def of(self, event: str) -> Event:
        """Those of one event."""
        kind = "request" if event in REQUESTS else "bio"
        argument = self._types.argument(event, kind)
        if argument is None:
            raise HelperError("NoTracking", "the guest's kernel has no tracepoint %s with a %s" % (event, kind))
        if kind == "bio":
            way = self._way(("bio", "bi_disk"), ("bio", "bi_bdev"), ("block_device", "bd_disk"))
            return Event(argument, way, self._need("bio", "bi_opf"), self.sector, self.length, None)
        way = self._way(("request", "rq_disk"), ("request", "q"), ("request_queue", "disk"))
        op, sector, length = (self._need("request", name) for name in ("cmd_flags", "__sector", "__data_len"))
        return Event(argument, way, op, sector, length, self._need("request", "bio"))

    def _way(self, direct: Tuple[str, str], *pointers: Tuple[str, str]) -> List[int]:
        """Newer kernels have another struct between a request or bio and its disk."""
        offset = self._types.offset(*direct)
        return [offset] if offset is not None else [self._need(*pointer) for pointer in pointers]

    def _need(self, *path: str) -> int:
        offset = self._types.offset(*path)
        if offset is None:
            raise HelperError("NoTracking", "the guest's kernel has no %s" % ".".join(path))
        return offset


def entry(jump: int) -> bytes:
    """The instructions of a program that goes on with the one in the map ``jump``."""
    code = _Code()
    code.address(_R2, 1, jump)
    code.sum("=", _R3, 0)
    code.call(_TAIL_CALL)
    code.end()
    return code.assemble()


def program(event: str, disk: Disk, fields: Fields) -> bytes:
    """The instructions to run at ``event``. Most events are of another disk: that is found out first."""
    code, where = _Code(), fields.of(event)
    code.load(_R6, _R1, 8 * where.argument, 8)
    _require_disk(code, where, disk, fields)
    _require_change(code, where)
    code.address(_R1, 2, disk.switch)
    code.load(_R1, _R1, SWITCH, 4)
    code.sum("&", _R1, 1)
    code.store(_SIDE, _R1, 8)
    code.load(_R1, _FP, _OP, 8)
    for command in _OUT:
        code.jump("==", _R1, command, "passed")
    code.sum("=", _R9, 0)
    if where.bios is not None and disk.scattered:
        _mark_list(code, disk, where.bios, fields)
    _take_range(code, disk, where.sector, where.length, "end")
    _mark_range(code, disk)
    _raise_flags(code, disk)
    code.label("end")
    code.end()
    return code.assemble()


def _require_disk(code: "_Code", where: Event, disk: Disk, fields: Fields) -> None:
    code.copy(_R7, _R6)
    for offset in where.disk:
        code.read(_R7, offset, 8, "end")
        code.copy(_R7, _R1)
    for offset, number in ((fields.major, disk.major), (fields.minor, disk.minor)):
        code.read(_R7, offset, 4, "end")
        code.jump("!=", _R1, number, "end")


def _require_change(code: "_Code", where: Event) -> None:
    """What is no read goes on. Its operation becomes the mark: it is never zero."""
    code.read(_R6, where.op, 4, "end")
    code.sum("&", _R1, 0xFF)
    code.store(_OP, _R1, 8)
    for other in (_READ, _FLUSH) + _IN:
        code.jump("==", _R1, other, "end")


def _take_range(code: "_Code", disk: Disk, sector: int, length: int, empty: str, unit: int = 0) -> None:
    """Set R7 and R8 to the first and last chunk, or group, of what R6 points to.

    A zero that the verifier does not know keeps it from following their values through every round of the loop.
    """
    code.read(_R6, sector, 8, "lost")
    code.copy(_R7, _R1)
    code.read(_R6, length, 4, "lost")
    code.jump("==", _R1, 0, empty)
    code.copy(_R8, _R1)
    code.sum("+", _R8, 511)
    code.sum(">>", _R8, 9)
    code.sum("+", _R8, by=_R7)
    code.sum("-", _R8, 1)
    code.address(_R2, 2, disk.switch)
    code.load(_R2, _R2, UNKNOWN, 8)
    for register in (_R7, _R8):
        code.sum(">>", register, CHUNK - 9)
        code.jump(">=", register, disk.chunks, "beyond")
        code.sum(">>", register, unit)
        code.sum("+", register, by=_R2)


def _mark_range(code: "_Code", disk: Disk) -> None:
    """Mark from R7 to R8: whole groups with one byte, the ends with a byte for each chunk."""
    code.label("loop")
    code.copy(_R1, _R8)
    code.sum("-", _R1, by=_R7)
    code.jump("signed <", _R1, 0, "end")
    code.copy(_R2, _R7)
    code.sum("&", _R2, (1 << GROUP) - 1)
    code.jump("!=", _R2, 0, "fine")
    code.jump("<", _R1, (1 << GROUP) - 1, "fine")
    code.copy(_R1, _R7)
    code.sum(">>", _R1, GROUP)
    code.sum("+", _R1, disk.coarse)
    code.sum("+", _R7, 1 << GROUP)
    code.jump("", target="mark")
    code.label("fine")
    code.copy(_R1, _R7)
    code.sum("+", _R1, disk.fine)
    code.sum("+", _R7, 1)
    code.label("mark")
    _put_mark(code, disk)
    code.count(_R9, _ROUNDS, "loop")
    code.jump("", target="lost")


def _mark_list(code: "_Code", disk: Disk, bios: int, fields: Fields) -> None:
    """A discard of several ranges, each a bio of its own: mark all groups that they touch."""
    code.jump("!=", _R1, _DISCARD, "one range")
    code.read(_R6, bios, 8, "lost")
    code.store(_NEXT, _R1, 8)
    code.read(_R1, fields.next, 8, "lost")
    code.jump("==", _R1, 0, "one range")
    code.label("next")
    code.load(_R6, _FP, _NEXT, 8)
    code.jump("==", _R6, 0, "end")
    code.read(_R6, fields.next, 8, "lost")
    code.store(_NEXT, _R1, 8)
    _take_range(code, disk, fields.sector, fields.length, "lost", GROUP)
    code.label("groups")
    code.copy(_R1, _R7)
    code.sum("+", _R1, disk.coarse)
    _put_mark(code, disk)
    code.copy(_R1, _R8)
    code.sum("-", _R1, by=_R7)
    code.sum("+", _R7, 1)
    code.count(_R9, _ROUNDS, "more")
    code.jump("", target="lost")
    code.label("more")
    code.jump("signed <", _R1, 1, "next")
    code.jump("", target="groups")
    code.label("one range")


def _put_mark(code: "_Code", disk: Disk) -> None:
    """Set the byte that side 0 has at R1 in the map of marks, for the active side."""
    code.load(_R2, _FP, _SIDE, 8)
    code.sum("*", _R2, disk.stride)
    code.sum("+", _R1, by=_R2)
    code.store(_AT, _R1, 8)
    code.sum(">>", _R1, PAGE)
    code.look_up(disk.marks, "end")
    code.load(_R1, _FP, _AT, 8)
    code.sum("&", _R1, (1 << PAGE) - 1)
    code.sum("+", _R0, by=_R1)
    code.load(_R1, _FP, _OP, 8)
    code.put(_R0, 0, _R1)


def _raise_flags(code: "_Code", disk: Disk) -> None:
    for name, flag in (("passed", PASSED), ("beyond", BEYOND), ("lost", LOST)):
        code.label(name)
        code.sum("=", _R1, 0)
        code.look_up(disk.marks, "end")
        code.load(_R1, _FP, _SIDE, 8)
        code.sum("&", _R1, 1)
        code.sum("*", _R1, FLAGS)
        code.sum("+", _R0, by=_R1)
        code.sum("=", _R1, 1)
        code.put(_R0, flag, _R1)
        code.jump("", target="end")


class _Code:
    """Instructions (linux/bpf.h), and the jumps whose targets are not known yet."""

    def __init__(self) -> None:
        self._code: List[Tuple[int, int, int, int, int]] = []  # operation, destination, source, offset, immediate
        self._labels: Dict[str, int] = {}
        self._jumps: Dict[int, str] = {}

    def assemble(self) -> bytes:
        """The finished program."""
        rows = list(self._code)
        for at, name in self._jumps.items():
            operation, left, right, _, number = rows[at]
            rows[at] = (operation, left, right, self._labels[name] - at - 1, number)
        return b"".join(struct.pack("<BBhi", row[0], row[2] << 4 | row[1], row[3], row[4]) for row in rows)

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def jump(self, test: str, left: int = 0, number: int = 0, target: str = "") -> None:
        """To ``target``, if ``left`` compares so with ``number``."""
        self._jumps[len(self._code)] = target
        self._add(_JUMPS[test], left, number=number)

    def sum(self, operator: str, left: int, number: int = 0, by: Optional[int] = None) -> None:
        """``left`` := ``left operator number``, or the register ``by``; ``=`` only sets it."""
        self._add(_SUMS[operator] | (_BY_REGISTER if by is not None else 0), left, by or 0, 0, number)

    def copy(self, left: int, right: int) -> None:
        self.sum("=", left, by=right)

    def count(self, counter: int, limit: int, target: str) -> None:
        """Once more to ``target``, unless it was the last of ``limit`` rounds."""
        self.sum("+", counter, 1)
        self.jump("<", counter, limit, target)

    def load(self, left: int, pointer: int, offset: int, size: int) -> None:
        self._add(0x61 | _BYTES[size], left, pointer, offset)

    def store(self, place: int, register: int, size: int) -> None:
        """To the stack."""
        self._add(0x63 | _BYTES[size], _FP, register, place)

    def put(self, pointer: int, offset: int, register: int) -> None:
        """One byte."""
        self._add(0x63 | _BYTES[1], pointer, register, offset)

    def address(self, register: int, kind: int, descriptor: int) -> None:
        """``kind`` 1: of a map, 2: of its only value."""
        self._add(0x18, register, kind, 0, descriptor)
        self._add(0)

    def look_up(self, descriptor: int, missing: str) -> None:
        """R0 := the address of the value of a map whose number is in R1."""
        self.store(_KEY, _R1, 4)
        self.address(_R1, 1, descriptor)
        self.copy(_R2, _FP)
        self.sum("+", _R2, _KEY)
        self.call(_LOOKUP)
        self.jump("==", _R0, 0, missing)

    def read(self, pointer: int, offset: int, size: int, failed: str) -> None:
        """R1 := what the kernel has ``offset`` bytes behind ``pointer``."""
        self.copy(_R3, pointer)  # first: it may be one of the others
        self.sum("+", _R3, offset)
        self.copy(_R1, _FP)
        self.sum("+", _R1, _WORD)
        self.sum("=", _R2, size)
        self.call(_PROBE_READ)
        self.jump("!=", _R0, 0, failed)
        self.load(_R1, _FP, _WORD, size)

    def call(self, function: int) -> None:
        self._add(0x85, number=function)

    def end(self) -> None:
        self.sum("=", _R0, 0)
        self._add(0x95)

    def _add(self, operation: int, left: int = 0, right: int = 0, offset: int = 0, number: int = 0) -> None:
        self._code.append((operation, left, right, offset, number))
