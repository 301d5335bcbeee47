"""A backup on its way into the repository.

Order of what happens: the session is claimed; only then does the writer look at what is there; packs, indexes and the
manifest become durable, in this order. Until the manifest stands nothing is a backup.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.image import ImageSink, ImageSource
from vmbackupd.engine.tree import TreeBuilder
from vmbackupd.errors import BackupError, InvalidArgument, SessionLost, StorageError
from vmbackupd.repository import envelope, settle
from vmbackupd.repository.catalog import spill_file
from vmbackupd.repository.manifest import BACKUP_ID, Manifest
from vmbackupd.repository.output import Output
from vmbackupd.repository.repository import LARGEST_BLOB, MANIFEST_MAGIC, Repository
from vmbackupd.repository.sessions import Session

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)


class WriterImage(ImageSink):
    """An image of a writer, which remembers in ``complete`` the trees that are."""

    complete: set[str]

    def finish(self) -> str:
        """Complete the tree; its id. Nothing is visible to others before the writer publishes a manifest."""
        tree = super().finish()
        self.complete.add(tree)
        return tree


class RepositoryWriter:
    """A context manager: what is not published when it ends is removed. Images may be written by several threads, each
    image by one at a time."""

    def __init__(self, repository: Repository, backup_id: str) -> None:
        """Use ``Repository.writer``."""
        if not BACKUP_ID.fullmatch(backup_id):
            raise InvalidArgument(f"{backup_id!r} is no backup id")
        self.repository = repository
        self.backup_id = backup_id
        self._storage = repository.storage
        self._complete: set[str] = set()
        self._ended = False
        repository.clean_up()
        if self._storage.stat(self._manifest) is not None:
            raise InvalidArgument(f"there is, or was, a backup {backup_id} already")
        self._session = Session(self._storage, repository.header, "writer", backup_id)
        try:
            # The order counts: a pack that is neither condemned nor gone after the session was claimed will stay.
            index = repository.reliable_index()
        except BaseException:
            self._session.end()
            raise
        self._output = Output(repository, self._session, index)
        try:
            self._reader = repository.reader(repository.catalog.current, self._output.store)
        except BaseException:
            self._output.abort()
            raise

    def __enter__(self) -> RepositoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @property
    def id(self) -> bytes:
        """The writer's id, 12 bytes: its session's."""
        return self._session.id

    @property
    def _store(self) -> ChunkStore:
        return self._output.store

    @property
    def _manifest(self) -> str:
        return settle.manifest_object(self.repository.header, self.backup_id)

    # ---- content

    def base(self, backup_id: str) -> Manifest:
        """The manifest of a backup whose trees may be updated, or published again as they are.

        They stay as long as this writer works, even if the backup is forgotten meanwhile. NotFound, InvalidArgument,
        RepositoryCorrupt, StorageError.
        """
        self._check_open()
        self.repository.verdicts.listed()  # one that cannot be read could be on this very backup
        manifest = self.repository.manifest(backup_id)  # the session was claimed: nobody forgets it under our hands
        self._complete.update(manifest.trees())
        return manifest

    def image(self, size: int) -> ImageSink:
        """A new image of ``size`` bytes, all holes. InvalidArgument above 1 PiB."""
        self._check_open()
        header = self.repository.header
        return self._image(
            TreeBuilder(
                self._store, self._reader, spill_file, size=size, chunk_size=header.chunk_size, fanout=header.fanout
            )
        )

    def update(self, tree: str) -> ImageSink:
        """An image that starts as ``tree`` (of a ``base``, or finished with this writer) and becomes a new tree: only
        changed chunks and the nodes above them are stored. InvalidArgument, RepositoryCorrupt, StorageError."""
        self._check_open()
        self._check_complete(tree)
        return self._image(TreeBuilder(self._store, self._reader, spill_file, tree=tree))

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

        InvalidArgument if it is another backup than the writer was made for, the id is taken, or a tree is neither of
        this writer nor of a base; RepositoryFull, StorageError, SessionLost: nothing is published then.
        """
        self._check_open()
        try:
            if manifest.id != self.backup_id:
                raise InvalidArgument(f"this writer was made for backup {self.backup_id}, not for {manifest.id!r}")
            data = dataclasses.replace(manifest, writer=self.id.hex()).encode()
            for tree in manifest.trees():
                self._check_complete(tree)
            self._output.finish()
            self._session.check()
        except BaseException:
            self.abort()
            raise
        self._put_manifest(envelope.seal(MANIFEST_MAGIC, self.repository.header, data))
        self._ended = True
        self._reader.close()
        self._session.end()
        self.repository.catalog.refresh()
        self.repository.catalog.merge_soon()

    def _put_manifest(self, data: bytes) -> None:
        """The instant that makes the backup."""
        try:
            taken = not self._storage.put_if_absent(self._manifest, [data])
            found = self._storage.get(self._manifest, 0, len(data) + 1)
        except FileNotFoundError:
            self.abort()
            raise StorageError(
                f"{self._storage.place}: the manifest of {self.backup_id} was written and is not there: the storage "
                "loses data"
            ) from None
        except BaseException:
            self._give_up_publishing()
            raise
        if found == data:
            return  # also where the storage had to try twice and found the first try's
        if not taken:
            self.repository.condemn((), manifests=(self._manifest.rpartition("/")[2],), reason="not as it was written")
            self.abort()
            raise StorageError(f"{self._storage.place}: the manifest of {self.backup_id} is not what was written")
        self.abort()
        if settle.is_void(self.repository.header, self._manifest.rpartition("/")[2], found):
            raise SessionLost(
                f"backup {self.backup_id} was given up by others, because its host was not heard of for too long; "
                "begin again"
            )
        raise InvalidArgument(f"there is a backup {self.backup_id} already")

    def _give_up_publishing(self) -> None:
        """The storage failed while the manifest was put: make sure that it cannot appear later, or leave the session
        for others to do so."""
        if not self._storage.certain_ends:
            try:
                settle.fence(self._storage, self.repository.header, self.backup_id)
            except BackupError as reason:
                log.warning("backup %s may yet appear: %s", self.backup_id, reason)
                self._close()
                self._session.drop()
                return
        self.abort()

    def abort(self) -> None:
        """End the writer; remove its packs unless they could be in use. Safe to call at any time, also twice."""
        if self._close():
            self._output.abort()

    def _close(self) -> bool:
        """Stop working; False if that was done before."""
        ended, self._ended = self._ended, True
        if not ended:
            self._store.close()
            self._reader.close()
        return not ended

    def _image(self, builder: TreeBuilder) -> ImageSink:
        image = WriterImage(self._store, builder)
        image.complete = self._complete
        return image

    def _check_open(self) -> None:
        if self._ended:
            raise InvalidArgument("the writer has ended")

    def _check_complete(self, tree: str) -> None:
        """A tree counts only if everything below it is known to stay: a root alone proves nothing."""
        if tree not in self._complete:
            raise InvalidArgument(f"tree {tree} is neither of this writer nor of a backup that it builds on")
