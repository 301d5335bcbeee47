"""The index files of a repository: opening them, noticing new ones, and making them again from the packs."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from vmbackupd.engine import pack as packs
from vmbackupd.engine.index import BlockCache, IndexFile, IndexSet, encode_entries, pack_entries
from vmbackupd.engine.indexscan import merge_files
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
PIECE = 8 * 2**20  # bytes of an index that are fetched at once
MOST_FILES = 8  # index files at which a merge leaves them as they are
MOST_KEPT = 4  # of those that are merged, the largest that may stay
MOST_FAILURES = 3  # packs that cannot be read, and none that can, before a storage counts as failing
MOST_LISTINGS = 20  # until two agree
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


def kept_files(counts: Sequence[int]) -> int:
    """How many of the index files, largest first, of so many entries each, a merge leaves alone.

    All if they are few enough. Else those of the first ``MOST_KEPT`` that hold at least twice as many entries as all
    after them together, so that rewriting the rest costs little beside them.
    """
    if len(counts) <= MOST_FILES:
        return len(counts)
    kept = 0
    while kept < MOST_KEPT and counts[kept] >= 2 * sum(counts[kept + 1 :]):
        kept += 1
    return kept


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
        self._merging = threading.Lock()
        self._merger: threading.Thread | None = None
        self._closing = threading.Event()
        self._fruitless: set[bytes] = set()

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
            before = self._files.keys()
            known = before | self._damaged
            for _ in range(MOST_LISTINGS):
                listed = {info.name for info in self._storage.list(f"{INDEXES}/")}
                # A listing is no snapshot: it can miss both the file that replaces others and the others. So after a
                # change two listings have to agree, or packs would seem uncovered.
                if listed == known:
                    break
                self._files = self._open_new(listed)
                known = self._files.keys() | self._damaged
            if self._files.keys() != before:
                self._set = IndexSet((self._files[name] for name in sorted(self._files)), cache=self._cache)
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
            except FileNotFoundError:
                continue  # replaced by another host since the listing
            except RepositoryCorrupt as reason:
                log.warning("%s: %s; its packs are searched instead", self._storage.place, reason)
                self._damaged.add(name)
        return files

    def _open(self, name: str) -> IndexFile:
        descriptor = self._storage.open(name)
        if descriptor is None:
            descriptor = spill_file(self._pieces(name))
        index_id = object_id(name)
        if index_id is None:
            os.close(descriptor)
            raise RepositoryCorrupt(f"{name} is no name of an index")
        return IndexFile(descriptor, self._header.keys.seal, self._header.id, name, index_id)

    def _pieces(self, name: str) -> Iterator[bytes]:
        """An object's bytes, without ever holding all of them."""
        at = 0
        while True:
            piece = self._storage.get(name, at, PIECE)
            yield piece
            at += len(piece)
            if len(piece) < PIECE:
                return

    def covered(self, *, damaged: bool = True) -> set[bytes]:
        """The packs that index files tell of; without ``damaged`` only those whose entries can all be found, because no
        damage was met in their index so far."""
        return {pack_id for file in self._set.files if damaged or not file.damaged for pack_id in file.pack_ids()}

    def list_packs(self) -> dict[bytes, int]:
        """Sizes of all packs, in bytes, by id."""
        found = ((object_id(info.name), info.size) for info in self._storage.list(f"{PACKS}/"))
        return {pack_id: size for pack_id, size in found if pack_id is not None}

    def pack_ids(self) -> set[bytes]:
        """The ids of all packs: several times as fast as with their sizes."""
        found = (object_id(info.name) for info in self._storage.list(f"{PACKS}/", sizes=False))
        return {pack_id for pack_id in found if pack_id is not None}

    # ---- fewer and smaller files

    def merge(self, stop: Callable[[], bool] | None = None) -> int:
        """Replace index files by one that holds what they hold, if there are many; how many were replaced.

        The large ones stay as long as the small ones are few beside them: each entry is written about as often as the
        index doubles. Any number of hosts may do this at once. Waits for a merge that another thread is at. ``stop`` is
        asked now and then: true ends it, and nothing was done.
        """
        with self._merging:
            files = sorted(self.refresh().files, key=lambda file: file.count, reverse=True)
            sound = [file for file in files if not file.damaged and file.label in self._files]
            chosen = sound[kept_files([file.count for file in sound]) :]
            return len(chosen) if len(chosen) > 1 and self._replace(chosen, self.pack_ids(), stop) else 0

    def merge_soon(self) -> None:
        """``merge`` in a thread of its own, unless that is at work already. ``close`` ends it."""
        with self._lock:
            if len(self._set.files) <= MOST_FILES or (self._merger is not None and self._merger.is_alive()):
                return
            self._closing.clear()
            self._merger = threading.Thread(target=self._merge_quietly, name="vmbackup-merge", daemon=True)
            self._merger.start()

    def _merge_quietly(self) -> None:
        try:
            self.merge(self._closing.is_set)
        except BackupError as reason:  # nothing is lost: a later writer tries again
            log.warning("%s: merging index files: %s", self._storage.place, reason)

    def close(self) -> None:
        """Stop the merge that is under way, if any. Safe to call twice; the catalog stays usable."""
        with self._lock:
            merger, self._merger = self._merger, None
        self._closing.set()
        if merger is not None:
            merger.join()

    def drop_gone(self) -> int:
        """Replace the index files that tell of packs that are gone by files that do not; how many.

        A file with damaged blocks stays as it is (see ``rebuild``). RepositoryFull, StorageError: what was not replaced
        yet stays.
        """
        with self._merging:
            files = [file for file in self.refresh().files if file.label in self._files]
            present = self.pack_ids()
            return sum(
                self._replace([file], present, None) for file in files if not present.issuperset(file.pack_ids())
            )

    def _replace(self, files: Sequence[IndexFile], present: Collection[bytes], stop: Callable[[], bool] | None) -> bool:
        """Put a file with the entries of ``files`` beside them, then remove them; False if that was not done.

        ``present``: all packs, listed after the files were opened. What these tell of others is gone for good.
        """
        try:
            merged = self._merged(files, present.__contains__, stop)
        except RepositoryCorrupt as reason:
            log.warning("%s: %s; it stays as it is", self._storage.place, reason)
            return False
        if merged is None:
            return False
        if merged.pack_ids():
            self._storage.put_if_absent(merged.label, merged.parts())
            self.refresh()
            if merged.label not in self._files:
                raise StorageError(f"{self._storage.place}: {merged.label} is not there though it was written")
        for file in files:
            try:
                self._storage.delete(file.label)
            except BackupError as reason:  # what it tells is told twice: the next merge tries again
                log.warning("%s: %s stays though it was merged: %s", self._storage.place, file.label, reason)
        self.refresh()
        return True

    def _merged(
        self, files: Sequence[IndexFile], keep: Callable[[bytes], bool], stop: Callable[[], bool] | None
    ) -> IndexFile | None:
        """A temporary file with the entries of ``files``; None if stopped."""
        index_id, keys = secrets.token_bytes(PACK_ID), self._header.keys
        repository = self._header.id
        descriptor = spill_file()
        try:
            done = merge_files(
                files, descriptor, key=keys.seal, repository=repository, index=index_id, keep=keep, stop=stop
            )
        except BaseException:
            os.close(descriptor)
            raise
        if done is None:
            os.close(descriptor)
            return None
        return IndexFile(descriptor, keys.seal, repository, index_name(index_id), index_id)

    def give_up_one(self) -> bool:
        """Remove the smallest index file, which can be made again from its packs, to make room for what cannot wait:
        False if there is none. StorageError."""
        found = sorted(self._storage.list(f"{INDEXES}/"), key=lambda info: info.size)
        if not found:
            return False
        name = found[0].name
        log.warning("%s is full: %s is removed, it is made again when there is room", self._storage.place, name)
        self._storage.delete(name)
        return True

    # ---- making them again

    def rebuild(self, unfinished: Iterable[bytes], condemned: Iterable[bytes] = ()) -> int:
        """Make an index file of the packs that no sound index covers; how many there were.

        The order of looking matters, so both are lazy iterables: ``unfinished``, the 12 byte ids of writers whose packs
        do not count yet, is read after the packs were listed; ``condemned``, the ids of packs that are to be left out,
        after the indexes were. Index files that are damaged go when others tell all that they could.
        """
        with self._lock:
            present = self.pack_ids()
            waiting = set(unfinished)
            self.refresh()
            present.difference_update(condemned)
            done = self._rebuild(present, waiting)
            self._remove_damaged(present)
            return done

    def _rebuild(self, present: set[bytes], waiting: set[bytes]) -> int:
        uncovered = present - self.covered(damaged=False)
        wanted = {pack_id for pack_id in uncovered if pack_id[:WRITER_ID] not in waiting}
        if not wanted or wanted == self._fruitless:
            return 0
        done = failed = 0
        table, read = bytearray(), list[bytes]()
        for pack_id in sorted(wanted):
            try:
                info = self._storage.stat(pack_name(pack_id))
                if info is None:
                    continue  # its writer gave up since the listing
                entries, limit = self.read_pack_entries(pack_id, info.size)
                table += pack_entries(entries, len(read), limit, pack_name(pack_id))
            except FileNotFoundError:
                continue  # its writer gave up since the listing
            except RepositoryCorrupt as reason:
                log.warning("%s: %s", self._storage.place, reason)
                continue
            except StorageError as reason:  # a bad sector hides no other pack; a store that fails is no bad sector
                log.warning("%s: %s", self._storage.place, reason)
                failed += 1
                if failed == MOST_FAILURES and not done:
                    raise
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
        elif not failed:
            self._fruitless = wanted
        return done

    def _remove_damaged(self, present: Collection[bytes]) -> None:
        """Remove damaged index files if every pack is covered by a sound one: what they tell is known then."""
        damaged = self._damaged | {file.label for file in self._set.files if file.damaged and file.label in self._files}
        if not damaged or not self.covered(damaged=False).issuperset(present):
            return
        try:
            for name in damaged:
                self._storage.delete(name)
                log.warning("%s: removed %s, which is damaged; all of it is known", self._storage.place, name)
            self.refresh()
        except BackupError as reason:  # it does no harm
            log.warning("%s: removing a damaged index: %s", self._storage.place, reason)

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
        start = self._storage.get(name, 0, packs.HEADER)
        packs.check_header(start, self._header.id, pack_id, name, encrypted=self._header.encrypted)
        try:
            return self.own_entries(pack_id, size)
        except RepositoryCorrupt as reason:
            log.warning("%s: %s; its records are read instead", self._storage.place, reason)
        keys = self._header.keys
        data = self._storage.get(name)
        codec = Codec(1, LARGEST_CONTENT)
        entries = packs.scan_records(data, keys.chunk, keys.node, codec, content_key=self._header.content_key)
        return entries, len(data)

    def own_entries(self, pack_id: bytes, size: int) -> tuple[bytes, int]:
        """A pack's own index, all or nothing, and where its records end. RepositoryCorrupt, FileNotFoundError,
        StorageError."""
        name = pack_name(pack_id)
        if size < packs.HEADER + packs.TRAILER:
            raise RepositoryCorrupt(f"{name} is truncated: it has {size} bytes")
        trailer = self._storage.get(name, size - packs.TRAILER, packs.TRAILER)
        offset, _ = packs.parse_trailer(trailer, size, pack_id, name)
        tail = self._storage.get(name, offset, size - offset)
        return packs.check_tail(tail, self._header.keys.seal, name), offset
