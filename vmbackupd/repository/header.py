"""The object ``repository.json``: what a repository is. Written once, by ``repository init``."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from dataclasses import dataclass

from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.errors import InvalidArgument, RepositoryCorrupt
from vmbackupd.typed import get_float, get_int, get_str, parse_object

NAME = "repository.json"
FORMAT = "vmbackupd"
VERSION = 1
BLAKE3_KEYED = 1

NODE_HEADER = 16
NAME_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Keys:
    """One key of 32 bytes for each use, made from the repository's hash key: names of chunks, names of nodes and root
    records, checksums of packs' indexes, index files and manifests."""

    chunk: bytes
    node: bytes
    seal: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a repository is. ``hash`` 1 is keyed BLAKE3; ``chunk_size`` in bytes; ``fanout`` names in a tree's node."""

    id: bytes
    created: float
    hash: int
    hash_key: bytes
    chunk_size: int
    fanout: int

    @classmethod
    def new(cls, *, chunk_size: int, fanout: int) -> Header:
        """A header with a fresh id and key. InvalidArgument for sizes out of range."""
        if chunk_size & (chunk_size - 1) or not 4096 <= chunk_size <= 4 * 2**20:
            raise InvalidArgument(f"chunk size {chunk_size} is no power of two from 4 KiB to 4 MiB")
        if not 16 <= fanout <= 8192:
            raise InvalidArgument(f"fan-out {fanout} is not between 16 and 8192")
        return cls(
            secrets.token_bytes(16), round(time.time(), 3), BLAKE3_KEYED, secrets.token_bytes(32), chunk_size, fanout
        )

    @property
    def largest(self) -> int:
        """Bytes of the longest content of a record: a chunk or a full node."""
        return max(self.chunk_size, NODE_HEADER + NAME_LENGTH * self.fanout)

    @property
    def keys(self) -> Keys:
        """The keys for each use."""
        return Keys(
            *(keyed_hash(self.hash_key, b"vmbackupd " + use) for use in (b"chunk names", b"node names", b"checksums"))
        )

    def encode(self) -> bytes:
        """The object's bytes: indented JSON, so that a person can read it."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id.hex(),
            "created": self.created,
            "hash": self.hash,
            "hash_key": self.hash_key.hex(),
            "encryption": None,
            "chunk_size": self.chunk_size,
            "fanout": self.fanout,
        }
        return json.dumps({**fields, "checksum": _checksum(fields)}, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, place: str) -> Header:
        """The header in ``data``, from ``place`` (for messages). RepositoryCorrupt if it is not one we can read."""
        error = RepositoryCorrupt
        fields = parse_object(data, what=f"{place}: {NAME}", max_length=2**20, error=error)
        at = f"{place}: {NAME}"
        if get_str(fields, "format", at=at, error=error) != FORMAT:
            raise error(f"{at} is not that of a vmbackupd repository")
        version = get_int(fields, "version", at=at, error=error)
        if version != VERSION:
            raise error(f"{at} has format version {version}, this program reads {VERSION}")
        checksum = fields.pop("checksum", None)
        if checksum != _checksum(fields):
            raise error(f"{at} does not match its checksum")
        hash_id = get_int(fields, "hash", at=at, error=error)
        if hash_id != BLAKE3_KEYED or fields.get("encryption") is not None:
            raise error(f"{at}: hash {hash_id} or encryption {fields.get('encryption')!r} is unknown to this program")
        return cls(
            id=_hex(fields, "id", 16, at),
            created=get_float(fields, "created", at=at, error=error),
            hash=hash_id,
            hash_key=_hex(fields, "hash_key", 32, at),
            chunk_size=get_int(fields, "chunk_size", minimum=4096, maximum=4 * 2**20, at=at, error=error),
            fanout=get_int(fields, "fanout", minimum=16, maximum=8192, at=at, error=error),
        )


def _checksum(fields: dict[str, object]) -> str:
    """SHA-256 over the canonical form: keys sorted, no spaces."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hex(fields: dict[str, object], key: str, length: int, at: str) -> bytes:
    text = get_str(fields, key, max_length=2 * length, at=at, error=RepositoryCorrupt)
    if not re.fullmatch(r"[0-9a-f]*", text) or len(text) != 2 * length:
        raise RepositoryCorrupt(f"{at}.{key}: expected {2 * length} hexadecimal digits")
    return bytes.fromhex(text)
