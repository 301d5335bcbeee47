"""A backup on its way into the repository.

Order of what becomes durable: session, packs, indexes, manifest. Until the manifest stands nothing is a backup; until
an index stands, no other writer can have built on our packs, so they may be removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import threading
import time
from typing import TYPE_CHECKING

from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.image import ImageSink, ImageSource
from vmbackupd.engine.tree import TreeBuilder
from vmbackupd.errors import BackupError, InvalidArgument, StorageError
from vmbackupd.repository import envelope
from vmbackupd.repository.catalog import WRITER_ID, index_name, pack_name, spill_file
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.repository import LARGEST_BLOB, MANIFEST_MAGIC, Repository, session_name
from vmbackupd.repository.storage import Claim

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)


class RepositoryWriter:
    """A context manager: what is not published when it ends is removed. Images may be written by several threads, each
    image by one at a time."""

    def __init__(self, repository: Repository) -> None:
        """Use ``Repository.writer``."""
        self.repository = repository
        self.id = secrets.token_bytes(WRITER_ID)
        self._storage = repository.storage
        self._lock = threading.Lock()
        self._packs: list[bytes] = []
        self._indexes: list[str] = []
        self._ended = False
        repository.clean_up()
        index = repository.catalog.refresh()
        self._claim: Claim | None = self._storage.claim(session_name(self.id), self._session())
        try:
            keys = repository.header.keys
            settings = repository.settings
            self._store = ChunkStore(
                index,
                chunk_key=keys.chunk,
                node_key=keys.node,
                seal_key=keys.seal,
                repository=repository.header.id,
                writer=self.id,
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
            self._reader = repository.reader(index, self._store)
            self._store.start()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> RepositoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @staticmethod
    def _session() -> bytes:
        """Who is at work, for people."""
        return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": round(time.time(), 3)}).encode()

    # ---- content

    def image(self, size: int) -> ImageSink:
        """A new image of ``size`` bytes, all holes. InvalidArgument above 1 PiB."""
        self._check_open()
        header = self.repository.header
        builder = TreeBuilder(
            self._store, self._reader, spill_file, size=size, chunk_size=header.chunk_size, fanout=header.fanout
        )
        return ImageSink(self._store, builder)

    def update(self, tree: str) -> ImageSink:
        """An image that starts as ``tree`` (published, or finished with this writer) and becomes a new tree: only
        changed chunks and the nodes above them are stored. InvalidArgument, RepositoryCorrupt, StorageError."""
        self._check_open()
        return ImageSink(self._store, TreeBuilder(self._store, self._reader, spill_file, tree=tree))

    def source(self, tree: str) -> ImageSource:
        """The image of a tree that is published or was finished with this writer; to be read before it ends."""
        self._check_open()
        return ImageSource(self._reader, tree)

    def blob(self, data: Buffer) -> str:
        """Store a small file (domain XML, NVRAM); its id, a tree's. InvalidArgument above 256 MiB."""
        view = memoryview(data).cast("B")
        if len(view) > LARGEST_BLOB:
            raise InvalidArgument(f"{len(view)} bytes are too many for a blob, at most {LARGEST_BLOB} can be one")
        sink = self.image(len(view))
        sink.write(0, view)
        return sink.finish()

    @property
    def bytes_stored(self) -> int:
        """Bytes this writer added to packs so far."""
        return self._store.bytes_stored

    # ---- the end

    def publish(self, manifest: Manifest) -> None:
        """Make it a backup: packs, then indexes, then the manifest, each durable before the next. Ends the writer.

        InvalidArgument if the id is taken or a tree unknown, RepositoryFull, StorageError: nothing is published then.
        """
        self._check_open()
        try:
            data = dataclasses.replace(manifest, writer=self.id.hex()).encode()
            for tree in manifest.trees():
                if not self._store.knows(bytes.fromhex(tree)):
                    raise InvalidArgument(f"manifest {manifest.id}: tree {tree} is not in the repository")
            name = self.repository.manifest_object(manifest.id)
            if self._storage.stat(name) is not None:
                raise InvalidArgument(f"there is a backup {manifest.id} already")
            for index_id, parts in self._store.finish():
                self._indexes.append(index_name(index_id))
                self._storage.put_if_absent(index_name(index_id), parts)
            if not self._storage.put_if_absent(name, [envelope.seal(MANIFEST_MAGIC, self.repository.header, data)]):
                raise InvalidArgument(f"there is a backup {manifest.id} already")
        except BaseException:
            self.abort()
            raise
        self._ended = True
        self._reader.close()
        try:
            self._release()
        except BackupError as reason:  # the backup stands: the session is cleaned up by the next writer
            log.warning("session of writer %s: %s", self.id.hex(), reason)
        self.repository.catalog.refresh()
        self.repository.catalog.merge_soon()

    def abort(self) -> None:
        """End the writer; remove its packs unless they could be in use. Safe to call at any time, also twice."""
        if self._ended:
            return
        self._ended = True
        self._store.close()
        self._reader.close()
        try:
            if self._indexes and self._is_covered():
                # Others may have found our chunks in it and rely on them: complete garbage is harmless.
                log.warning("writer %s gave up after its index was visible: its packs stay", self.id.hex())
            else:
                for pack_id in self._packs:
                    self._storage.delete(pack_name(pack_id))
            self._release()
        except BackupError as reason:  # never hides why the writer gave up; the next writer cleans up
            log.warning("removing the packs of writer %s: %s", self.id.hex(), reason)
            self._drop_claim()

    def _is_covered(self) -> bool:
        """Does an index tell of our packs? Not by name: ours may have been merged into another and removed."""
        catalog = self.repository.catalog
        catalog.refresh()
        return bool(catalog.damaged) or not catalog.covered().isdisjoint(self._packs)

    def _put_pack(self, pack_id: bytes, parts: list[Buffer]) -> None:
        with self._lock:
            self._packs.append(pack_id)
        if not self._storage.put_if_absent(pack_name(pack_id), parts):
            with self._lock:
                self._packs.remove(pack_id)  # somebody else's
            raise StorageError(f"{self._storage.place}: there is an object {pack_name(pack_id)} already")

    def _check_open(self) -> None:
        if self._ended:
            raise InvalidArgument("the writer has ended")

    def _release(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            claim.release()

    def _drop_claim(self) -> None:
        """Give up the claim's lock though its object could not be removed."""
        with contextlib.suppress(BackupError):
            self._release()
