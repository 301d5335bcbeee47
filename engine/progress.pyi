"""Counters of a running copy, readable from other threads, and the flag that stops it."""

class Progress:
    """One may serve several copies in turn: every copy adds to it.

    ``total`` is the number of bytes of all of them; when it is 0, the first copy sets it to the size of its image.
    """

    bytes_total: int
    """Bytes of the image or images."""
    bytes_done: int
    """Bytes that are in the sink (or on the target) now, zeros included."""
    bytes_read: int
    """Bytes that travelled from the source."""
    bytes_written: int
    """Bytes that were written to a target or cleared there; copies out of the repository count them."""
    zero_bytes: int
    """Of ``bytes_done``: known or found to be zeros."""

    def __init__(self, total: int = 0) -> None: ...
    def cancel(self) -> None:
        """Any thread: the copy raises Cancelled within about 200 ms. It cannot be taken back."""

    @property
    def cancelled(self) -> bool: ...
