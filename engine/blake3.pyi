"""BLAKE3 (hash and keyed hash, 32 bytes of output). ``lanes`` picks a kernel for tests; 0 is the widest of the machine."""

from typing_extensions import Buffer

def digest(data: Buffer, *, lanes: int = 0) -> bytes:
    """The plain hash, 32 bytes."""

def keyed_hash(key: bytes, data: Buffer, *, lanes: int = 0) -> bytes:
    """The keyed hash, 32 bytes. ``key`` has 32 bytes, else ValueError."""

def kernels() -> list[int]:
    """The widths (lanes) of the kernels that run here, narrowest first."""
