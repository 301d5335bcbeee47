"""The revert plan of one disk, from the COW stores in the stored image of the scratch disk. One piece of code reverts
at backup time, at restore time, and while an image is exported or served."""

from __future__ import annotations

from collections.abc import Sequence

from vmbackupd.engine.cowstore import CowStore
from vmbackupd.engine.readable import ReadableSource
from vmbackupd.engine.revert import RevertedSource, RevertPlan
from vmbackupd.engine.sink import ChunkSource
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.model import VolumeMap, VolumeRecord
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.repository import Repository


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


def t1_image(repository: Repository, manifest: Manifest, record: VolumeRecord) -> ChunkSource:
    """The image of a volume at T1, set back while it is read where the backup left that to the restore.

    For one thread. Raises ``RepositoryCorrupt``, ``StoreCorrupt``, ``StorageError``.
    """
    tree = record.tree or record.t2_tree
    if tree is None:
        raise RepositoryCorrupt(f"backup {manifest.id}: its manifest names no image for volume {record.id}")
    image = repository.image(tree)
    if image.size != record.size:
        raise RepositoryCorrupt(f"backup {manifest.id}: the image of volume {record.id}, {tree}, has {image.size}"
                                f" bytes, the manifest says {record.size}")
    if record.tree is not None:
        return image
    if manifest.store is None:
        raise RepositoryCorrupt(f"backup {manifest.id} has no COW stores, but volume {record.id} needs them to be set"
                                " back to T1: use another backup")
    store = repository.image(manifest.store.tree)
    return RevertedSource(revert_plan(record.id, record.size, manifest.volume_maps, store), image, store)
