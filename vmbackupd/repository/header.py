"""The object ``repository.json``: what a repository is. Written once, by ``repository init``."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.errors import InvalidArgument, KeyRequired, RepositoryCorrupt, RepositoryMissing, WrongKey
from vmbackupd.repository.storage import Storage
from vmbackupd.typed import get_float, get_int, get_object, get_str, parse_object

NAME = "repository.json"
FORMAT = "vmbackupd"
VERSION = 1
BLAKE3_KEYED = 1
AEAD = "aead"
MASTER_KEY = 32

NODE_HEADER = 16
NAME_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Keys:
    """One key of 32 bytes for each use, made from the repository's hash key: names of chunks, names of nodes and root
    records, checksums of packs' indexes, index files and manifests, names of manifests."""

    chunk: bytes
    node: bytes
    seal: bytes
    manifest: bytes


@dataclass(frozen=True, slots=True)
class Header:
    """What a repository is. ``hash`` 1 is keyed BLAKE3; ``chunk_size`` in bytes; ``fanout`` names in a tree's node.

    ``check`` (32 bytes) is there where the repository is encrypted: by it a master key is known to be the right one.
    Then ``master`` and ``hash_key`` are None until ``unlocked``; without encryption ``master`` is never anything else.
    """

    id: bytes
    created: float
    hash: int
    hash_key: bytes | None = field(repr=False)
    chunk_size: int
    fanout: int
    check: bytes | None = None
    master: bytes | None = field(default=None, repr=False)

    @classmethod
    def new(cls, *, chunk_size: int, fanout: int, master: bytes | None = None) -> Header:
        """A header with a fresh id; encrypted with ``master``, 32 random bytes, or with a fresh key for hashes alone.

        InvalidArgument for sizes out of range.
        """
        if chunk_size & (chunk_size - 1) or not 4096 <= chunk_size <= 4 * 2**20:
            raise InvalidArgument(f"chunk size {chunk_size} is no power of two from 4 KiB to 4 MiB")
        if not 16 <= fanout <= 8192:
            raise InvalidArgument(f"fan-out {fanout} is not between 16 and 8192")
        identity, created = secrets.token_bytes(16), round(time.time(), 3)
        if master is None:
            return cls(identity, created, BLAKE3_KEYED, secrets.token_bytes(32), chunk_size, fanout)
        header = cls(identity, created, BLAKE3_KEYED, None, chunk_size, fanout, bytes(32))
        return dataclasses.replace(header, check=header._check(master)).unlocked(master)

    @property
    def encrypted(self) -> bool:
        """Are contents encrypted?"""
        return self.check is not None

    def unlocked(self, master: bytes) -> Header:
        """The header of an encrypted repository with its keys. WrongKey if this is not its master key, or if the header
        was changed since the repository was made."""
        if len(master) != MASTER_KEY or self.check is None or not hmac.compare_digest(self._check(master), self.check):
            raise WrongKey(f"the key is not that of repository {self.id.hex()}, or its header was changed")
        return dataclasses.replace(self, master=master, hash_key=keyed_hash(master, b"vmbackupd hash key"))

    def _check(self, master: bytes) -> bytes:
        """What only a holder of the master key can make of the header's other fields."""
        fields = self._fields()
        fields["encryption"] = {"cipher": AEAD}
        return keyed_hash(keyed_hash(master, b"vmbackupd header"), canonical(fields))

    @property
    def content_key(self) -> bytes | None:
        """The key from which that of each pack is made; None where nothing is encrypted. KeyRequired."""
        if not self.encrypted:
            return None
        return keyed_hash(self._master(), b"vmbackupd content key")

    @property
    def object_key(self) -> bytes | None:
        """The key from which that of each manifest, session and the like is made; None as above. KeyRequired."""
        if not self.encrypted:
            return None
        return keyed_hash(self._master(), b"vmbackupd object key")

    def _master(self) -> bytes:
        if self.master is None:
            raise KeyRequired(f"repository {self.id.hex()} is encrypted: it needs one of its keys")
        return self.master

    def manifest_name(self, backup_id: str) -> str:
        """The last part of the name of the object that holds this backup's manifest. KeyRequired.

        The id itself, or where the repository is encrypted a keyed hash of it: 32 hexadecimal digits that tell nothing.
        """
        if not self.encrypted:
            return backup_id
        return keyed_hash(self.keys.manifest, backup_id.encode())[:16].hex()

    @property
    def largest(self) -> int:
        """Bytes of the longest content of a record: a chunk or a full node."""
        return max(self.chunk_size, NODE_HEADER + NAME_LENGTH * self.fanout)

    @property
    def keys(self) -> Keys:
        """The keys for each use. KeyRequired."""
        if self.hash_key is None:
            raise KeyRequired(f"repository {self.id.hex()} is encrypted: it needs one of its keys")
        uses = (b"chunk names", b"node names", b"checksums", b"manifest names")
        return Keys(*(keyed_hash(self.hash_key, b"vmbackupd " + use) for use in uses))

    def encode(self) -> bytes:
        """The object's bytes: indented JSON, so that a person can read it."""
        fields = self._fields()
        return json.dumps({**fields, "checksum": checksum(fields)}, indent=2).encode() + b"\n"

    def _fields(self) -> dict[str, object]:
        """What ``encode`` writes, but for the checksum."""
        fields: dict[str, object] = {
            "format": FORMAT,
            "version": VERSION,
            "id": self.id.hex(),
            "created": self.created,
            "hash": self.hash,
            "encryption": None if self.check is None else {"cipher": AEAD, "check": self.check.hex()},
            "chunk_size": self.chunk_size,
            "fanout": self.fanout,
        }
        if self.check is None and self.hash_key is not None:
            fields["hash_key"] = self.hash_key.hex()
        return fields

    @classmethod
    def load(cls, storage: Storage) -> Header:
        """The header of the repository in this storage, still locked where it is encrypted.

        RepositoryMissing, RepositoryCorrupt, StorageError.
        """
        try:
            data = storage.get(NAME, 0, 2**20)
        except FileNotFoundError:
            raise RepositoryMissing(
                f"there is no repository at {storage.place}: mount it, or make one with `vmbackupctl repository init`"
            ) from None
        return cls.decode(data, storage.place)

    @classmethod
    def decode(cls, data: bytes, place: str) -> Header:
        """The header in ``data``, from ``place`` (for messages), still locked where the repository is encrypted.

        RepositoryCorrupt if it is not one we can read.
        """
        error = RepositoryCorrupt
        fields = parse_object(data, what=f"{place}: {NAME}", max_length=2**20, error=error)
        at = f"{place}: {NAME}"
        if get_str(fields, "format", at=at, error=error) != FORMAT:
            raise error(f"{at} is not that of a vmbackupd repository")
        version = get_int(fields, "version", at=at, error=error)
        if version != VERSION:
            raise error(f"{at} has format version {version}, this program reads {VERSION}")
        expected = fields.pop("checksum", None)
        if expected != checksum(fields):
            raise error(f"{at} does not match its checksum")
        hash_id = get_int(fields, "hash", at=at, error=error)
        encryption = get_object(fields, "encryption", None, at=at, error=error)
        cipher = None if encryption is None else get_str(encryption, "cipher", at=f"{at}.encryption", error=error)
        if hash_id != BLAKE3_KEYED or cipher not in (None, AEAD):
            raise error(f"{at}: hash {hash_id} or encryption {cipher!r} is unknown to this program")
        return cls(
            id=get_hex(fields, "id", 16, at),
            created=get_float(fields, "created", at=at, error=error),
            hash=hash_id,
            hash_key=get_hex(fields, "hash_key", 32, at) if encryption is None else None,
            chunk_size=get_int(fields, "chunk_size", minimum=4096, maximum=4 * 2**20, at=at, error=error),
            fanout=get_int(fields, "fanout", minimum=16, maximum=8192, at=at, error=error),
            check=None if encryption is None else get_hex(encryption, "check", 32, f"{at}.encryption"),
        )


def canonical(fields: Mapping[str, object]) -> bytes:
    """Canonical JSON: keys sorted, no spaces, UTF-8."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def checksum(fields: Mapping[str, object]) -> str:
    """SHA-256 over the canonical form."""
    return hashlib.sha256(canonical(fields)).hexdigest()


def get_hex(fields: Mapping[str, object], key: str, length: int, at: str) -> bytes:
    """``length`` bytes out of hexadecimal digits. RepositoryCorrupt."""
    text = get_str(fields, key, max_length=2 * length, at=at, error=RepositoryCorrupt)
    if not re.fullmatch(r"[0-9a-f]*", text) or len(text) != 2 * length:
        raise RepositoryCorrupt(f"{at}.{key}: expected {2 * length} hexadecimal digits")
    return bytes.fromhex(text)
