"""Packs: header, records, the pack's own index, trailer."""

from typing_extensions import Buffer

from vmbackupd.engine.zstd import Codec

HEADER: int
"""Bytes before the first record."""
TRAILER: int
"""Bytes at the end of a pack, after its own index."""

def check_header(data: Buffer, repository: bytes, pack_id: bytes, label: str, *, encrypted: bool = False) -> None:
    """Is ``data`` (the first 64 bytes of an object) the header of this pack? RepositoryCorrupt if not.

    ``encrypted``: is the repository? A pack of the other sort does not belong there.
    """

def parse_trailer(data: Buffer, size: int, pack_id: bytes, label: str) -> tuple[int, int]:
    """(offset of the pack's own index, number of entries) out of the last 80 bytes of a pack of ``size`` bytes."""

def check_tail(tail: Buffer, key: bytes, label: str) -> bytes:
    """The entries out of ``tail`` (own index and trailer); RepositoryCorrupt if they do not match the keyed hash."""

def scan_records(
    data: Buffer, chunk_key: bytes, node_key: bytes, codec: Codec, *, content_key: bytes | None = None
) -> bytes:
    """The entries of a pack whose own index is lost, made by reading its records from the front.

    ``data`` is the whole object. Each record's content is checked against its name; the scan ends at the first one that
    does not match, since nothing after it is known to begin where it seems to. ``codec`` belongs to the caller's thread.
    ``content_key``: of a repository that is encrypted.
    """
