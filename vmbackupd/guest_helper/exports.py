"""What a data server offers of each disk: itself, and by name what is known about it.

``ID`` the disk · ``ID#changed`` the chunks changed since the generation its tracker counts from · ``ID#hashes`` the
names of its chunks · ``ID#exceptions`` the chunks overwritten since T1 · ``ID#captured`` the disk with what a capture
took of it · ``ID#rest`` the chunks that the capture found marked. What does not apply to a disk is not there.
"""

from typing import Dict, List, NamedTuple, Optional, Set, Tuple

from . import devices
from .blocks import Blocks, Export, Table
from .capture import Capture
from .dm import Dm, devno_of
from .exceptions import Exceptions, Store
from .failures import HelperError
from .hashes import Hashes
from .image import Device, Image
from .snapshot import SECTOR, Snapshot, Volume
from .stack import Piece, Stack
from .thin import Half
from .tracker import Trackers

FILE = "file:"
"""How a path begins that stands in place of a device number, for tests on any machine."""


class Disks:
    """Opens disks: as of T1 with a snapshot whose volumes lie on them, else as they are now."""

    def __init__(self, dm: Optional[Dm], snapshot: Optional[Snapshot]) -> None:
        volumes = snapshot.volumes if snapshot is not None else []
        stack = Stack(dm, {volume.devno: volume.wanted.rows for volume in volumes})
        self._volumes = [(volume, stack.pieces(volume.devno)) for volume in volumes]
        self._opened: Dict[str, Device] = {}

    def close(self) -> None:
        """Let go of everything: what is open cannot be removed."""
        for device in self._opened.values():
            device.close()
        self._opened = {}

    def image(self, device: str) -> Image:
        """Raises ``OSError`` or ``HelperError``."""
        overlays = [(self.open(devno_of(volume.snap)), pieces) for volume, pieces in self._on(device)]
        return Image(self.open(device), overlays, device)

    def exceptions(self, device: str, size: int) -> Optional[Exceptions]:
        """None where no volume with a snapshot lies on the disk."""
        stores = [
            (Store(self.open(devno_of(volume.cow)), volume.wanted.sectors * SECTOR), pieces)
            for volume, pieces in self._on(device)
        ]
        return Exceptions(device, size, stores) if stores else None

    def _on(self, device: str) -> List[Tuple[Volume, List[Piece]]]:
        """The volumes that lie on a disk, at least in part."""
        return [pair for pair in self._volumes if any(piece.disk == device for piece in pair[1])]

    def below(self, device: str) -> Set[str]:
        """The disks that a volume lies on, none for one that is not snapshotted."""
        return {piece.disk for volume, pieces in self._volumes if volume.devno == device for piece in pieces}

    def half(self, device: str) -> Optional[Half]:
        """A volume that is snapshotted; None for one that is not."""
        for volume, pieces in self._volumes:
            if volume.devno == device:
                return Half(volume.wanted.sectors * SECTOR, pieces, self.open(devno_of(volume.snap)))
        return None

    def open(self, device: str) -> Device:
        """A device, opened once."""
        if device not in self._opened:
            self._opened[device] = Device(device[len(FILE) :] if device.startswith(FILE) else devices.node(device))
        return self._opened[device]


class Known(NamedTuple):
    """What the helper knows when a data server starts. ``thin``: bitmaps of disks below thin pools."""

    dm: Optional[Dm]
    snapshot: Optional[Snapshot]
    capture: Optional[Capture]
    trackers: Trackers
    thin: Dict[str, bytearray]


def exports(wanted: Dict[str, str], known: Known, live: bool, key: Optional[bytes]) -> Dict[str, Export]:
    """By name, for the disks ``wanted`` (name → device): as they are now if ``live``, else as of T1."""
    disks = Disks(known.dm, None if live else known.snapshot)
    found: Dict[str, Export] = {}
    for name, device in wanted.items():
        image = disks.image(device)
        offered: Dict[str, Optional[Export]] = {"": Blocks(image, still=not live)}
        tracked = {"#changed": known.trackers.changed(device), "#fresh": known.trackers.fresh(device)}
        for suffix, bitmap in {**tracked, "#thin": None if live else known.thin.get(device)}.items():
            offered[suffix] = Table(bitmap) if bitmap is not None else None
        offered["#hashes"] = Hashes(Blocks(image, still=False), key) if key is not None else None
        offered["#exceptions"] = disks.exceptions(device, image.size)
        captured = known.capture.disks.get(device) if known.capture is not None and known.capture.taken else None
        if captured is not None and not live:
            offered.update({"#captured": Blocks(captured, still=False), "#rest": Table(captured.rest)})
        for suffix, export in offered.items():
            if name + suffix in found:
                raise HelperError("InvalidArgument", "disks: two would offer %s" % (name + suffix))
            if export is not None:
                found[name + suffix] = export
    return found
