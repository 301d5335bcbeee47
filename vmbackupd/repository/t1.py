"""The revert plan of one disk, from the COW stores in the stored image of the scratch disk. One piece of code reverts
at backup time and at restore time."""

from __future__ import annotations

from collections.abc import Sequence

from vmbackupd.engine.cowstore import CowStore
from vmbackupd.engine.readable import ReadableSource
from vmbackupd.engine.revert import RevertPlan
from vmbackupd.engine.sink import ChunkSource
from vmbackupd.model import VolumeMap


def read_store(volume: VolumeMap, scratch: ChunkSource) -> CowStore:
    """The COW store of ``volume`` in the image of the scratch disk. Raises ``StoreCorrupt``."""
    source = ReadableSource(scratch)

    def read(offset: int, length: int) -> bytes:
        return source.read(volume.store_offset + offset, length)

    return CowStore(read, volume.store_length, volume.size)


def revert_plan(disk: str, size: int, volumes: Sequence[VolumeMap], scratch: ChunkSource) -> RevertPlan:
    """What sets the T2 image of ``disk`` (``size`` bytes) back to T1. Raises ``StoreCorrupt``."""
    plan = RevertPlan(size)
    for volume in volumes:
        if any(segment.disk == disk for segment in volume.segments):
            plan.add_volume(volume, disk, read_store(volume, scratch))
    plan.finish()
    return plan
