"""Checking what is stored: every byte of packs by several threads, and trees by what the index and the packs tell."""

from collections.abc import Iterable, Mapping
from typing import Protocol

from vmbackupd.engine.chunkreader import ChunkReader, PackReader
from vmbackupd.engine.index import IndexSet
from vmbackupd.engine.progress import Progress

class PackSink(Protocol):
    """Called by the verifier's threads, one at a time."""

    def __call__(self, pack_id: bytes, size: int, reason: str | None, records: int, bad: list[tuple[bytes, int]]) -> None:
        """A pack was read to its end. ``reason``: None, or what is wrong with it; ``records``: how many it holds as far
        as its own index tells; ``bad``: (name, offset) of those that are damaged. A pack of which nothing is left has
        ``reason`` ``missing``."""

class PackVerifier:
    """Threads that read whole packs and check every record against its name."""

    def __init__(
        self,
        reader: ChunkReader,
        storage: PackReader,
        *,
        seal_key: bytes,
        repository: bytes,
        progress: Progress,
        rate: float = 0,
        workers: int = 0,
    ) -> None:
        """``rate``: bytes of packs a second, 0 for no limit. ``workers`` 0: one a processor, at most 8."""

    def run(self, packs: Iterable[tuple[bytes, int]], sink: PackSink) -> None:
        """Check packs of (id, size), in this order but several at once. Blocking; its threads have ended when it returns.

        ``progress.bytes_done`` counts bytes of packs. A damaged pack is no error. Errors: Cancelled, StorageError (the
        storage as a whole fails; a bad sector is damage), and what ``sink`` raises.
        """

class TreeChecker:
    """Says of trees whether everything they need is there. Keeps the names of sound nodes, so that what trees share is
    looked at once. One thread at a time."""

    nodes: int
    """Nodes read so far."""
    chunks: int
    """Names looked up so far."""

    def __init__(
        self,
        reader: ChunkReader,
        index: IndexSet,
        packs: Mapping[bytes, int],
        *,
        suspect: Iterable[bytes] = (),
        progress: Progress | None = None,
        counts: bool = True,
    ) -> None:
        """``packs``: the sizes of those that exist. ``suspect``: those that are not to be trusted; a chunk that only they
        hold is read. ``progress`` stops it, and counts bytes of images if ``counts``."""

    def check(self, tree: str) -> tuple[int, list[tuple[int, int, str, bytes, bytes]]]:
        """(bytes of the image, what is damaged: (offset, length, reason, name, id of a pack or empty), ascending).

        What is damaged are ranges in bytes; neighbours are not merged. Where even the root record cannot be read, it is one
        of no length, in an image of 0 bytes. InvalidArgument for what is no tree id, RepositoryCorrupt for a tree of
        another format, StorageError, Cancelled.
        """

    def used(self) -> set[bytes]:
        """Ids of the packs that chunks and nodes of the trees were found in."""

