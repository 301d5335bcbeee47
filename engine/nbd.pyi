"""One connection to an NBD export, over libnbd's C API."""

from types import TracebackType
from typing import Self

from typing_extensions import Buffer

class NbdConnection:
    """A connected export. Blocking: call from a worker thread, one call at a time (a second raises RuntimeError).

    ``fd`` is a connected stream socket on which the server is about to speak first (it is duplicated: close yours), or
    ``unix`` the path of a server's socket. ``bitmap`` names a dirty bitmap of QEMU's that the server is asked for, to be
    read by ``engine.dirty``; it is no error here if there is none. ``timeout`` bounds the handshake, ``stall_timeout``
    the silence of the server while something is asked of it (seconds).

    Errors: SourceError, or TargetError once this connection was written to; both name the export. An error of one
    request leaves the connection usable for reads and writes of this class; an error of the connection, a cancel, and
    any error inside a copy close it.
    """

    export: str
    size: int
    """Bytes."""
    read_only: bool
    can_block_status: bool
    """The server answers block status of ``base:allocation``."""
    has_bitmap: bool
    """The server answers block status of ``qemu:dirty-bitmap:`` and the name asked for."""
    can_zero: bool
    can_flush: bool
    min_block: int
    """Bytes; writes are multiples of it."""
    max_request: int
    """Bytes of one read or write on the wire; longer ones are split."""

    def __init__(
        self,
        *,
        fd: int | None = None,
        unix: str | None = None,
        export: str = "",
        bitmap: str | None = None,
        timeout: float = 30.0,
        stall_timeout: float = 300.0,
    ) -> None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def busy(self) -> bool:
        """A call uses the connection at this moment."""

    def pread(self, offset: int, length: int) -> bytes:
        """A small read. ValueError if it is not inside the export."""

    def pwrite(self, offset: int, data: Buffer) -> None:
        """A small write, not flushed."""

    def sync(self) -> None:
        """Flush what was written, where the server can."""

    def cancel(self) -> None:
        """Any thread: what runs raises Cancelled within about 200 ms and closes the connection, for good."""

    def close(self) -> None:
        """Any thread, any number of times: cancels what runs, says goodbye, closes."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
