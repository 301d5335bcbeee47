"""zstd through libzstd's C API, with contexts that are made once."""

from typing_extensions import Buffer

class Codec:
    """A compressor and a decompressor with their memory; one thread at a time."""

    level: int
    """libzstd's compression level."""
    capacity: int
    """Bytes of the room compressed content is made in."""

    def __init__(self, level: int = 1, largest: int = 65536) -> None:
        """For content of up to ``largest`` bytes. ValueError for a level libzstd does not have."""

    def compress(self, data: Buffer) -> bytes | None:
        """The frame, or None where ``data`` does not shrink enough to be worth it. ``len(data)`` <= ``largest``."""

    def decompress(self, data: Buffer, length: int) -> bytes:
        """``length`` bytes of content out of one frame; ValueError if the frame is damaged or holds anything else."""
