"""A session's packs and indexes on their way into the repository: a backup's, or a garbage collector's copies."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.index import IndexSet
from vmbackupd.errors import BackupError, StorageError
from vmbackupd.repository import settle
from vmbackupd.repository.catalog import index_name, object_id, pack_name, spill_file
from vmbackupd.repository.sessions import Session

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from vmbackupd.repository.repository import Repository

log = logging.getLogger(__name__)


class Output:
    """What one session stores. ``abort`` ends its session too."""

    def __init__(self, repository: Repository, session: Session, index: IndexSet) -> None:
        """Records that ``index`` finds are not stored again. The session is given up if this fails."""
        self.session = session
        self._storage = repository.storage
        self._lock = threading.Lock()
        self._packs: dict[bytes, int] = {}
        self._attempts: list[str] = []
        self._visible = False
        self._catalog = repository.catalog
        keys = repository.header.keys
        settings = repository.settings
        try:
            self.store = ChunkStore(
                index,
                chunk_key=keys.chunk,
                node_key=keys.node,
                seal_key=keys.seal,
                repository=repository.header.id,
                writer=session.id,
                put_pack=self._put_pack,
                spill_file=spill_file,
                workers=settings.threads,
                level=settings.level,
                largest=repository.header.largest,
                pack_size=max(settings.pack_size, 2 * repository.header.largest),
                segment_entries=settings.segment_entries,
                content_key=repository.header.content_key,
                cipher=settings.cipher,
            )
            self.store.start()
        except BaseException:
            session.end()
            raise

    def finish(self) -> None:
        """Packs, then indexes, each durable and looked for in the storage before the next.

        StorageError where the storage does not hold what it confirmed, RepositoryFull, SessionLost.
        """
        indexes = self.store.finish()
        self._check_packs()
        if not indexes:
            return
        self.session.check()
        self.session.cover()
        for index_id, parts in indexes:
            self._attempts.append(index_name(index_id))
            self._storage.put_if_absent(index_name(index_id), parts)
            self._visible = True

    def _check_packs(self) -> None:
        """A storage that lost a pack it confirmed must not make a backup of it."""
        if not self._packs:
            return
        found = {object_id(info.name): info.size for info in self._storage.list(settle.packs_of(self.session.id))}
        for pack_id, size in self._packs.items():
            if found.get(pack_id) != size:
                there = "is not there" if pack_id not in found else f"has {found[pack_id]} bytes"
                raise StorageError(
                    f"{self._storage.place}: {pack_name(pack_id)} was written with {size} bytes and {there}: the "
                    "storage loses data"
                )

    def abort(self) -> None:
        """End the session; remove its packs where nobody else can rely on them. What fails is left to others."""
        self.store.close()
        try:
            # Where an end is not certain, others may have taken us for dead and our packs for everybody's. Packs with
            # an index are everybody's anyhow. Both are left to the garbage collector, which sees who needs them.
            if self._storage.certain_ends and not self._may_be_known():
                for pack_id in self._packs:
                    self._storage.delete(pack_name(pack_id))
        except BackupError as reason:  # never hides why the session gave up; the next one cleans up
            log.warning("removing the packs of session %s: %s", self.session.id.hex(), reason)
            self.session.drop()
        else:
            self.session.end()

    def _may_be_known(self) -> bool:
        """Could an index that tells of our packs be, or have been, visible? It may have been merged into another."""
        if self._visible or not self._attempts:
            return self._visible
        if any(self._storage.stat(name) is not None for name in self._attempts):
            return True
        self._catalog.refresh()
        return not self._catalog.covered().isdisjoint(self._packs)

    def _put_pack(self, pack_id: bytes, parts: list[Buffer]) -> None:
        with self._lock:
            self._packs[pack_id] = sum(memoryview(part).nbytes for part in parts)
        self._storage.put_if_absent(pack_name(pack_id), parts)
