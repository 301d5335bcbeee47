"""The index files of a repository: opening them, noticing new ones, and making them again from the packs."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from vmbackupd.engine import pack as packs
from vmbackupd.engine.index import BlockCache, IndexFile, IndexSet, encode_entries, pack_entries
from vmbackupd.engine.zstd import Codec
from vmbackupd.errors import BackupError, RepositoryCorrupt, StorageError
from vmbackupd.repository.header import Header
from vmbackupd.repository.storage import Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

INDEXES = "indexes"
PACKS = "packs"
PACK_ID = 16
WRITER_ID = 12
LARGEST_CONTENT = 8 * 2**20
REBUILT_BYTES = 2**24  # bytes of the entries of a rebuilt index at which the next one is begun: bounds memory


def index_name(index_id: bytes) -> str:
    """The object that holds this index."""
    return f"{INDEXES}/{index_id.hex()}"


def pack_name(pack_id: bytes) -> str:
    """The object that holds this pack. A writer's packs share a directory."""
    return f"{PACKS}/{pack_id.hex()[:2]}/{pack_id.hex()}"


def object_id(name: str) -> bytes | None:
    """The 16 byte id at the end of an object's name; None if that is not what it ends with."""
    last = name.rpartition("/")[2]
    try:
        value = bytes.fromhex(last)
    except ValueError:
        return None
    return value if len(value) == PACK_ID and value.hex() == last else None


def spill_file(parts: Iterable[Buffer] = ()) -> int:
    """The descriptor of a new temporary file without a name, holding ``parts``."""
    directory = "/var/tmp" if os.access("/var/tmp", os.W_OK) else None  # /tmp is memory on many hosts
    try:
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            for part in parts:
                view = memoryview(part).cast("B")
                while view:
                    view = view[file.write(view) :]
            return os.dup(file.fileno())
    except OSError as reason:
        raise StorageError(f"temporary file in {directory or tempfile.gettempdir()}: {reason}") from reason


class PackStorage:
    """Packs as the engine's reader asks for them."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def open_pack(self, pack_id: bytes) -> int | None:
        """A descriptor, or None where the storage has no files. FileNotFoundError, StorageError."""
        return self._storage.open(pack_name(pack_id))

    def read_pack(self, pack_id: bytes, offset: int, length: int) -> bytes:
        """A range of a pack. FileNotFoundError, StorageError."""
        return self._storage.get(pack_name(pack_id), offset, length)


class Catalog:
    """All index files of a repository. Any number of threads at once."""

    def __init__(self, storage: Storage, header: Header) -> None:
        self._storage = storage
        self._header = header
        self._lock = threading.RLock()
        self._files: dict[str, IndexFile] = {}
        self._damaged: set[str] = set()
        self._cache = BlockCache()  # one for all sets: memory does not grow with the number of writers
        self._set = IndexSet(cache=self._cache)
        self._fruitless: frozenset[bytes] = frozenset()

    @property
    def current(self) -> IndexSet:
        """The index files as of the last refresh."""
        return self._set

    @property
    def damaged(self) -> frozenset[str]:
        """Names of index objects that could not be opened."""
        return frozenset(self._damaged)

    def refresh(self) -> IndexSet:
        """Open index files that are new, forget those that are gone."""
        with self._lock:
            while True:
                names = {info.name for info in self._storage.list(f"{INDEXES}/")}
                try:
                    files = self._open_new(names)
                    break
                except FileNotFoundError:
                    continue  # replaced by another host since the listing: list again, or its packs seem uncovered
            if files.keys() != self._files.keys():
                self._files = files
                self._set = IndexSet((files[name] for name in sorted(files)), cache=self._cache)
            return self._set

    def for_writer(self, present: Collection[bytes], condemned: Collection[bytes]) -> IndexSet:
        """What a writer may rely on: the index files of now, but only entries of packs that are ``present`` and not
        ``condemned`` (16 byte ids; sets, or dictionaries by id).

        Both must be listed before this is called, the condemned ones first: then whatever an outdated index tells hurts
        nobody.
        """
        return IndexSet(self.refresh().files, present=present, condemned=condemned, cache=self._cache)

    def _open_new(self, names: set[str]) -> dict[str, IndexFile]:
        files = {name: file for name, file in self._files.items() if name in names}
        self._damaged &= names
        for name in sorted(names - files.keys() - self._damaged):
            try:
                files[name] = self._open(name)
            except RepositoryCorrupt as reason:
                log.warning("%s: %s; its packs are searched instead", self._storage.place, reason)
                self._damaged.add(name)
        return files

    def _open(self, name: str) -> IndexFile:
        descriptor = self._storage.open(name)
        if descriptor is None:
            descriptor = spill_file([self._storage.get(name)])
        index_id = object_id(name)
        if index_id is None:
            os.close(descriptor)
            raise RepositoryCorrupt(f"{name} is no name of an index")
        return IndexFile(descriptor, self._header.keys.seal, self._header.id, name, index_id)

    def covered(self, *, damaged: bool = True) -> set[bytes]:
        """The packs that index files tell of; without ``damaged`` only those whose entries can all be found, because no
        damage was met in their index so far."""
        return {pack_id for file in self._set.files if damaged or not file.damaged for pack_id in file.pack_ids()}

    def list_packs(self) -> dict[bytes, int]:
        """Sizes of all packs, in bytes, by id."""
        found = ((object_id(info.name), info.size) for info in self._storage.list(f"{PACKS}/"))
        return {pack_id: size for pack_id, size in found if pack_id is not None}

    def rebuild(self, unfinished: Iterable[bytes]) -> int:
        """Make an index file of the packs that no index covers; how many there were.

        The packs must be listed before the writers at work are: the caller passes a function's result for
        ``unfinished``, the 12 byte ids of writers whose packs do not count yet, as a lazy iterable that is read after.
        """
        with self._lock:
            present = self.list_packs()
            waiting = set(unfinished)
            self.refresh()
            covered = self.covered(damaged=False)
            wanted = {
                pack_id: size
                for pack_id, size in present.items()
                if pack_id not in covered and pack_id[:WRITER_ID] not in waiting
            }
            if not wanted or frozenset(wanted) == self._fruitless:
                return 0
            done = 0
            table, read = bytearray(), list[bytes]()
            for pack_id in sorted(wanted):
                try:
                    entries, limit = self.read_pack_entries(pack_id, wanted[pack_id])
                    table += pack_entries(entries, len(read), limit, pack_name(pack_id))
                except FileNotFoundError:
                    continue  # its writer gave up since the listing
                except RepositoryCorrupt as reason:
                    log.warning("%s: %s", self._storage.place, reason)
                    continue
                read.append(pack_id)
                done += 1
                if len(table) >= REBUILT_BYTES:
                    self._add(table, read)
                    table, read = bytearray(), list[bytes]()
            if read:
                self._add(table, read)
            if done:
                log.warning("%s: made an index of %d packs that none covered", self._storage.place, done)
            else:
                self._fruitless = frozenset(wanted)
            return done

    def _add(self, table: bytearray, read: list[bytes]) -> None:
        """Publish a rebuilt index. Where the storage cannot take it, it is used by this process alone."""
        index_id = secrets.token_bytes(PACK_ID)
        parts = encode_entries(table, self._header.keys.seal, self._header.id, index_id, read)
        name = index_name(index_id)
        try:
            self._storage.put_if_absent(name, parts)
        except BackupError as reason:
            log.warning("the rebuilt index is kept in memory only: %s", reason)
            file = IndexFile(spill_file(parts), self._header.keys.seal, self._header.id, name, index_id)
            # not in self._files: the next refresh that finds a change forgets it, and it is rebuilt when needed
            self._set = IndexSet([*self._set.files, file], cache=self._cache)
            return
        self.refresh()

    def read_pack_entries(self, pack_id: bytes, size: int) -> tuple[bytes, int]:
        """A pack's entries, and where its records end: from its own index, or from its records if that is damaged.

        RepositoryCorrupt if it is no pack at all, FileNotFoundError, StorageError.
        """
        name = pack_name(pack_id)
        packs.check_header(self._storage.get(name, 0, packs.HEADER), self._header.id, pack_id, name)
        try:
            if size < packs.HEADER + packs.TRAILER:
                raise RepositoryCorrupt(f"{name} is truncated: it has {size} bytes")
            trailer = self._storage.get(name, size - packs.TRAILER, packs.TRAILER)
            offset, _ = packs.parse_trailer(trailer, size, pack_id, name)
            tail = self._storage.get(name, offset, size - offset)
            return packs.check_tail(tail, self._header.keys.seal, name), offset
        except RepositoryCorrupt as reason:
            log.warning("%s: %s; its records are read instead", self._storage.place, reason)
        keys = self._header.keys
        data = self._storage.get(name)
        return packs.scan_records(data, keys.chunk, keys.node, Codec(1, LARGEST_CONTENT)), len(data)
