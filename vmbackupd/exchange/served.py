"""A volume of a backup that is being served: any range of it, for any number of threads. It is the server's process
that runs this."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from vmbackupd.engine.readable import ReadableSource
from vmbackupd.exchange.volumes import find_volume
from vmbackupd.repository import Manifest, Repository, Settings, Storage
from vmbackupd.repository.header import Header
from vmbackupd.repository.t1 import t1_image


@dataclass(frozen=True)
class ServeRequest:
    """What a server has to know, pickled by its owner. ``header`` is that of an open repository, with its keys."""

    storage: Storage
    header: Header
    settings: Settings
    manifest: Manifest
    volume: str


class ServedVolume:
    """Opens lazily: nothing but the root of the image's tree is read before somebody asks for bytes.

    A reader of an image is for one thread, so there is a pool of them; the one used last comes first, since what it has
    in memory is what the next request of the same client is likely to want.
    """

    def __init__(self, repository: Repository, manifest: Manifest, volume: str) -> None:
        """Raises ``NotFound``, ``RepositoryCorrupt``, ``StoreCorrupt``, ``StorageError``."""
        self._repository = repository
        self._manifest = manifest
        self._record = find_volume(manifest, volume)
        self._lock = threading.Lock()
        self._idle = [self._open()]
        # More readers than this only use memory: what they do is bound by the processors.
        self._places = threading.Semaphore(max(8, 2 * len(os.sched_getaffinity(0))))
        self.size = self._record.size
        self.chunk_size = self._idle[0].source.chunk_size

    @classmethod
    def of(cls, request: ServeRequest) -> ServedVolume:
        """The volume of a request from another process."""
        repository = Repository(request.storage, request.header, request.settings)
        repository.catalog.refresh()
        return cls(repository, request.manifest, request.volume)

    def read(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill ``buffer`` from byte ``offset``.

        Raises ``RepositoryCorrupt``, ``StorageError``; ``ValueError`` beyond the end.
        """
        with self._reader() as reader:
            reader.read_buffer(offset, buffer)

    def extents(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """``(offset, length, is data)``, adjacent, from ``offset`` on; not all of them if there are very many."""
        with self._reader() as reader:
            return reader.extents(offset, length)

    def close(self) -> None:
        """Close the repository. No other method may be running."""
        self._repository.close()

    @contextmanager
    def _reader(self) -> Iterator[ReadableSource]:
        with self._places:
            with self._lock:
                reader = self._idle.pop() if self._idle else None
            reader = reader or self._open()
            try:
                yield reader
            finally:
                with self._lock:
                    self._idle.append(reader)

    def _open(self) -> ReadableSource:
        return ReadableSource(t1_image(self._repository, self._manifest, self._record))
