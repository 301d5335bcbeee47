"""Records on their way from packs that are to go into new ones, under a session of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.index import IndexSet
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository.output import Output
from vmbackupd.repository.sessions import Session

if TYPE_CHECKING:
    from vmbackupd.repository.repository import Repository


class Copier:
    """A context manager: what is not finished when it ends is removed."""

    def __init__(self, repository: Repository, reader: ChunkReader) -> None:
        """Nothing is claimed before there is something to copy."""
        self._repository = repository
        self._reader = reader
        self._output: Output | None = None
        self.bytes_copied = 0

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        output, self._output = self._output, None
        if output is not None:
            output.abort()

    def copy(self, name: bytes, kind: int) -> bool:
        """Copy a record, checked; False if no sound copy of it can be read. StorageError, RepositoryFull."""
        try:
            compression, raw, payload = self._reader.record(name, kind)
        except RepositoryCorrupt:
            return False
        if self._output is None:
            session = Session(self._repository.storage, self._repository.header, "gc")
            self._output = Output(self._repository, session, IndexSet())
        if self._output.store.copy_record(name, kind, raw, compression, payload):
            self.bytes_copied += len(payload)
        return True

    def finish(self) -> None:
        """Make the copies durable, and visible to everybody. StorageError, RepositoryFull, SessionLost."""
        output = self._output
        if output is not None:
            output.finish()
            self._output = None
            output.store.close()
            output.session.end()
