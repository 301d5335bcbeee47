"""The entries of several index files in one order: what merging and liveness are made of."""

from collections.abc import Callable, Iterable

from vmbackupd.engine.index import IndexFile

class EntryScan:
    """Entries of index files, merged. One thread at a time, once from front to end."""

    packs: list[bytes]
    """The ids of the packs whose entries are wanted."""

    def __init__(self, files: Iterable[IndexFile], keep: Callable[[bytes], bool] | None = None) -> None:
        """``keep(pack_id)``: are the entries of this pack wanted? None: of all."""

def merge_files(
    files: Iterable[IndexFile],
    fd: int,
    *,
    key: bytes,
    repository: bytes,
    index: bytes,
    keep: Callable[[bytes], bool] | None = None,
    stop: Callable[[], bool] | None = None,
) -> tuple[int, list[bytes]] | None:
    """Write one index file with the entries of ``files`` to ``fd``, an empty file; (entries, ids of its packs).

    ``keep(pack_id)``: are the entries of this pack wanted? ``stop()`` is asked now and then; when it is true, None is
    returned. ``key`` is the seal key, ``repository`` and ``index`` are 16 byte ids. RepositoryCorrupt if a file is
    damaged (nothing is left out silently), StorageError.
    """
