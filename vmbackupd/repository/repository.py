"""A repository: backups that are published, and the way to their images."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.index import IndexSet
from vmbackupd.errors import InvalidArgument, NotFound, RepositoryCorrupt, RepositoryMissing
from vmbackupd.repository import envelope
from vmbackupd.repository.catalog import WRITER_ID, Catalog, PackStorage, object_id, pack_name
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header
from vmbackupd.repository.manifest import BACKUP_ID, MAX_BYTES, BackupSummary, Manifest
from vmbackupd.repository.storage import Storage
from vmbackupd.typed import parse_object

if TYPE_CHECKING:
    from vmbackupd.repository.writer import RepositoryWriter

log = logging.getLogger(__name__)

MANIFESTS = "manifests"
SESSIONS = "sessions"
MANIFEST_MAGIC = b"VMBKMANI"

CHUNK_SIZE = 64 * 1024
FANOUT = 256
LARGEST_BLOB = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """How a writer works: nothing of it is part of the format.

    ``level``: zstd's; ``workers``: threads that hash and compress, 0 for one a processor, at most 8; ``pack_size``:
    bytes of a pack; ``segment_entries``: chunks new to the repository that are kept in memory before they are sorted
    into a file.
    """

    level: int = 1
    workers: int = 0
    pack_size: int = 16 * 2**20
    segment_entries: int = 2**19

    @property
    def threads(self) -> int:
        return self.workers or min(len(os.sched_getaffinity(0)), 8)


class Repository:
    """A repository that is open. Any number of threads at once."""

    def __init__(self, storage: Storage, header: Header, settings: Settings) -> None:
        """Use ``open`` or ``create``."""
        self.storage = storage
        self.header = header
        self.settings = settings
        self.catalog = Catalog(storage, header)
        self._lock = threading.Lock()
        self._reader: ChunkReader | None = None

    @classmethod
    def create(cls, storage: Storage, *, chunk_size: int = CHUNK_SIZE, settings: Settings | None = None) -> Repository:
        """Make a repository. InvalidArgument if there is one, StorageError, RepositoryFull.

        A local directory must exist: ``LocalStorage.create`` makes it.
        """
        header = Header.new(chunk_size=chunk_size, fanout=FANOUT)
        if not storage.put_if_absent(HEADER_NAME, [header.encode()]):
            raise InvalidArgument(f"there is a repository at {storage.place} already")
        return cls.open(storage, settings=settings)

    @classmethod
    def open(cls, storage: Storage, *, settings: Settings | None = None) -> Repository:
        """Open a repository. RepositoryMissing, RepositoryCorrupt, StorageError."""
        try:
            data = storage.get(HEADER_NAME, 0, 2**20)
        except FileNotFoundError:
            raise RepositoryMissing(
                f"there is no repository at {storage.place}: mount it, or make one with `vmbackupctl repository init`"
            ) from None
        repository = cls(storage, Header.decode(data, storage.place), settings or Settings())
        repository.catalog.refresh()
        if repository.catalog.damaged:
            repository.rebuild_index()
        return repository

    def close(self) -> None:
        """Give up descriptors; images that are open keep theirs."""
        with self._lock:
            reader, self._reader = self._reader, None
        self.catalog.close()
        if reader is not None:
            reader.close()
        self.storage.close()

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """The repository's id, 32 hexadecimal digits."""
        return self.header.id.hex()

    # ---- backups

    def backups(self) -> list[BackupSummary]:
        """All backups, oldest first. One whose manifest is damaged is listed with the reason, it hides no other."""
        found = []
        for info in self.storage.list(f"{MANIFESTS}/"):
            backup_id = info.name.removeprefix(f"{MANIFESTS}/")
            try:
                found.append(BackupSummary.of(self.manifest(backup_id)))
            except NotFound:
                continue  # deleted since the listing
            except (RepositoryCorrupt, InvalidArgument) as reason:
                found.append(BackupSummary(backup_id, error=str(reason)))
        return sorted(found, key=lambda summary: (summary.t1, summary.id))

    def manifest(self, backup_id: str) -> Manifest:
        """The manifest of a backup. NotFound, InvalidArgument, RepositoryCorrupt, StorageError."""
        if not BACKUP_ID.fullmatch(backup_id):
            raise InvalidArgument(f"{backup_id!r} is no backup id")
        what = f"manifest of backup {backup_id}"
        try:
            data = self.storage.get(f"{MANIFESTS}/{backup_id}", 0, MAX_BYTES + 2**16)
        except FileNotFoundError:
            raise NotFound(f"there is no backup {backup_id} in the repository at {self.storage.place}") from None
        content = envelope.unseal(MANIFEST_MAGIC, self.header, data, what)
        fields = parse_object(content, what=what, max_length=MAX_BYTES, error=RepositoryCorrupt)
        manifest = Manifest.from_json(fields, at=what)
        if manifest.id != backup_id:
            raise RepositoryCorrupt(f"{what} is that of {manifest.id}: an object was swapped")
        return manifest

    # ---- content

    def image(self, tree: str) -> ImageSource:
        """The image of a published tree. InvalidArgument, RepositoryCorrupt, StorageError.

        The source is for one thread; open one for each.
        """
        return ImageSource(self._shared_reader(), tree)

    def blob(self, tree: str) -> bytes:
        """What ``RepositoryWriter.blob`` stored. InvalidArgument, RepositoryCorrupt, StorageError."""
        image = self.image(tree)
        if image.size > LARGEST_BLOB:
            raise RepositoryCorrupt(f"blob {tree} has {image.size} bytes, at most {LARGEST_BLOB} can be one")
        return image.read(0, image.size)

    def _shared_reader(self) -> ChunkReader:
        with self._lock:
            if self._reader is None or not self._reader.searches(self.catalog.current):
                self._reader = self.reader(self.catalog.current)
            return self._reader

    def reader(self, index: IndexSet, session: ChunkStore | None = None) -> ChunkReader:
        """What reads chunks by name; ``session`` is the writer's store whose unpublished chunks are to be seen too."""
        keys = self.header.keys
        return ChunkReader(
            index,
            chunk_key=keys.chunk,
            node_key=keys.node,
            storage=PackStorage(self.storage),
            recover=self._recover,
            session=session,
            largest=self.header.largest,
        )

    def _recover(self, name: bytes, searched: IndexSet) -> IndexSet | None:
        """``searched`` leads to no sound copy of this chunk. Perhaps there are newer indexes, perhaps one is lost.

        None: nothing new."""
        current = self.catalog.refresh()
        if current is searched or current.lookup(name) is None:
            self.rebuild_index()
            current = self.catalog.current
        return current if current is not searched else None

    # ---- writing

    def writer(self) -> RepositoryWriter:
        """Begin a backup. Any number of writers may work at once, here and on other hosts."""
        from vmbackupd.repository.writer import RepositoryWriter  # it imports this module

        return RepositoryWriter(self)

    # ---- care

    def rebuild_index(self) -> int:
        """Make an index of all packs that none covers, but those of writers at work or killed; the number of packs.

        Needs nothing but packs. Done by itself when an index is damaged or a chunk is not found.
        """
        return self.catalog.rebuild(self._unfinished())

    def _unfinished(self) -> Iterator[bytes]:
        """Ids of writers whose packs do not count: at work, or ended without publishing."""
        for info in self.storage.list(f"{SESSIONS}/"):
            writer = _session_writer(info.name)
            if writer is not None and not (self.storage.abandoned(info.name) and self._may_be_published(writer)):
                yield writer

    def _may_be_published(self, writer: bytes) -> bool:
        """Is there a manifest of this writer? A manifest that cannot be read might be it."""
        for info in self.storage.list(f"{MANIFESTS}/"):
            try:
                if self.manifest(info.name.removeprefix(f"{MANIFESTS}/")).writer == writer.hex():
                    return True
            except RepositoryCorrupt:
                return True
            except (NotFound, InvalidArgument):
                continue  # deleted since the listing; not one of ours
        return False

    def clean_up(self) -> int:
        """Remove what killed writers left: temporary files, and packs that nothing refers to. The bytes of the packs.

        Leaves writers that are at work alone, on this host and on others. While a manifest or an index is damaged,
        packs stay: they might be among its own.
        """
        self.storage.remove_temporaries()
        freed = 0
        for info in list(self.storage.list(f"{SESSIONS}/")):
            writer = _session_writer(info.name)
            if writer is None or not self.storage.abandoned(info.name):
                continue
            if not self._may_be_published(writer):
                self.catalog.refresh()
                if self.catalog.damaged:
                    log.warning("%s: what writer %s left stays: an index is damaged", self.storage.place, writer.hex())
                    continue
                freed += self._remove_uncovered(writer)
            elif any(summary.error for summary in self.backups()):
                log.warning("%s: what writer %s left stays: a manifest is damaged", self.storage.place, writer.hex())
                continue
            self.storage.delete(info.name)
        if freed:
            log.info("%s: removed %d bytes that killed writers left", self.storage.place, freed)
        return freed

    def _remove_uncovered(self, writer: bytes) -> int:
        """Remove a writer's packs that no index tells of; their bytes."""
        freed = 0
        covered = self.catalog.covered()
        for pack in list(self.storage.list(pack_name(writer + bytes(4))[:-8])):
            pack_id = object_id(pack.name)
            if pack_id is not None and pack_id not in covered and self.storage.delete(pack.name):
                freed += pack.size
        return freed

    def info(self) -> dict[str, object]:
        """Figures of the repository for ``repository info``; sizes in bytes."""
        packs = self.catalog.list_packs()
        return {
            "id": self.id,
            "place": self.storage.place,
            "created": self.header.created,
            "hash": "blake3-keyed",
            "chunk_size": self.header.chunk_size,
            "fanout": self.header.fanout,
            "backups": sum(1 for _ in self.storage.list(f"{MANIFESTS}/")),
            "packs": len(packs),
            "pack_bytes": sum(packs.values()),
            "chunks": len(self.catalog.refresh()),
            "free_bytes": self.storage.free_bytes(),
        }


def session_name(writer: bytes) -> str:
    """The object that tells that this writer is at work."""
    return f"{SESSIONS}/{writer.hex()}"


def _session_writer(name: str) -> bytes | None:
    try:
        writer = bytes.fromhex(name.removeprefix(f"{SESSIONS}/"))
    except ValueError:
        return None
    return writer if len(writer) == WRITER_ID else None
