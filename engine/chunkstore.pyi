"""The way into the repository: workers name, look up and compress chunks, and fill packs."""

from collections.abc import Callable, Iterable

from typing_extensions import Buffer

from vmbackupd.engine.index import IndexSet

class ChunkStore:
    """A writer's chunks on their way into packs. Any number of threads at once; close() ends its threads."""

    pack_size: int
    level: int
    largest: int
    workers: int
    cipher: int
    """Id of the cipher of the packs, 0 where they have none."""
    packs: int
    """Packs begun so far."""
    bytes_stored: int
    """Bytes of all records begun so far."""

    def __init__(
        self,
        index: IndexSet,
        *,
        chunk_key: bytes,
        node_key: bytes,
        seal_key: bytes,
        repository: bytes,
        writer: bytes,
        put_pack: Callable[[bytes, list[Buffer]], None],
        spill_file: Callable[[Iterable[Buffer]], int],
        workers: int,
        level: int = 1,
        largest: int = 65536,
        pack_size: int = ...,
        segment_entries: int = ...,
        content_key: bytes | None = None,
        cipher: int = 0,
    ) -> None:
        """
        ``index``: what is known already. Keys have 32 bytes, ``repository`` 16, ``writer`` (the first part of every
        pack id) 12. ``put_pack(pack_id, parts)`` makes a pack durable and is called from this object's threads;
        ``spill_file(parts)`` writes to a temporary file and returns its descriptor. ``largest``: bytes of the longest
        content; ``pack_size``: bytes at which a pack is closed. ``content_key``: that of an encrypted repository, and
        ``cipher`` the id of the cipher to write with, 0 for the one that is faster here. ValueError for sizes out of
        range.
        """

    def start(self) -> None:
        """Start the threads; close() must follow."""

    def fail(self, reason: BaseException) -> None:
        """Nothing can be stored any more; every thread that tries gets ``reason``."""

    def copy_record(self, name: bytes, kind: int, raw: int, compression: int, payload: Buffer) -> bool:
        """Store a record that another pack holds, as ``ChunkReader.record`` gave it. Was it new to this writer?

        What published indexes know does not count, only what this writer stored itself: that is what repacking needs.
        ``raw``: bytes of the content; ``payload``: the content, compressed if ``compression`` is 1. Nothing is checked
        here but sizes (ValueError). Any thread; waits while packs are being written.
        """

    def finish(self) -> list[tuple[bytes, Iterable[Buffer]]]:
        """Write what is left and end the threads. Every image must be finished.

        Returns the index files to publish: a list of (16 byte id, iterable of buffers).
        """

    def close(self) -> None:
        """End the threads, whatever is left to do. Safe to call twice."""

    def pack_ids(self) -> list[bytes]:
        """The ids of all packs begun so far, 16 bytes each."""

    def knows(self, name: bytes) -> bool:
        """Is this 32 byte name stored, published or not?"""
