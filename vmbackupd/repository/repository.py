"""A repository: backups that are published, and the way to their images."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.index import IndexSet
from vmbackupd.errors import InvalidArgument, NotEncrypted, NotFound, RepositoryCorrupt
from vmbackupd.repository import envelope
from vmbackupd.repository.catalog import WRITER_ID, Catalog, PackStorage, object_id, pack_name
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header
from vmbackupd.repository.keys import (
    KeySource,
    SlotInfo,
    add_slot,
    list_slots,
    new_master_key,
    revoke_slot,
    slot_name,
    unlock,
)
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
FANOUT = 128
LARGEST_BLOB = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """How a writer works: nothing of it is part of the format.

    ``level``: zstd's; ``workers``: threads that hash and compress, 0 for one a processor, at most 8; ``pack_size``:
    bytes of a pack; ``segment_entries``: chunks new to the repository that are kept in memory before they are sorted
    into a file; ``cipher``: id of the one to write an encrypted repository with, 0 for the faster one of this host.
    """

    level: int = 1
    workers: int = 0
    pack_size: int = 16 * 2**20
    segment_entries: int = 2**19
    cipher: int = 0

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
    def create(
        cls,
        storage: Storage,
        *,
        chunk_size: int = CHUNK_SIZE,
        settings: Settings | None = None,
        keys: Sequence[KeySource] = (),
    ) -> Repository:
        """Make a repository, encrypted if there are ``keys``: each of them opens it from then on.

        InvalidArgument if there is one or a key will not do, KeyRequired, StorageError, RepositoryFull. A local
        directory must exist: ``LocalStorage.create`` makes it.
        """
        if keys and storage.stat(HEADER_NAME) is not None:
            raise InvalidArgument(f"there is a repository at {storage.place} already")
        header = Header.new(chunk_size=chunk_size, fanout=FANOUT, master=new_master_key() if keys else None)
        # the slots come first: a header without them would be a repository that nobody can open
        slots = [add_slot(storage, header, header.master or b"", source, source.kind) for source in keys]
        if not storage.put_if_absent(HEADER_NAME, [header.encode()]):
            for slot in slots:
                storage.delete(slot_name(slot.id))
            raise InvalidArgument(f"there is a repository at {storage.place} already")
        return cls._opened(storage, header, settings)

    @classmethod
    def open(cls, storage: Storage, *, settings: Settings | None = None, keys: Sequence[KeySource] = ()) -> Repository:
        """Open a repository. With ``keys`` it has to be an encrypted one, which one of them opens.

        RepositoryMissing, KeyRequired, WrongKey, NotEncrypted, RepositoryCorrupt, StorageError.
        """
        header = Header.load(storage)
        if header.encrypted:
            header = header.unlocked(unlock(storage, header, keys))
        elif keys:
            raise NotEncrypted(
                f"the repository at {storage.place} is not encrypted, but a key is configured for it: if that is meant "
                "so, take the key out of the configuration; if not, somebody put another repository in its place"
            )
        return cls._opened(storage, header, settings)

    @classmethod
    def _opened(cls, storage: Storage, header: Header, settings: Settings | None) -> Repository:
        repository = cls(storage, header, settings or Settings())
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
            try:
                found.append(BackupSummary.of(self.listed_manifest(info.name)))
            except NotFound:
                continue  # deleted since the listing
            except (RepositoryCorrupt, InvalidArgument) as reason:
                found.append(BackupSummary(info.name.removeprefix(f"{MANIFESTS}/"), error=str(reason)))
        return sorted(found, key=lambda summary: (summary.t1, summary.id))

    def manifest_object(self, backup_id: str) -> str:
        """The object that holds a backup's manifest."""
        return f"{MANIFESTS}/{self.header.manifest_name(backup_id)}"

    def manifest(self, backup_id: str) -> Manifest:
        """The manifest of a backup. NotFound, InvalidArgument, RepositoryCorrupt, StorageError."""
        if not BACKUP_ID.fullmatch(backup_id):
            raise InvalidArgument(f"{backup_id!r} is no backup id")
        return self._read_manifest(self.manifest_object(backup_id), backup_id)

    def listed_manifest(self, name: str) -> Manifest:
        """The manifest in an object ``manifests/…`` that was listed: where a repository is encrypted, its name does not
        tell the backup's id. NotFound, InvalidArgument, RepositoryCorrupt, StorageError."""
        last = name.removeprefix(f"{MANIFESTS}/")
        if not BACKUP_ID.fullmatch(last):
            raise InvalidArgument(f"{last!r} is no backup id")
        return self._read_manifest(name, last)

    def _read_manifest(self, name: str, backup: str) -> Manifest:
        """``backup``: what to call it."""
        what = f"manifest of backup {backup}"
        try:
            data = self.storage.get(name, 0, MAX_BYTES + 2**16)
        except FileNotFoundError:
            raise NotFound(f"there is no backup {backup} in the repository at {self.storage.place}") from None
        content = envelope.unseal(MANIFEST_MAGIC, self.header, data, what)
        fields = parse_object(content, what=what, max_length=MAX_BYTES, error=RepositoryCorrupt)
        manifest = Manifest.from_json(fields, at=what)
        if self.manifest_object(manifest.id) != name:
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
            content_key=self.header.content_key,
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

    # ---- keys

    def key_slots(self) -> list[SlotInfo]:
        """The secrets that open this repository. StorageError."""
        return list_slots(self.storage, self.header)

    def add_key(self, source: KeySource, label: str) -> SlotInfo:
        """One more secret that opens it. InvalidArgument, KeyRequired, StorageError."""
        if self.header.master is None:
            raise InvalidArgument(f"the repository at {self.storage.place} is not encrypted")
        return add_slot(self.storage, self.header, self.header.master, source, label)

    def revoke_key(self, slot_id: str) -> None:
        """A secret opens it no more. NotFound, InvalidArgument for the last one, StorageError."""
        revoke_slot(self.storage, self.header, slot_id)

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
                if self.listed_manifest(info.name).writer == writer.hex():
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
            "encrypted": self.header.encrypted,
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
