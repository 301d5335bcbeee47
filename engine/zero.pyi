"""Zero detection."""

from typing_extensions import Buffer

def all_zero(data: Buffer) -> bool:
    """Whether every byte of ``data`` is zero; true for no bytes."""

def zero_chunks(data: Buffer, chunk_size: int) -> list[bool]:
    """One bool for each chunk of ``data`` (the last may be short): whether it is all zeros."""
