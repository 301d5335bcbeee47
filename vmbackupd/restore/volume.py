"""One volume's bytes: from the repository to its target, and back to T1 where the backup left that to the restore."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

from vmbackupd.engine.copyloop import copy_out
from vmbackupd.engine.fileout import write_file
from vmbackupd.engine.nbdimage import NbdSink
from vmbackupd.engine.progress import Progress
from vmbackupd.engine.revert import revert_image
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository import Repository
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.t1 import revert_plan
from vmbackupd.restore.plan import VolumePlan
from vmbackupd.restore.targets import OpenTarget


@dataclass(frozen=True, slots=True)
class Written:
    """What was done to a target: bytes written there (cleared ones included), chunks of them set back to T1."""

    bytes_written: int
    reverted: int = 0


def write_volume(repository: Repository, manifest: Manifest, plan: VolumePlan, target: OpenTarget,
                 progress: Progress) -> Written:
    """Write the whole volume, or what differs of it. Blocks; runs in a thread of its own."""
    image = repository.image(plan.tree)
    if image.size != plan.size:
        raise RepositoryCorrupt(f"its image {plan.tree} has {image.size} bytes, the manifest says {plan.size}")
    if target.fd is not None:
        write_file(image, target.fd, progress, label=str(plan.target))
        return Written(progress.bytes_written)
    with closing(target.connect()) as connection:
        copy_out(image, connection, progress, target_is_zero=target.is_zero, in_place=plan.compare)
        if not plan.revert:
            return Written(progress.bytes_written)
        assert manifest.store is not None
        store = repository.image(manifest.store.tree)
        reverts = revert_plan(plan.record.id, plan.size, manifest.volume_maps, store)
        sink = NbdSink(connection, size=plan.size, chunk_size=image.chunk_size)
        chunks = revert_image(reverts, image, store, sink, progress)
        sink.finish()
        return Written(progress.bytes_written + chunks * image.chunk_size, chunks)
