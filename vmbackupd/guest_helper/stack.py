"""Where the bytes of a device-mapper volume lie on the guest's disks."""

import os
from typing import Dict, Iterator, List, NamedTuple, Optional

from . import devices
from .dm import Dm, Target, number_of
from .failures import HelperError

SECTOR = 512
MAX_PIECES = 1 << 20
_DEEPEST = 32


class Piece(NamedTuple):
    """``length`` bytes of a volume from ``offset`` lie on ``disk`` from ``disk_offset``."""

    offset: int
    disk: str
    disk_offset: int
    length: int


class Stack:
    """``tables`` are known tables by device number, in place of those that are live now."""

    def __init__(self, dm: Optional[Dm], tables: Dict[str, List[Target]]) -> None:
        self._dm, self._tables = dm, dict(tables)

    def pieces(self, devno: str) -> List[Piece]:
        """All of the volume, in the order of its bytes. Raises ``HelperError`` for a target that moves bytes about."""
        rows = self._rows(devno)
        found = []
        for piece in self._map(devno, 0, (rows[-1].start + rows[-1].length) * SECTOR if rows else 0, 0):
            found.append(piece)
            if len(found) > MAX_PIECES:
                raise HelperError("TooManyPieces", "volume %s lies in over %d pieces" % (devno, MAX_PIECES))
        offset, placed = 0, []
        for piece in found:
            placed.append(piece._replace(offset=offset))
            offset += piece.length
        return placed

    def _map(self, devno: str, start: int, length: int, level: int) -> Iterator[Piece]:
        if level > _DEEPEST:
            raise HelperError("StackTooDeep", "volume %s is stacked too deep" % devno)
        base = "/sys/dev/block/" + devno
        if devno in self._tables or os.path.isdir(base + "/dm"):
            for row in self._rows(devno):
                first = max(start, row.start * SECTOR)
                end = min(start + length, (row.start + row.length) * SECTOR)
                if first < end:
                    for piece in self._map_row(devno, row, first - row.start * SECTOR, end - first, level):
                        yield piece
        elif os.path.exists(base + "/partition"):
            parent = devices.read(os.path.dirname(os.path.realpath(base)) + "/dev")
            begin = int(devices.read(base + "/start")) * SECTOR
            for piece in self._map(parent, begin + start, length, level + 1):
                yield piece
        else:
            yield Piece(0, devno, start, length)

    def _map_row(self, devno: str, row: Target, start: int, length: int, level: int) -> Iterator[Piece]:
        words = row.params.split()
        if row.kind == "multipath":  # several paths to one disk: it stands for that disk
            yield Piece(0, devno, start, length)
        elif row.kind == "linear":
            for piece in self._map(words[0], int(words[1]) * SECTOR + start, length, level + 1):
                yield piece
        elif row.kind == "striped":
            stripes, chunk = int(words[0]), int(words[1]) * SECTOR
            while length:
                index, within = divmod(start, chunk)
                size = min(length, chunk - within)
                device, offset = words[2 + index % stripes * 2], int(words[3 + index % stripes * 2]) * SECTOR
                for piece in self._map(device, offset + index // stripes * chunk + within, size, level + 1):
                    yield piece
                start, length = start + size, length - size
        else:
            raise HelperError("NotFlat", "volume %s has a %s target: its bytes cannot be placed" % (devno, row.kind))

    def _rows(self, devno: str) -> List[Target]:
        if devno not in self._tables:
            if self._dm is None:
                raise HelperError("NoDeviceMapper", "volume %s: no device-mapper" % devno)
            self._tables[devno] = self._dm.table(number_of(devno))
        return self._tables[devno]
