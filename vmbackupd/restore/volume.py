"""One volume's bytes: from the repository to its target, and back to T1 where the backup left that to the restore."""

from __future__ import annotations

from contextlib import closing

from vmbackupd.engine.copyloop import copy_out
from vmbackupd.engine.nbdimage import NbdSink
from vmbackupd.engine.progress import Progress
from vmbackupd.engine.revert import revert_image
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository import Repository
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.t1 import revert_plan
from vmbackupd.restore.plan import VolumePlan
from vmbackupd.restore.targets import OpenTarget


def write_volume(repository: Repository, manifest: Manifest, plan: VolumePlan, target: OpenTarget,
                 progress: Progress) -> int:
    """Write the whole volume. Blocks; runs in a thread of its own. Returns the number of chunks set back to T1."""
    image = repository.image(plan.tree)
    if image.size != plan.size:
        raise RepositoryCorrupt(f"its image {plan.tree} has {image.size} bytes, the manifest says {plan.size}")
    with closing(target.connect()) as connection:
        copy_out(image, connection, progress, target_is_zero=target.is_zero)
        if not plan.revert:
            return 0
        assert manifest.store is not None
        store = repository.image(manifest.store.tree)
        reverts = revert_plan(plan.record.id, plan.size, manifest.volume_maps, store)
        sink = NbdSink(connection, size=plan.size, chunk_size=image.chunk_size)
        chunks = revert_image(reverts, image, store, sink, progress)
        sink.finish()
        return chunks
