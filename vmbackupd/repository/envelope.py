"""Small objects with a checksum that only a holder of the repository's key can make: manifests."""

from __future__ import annotations

import hmac
import struct

from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository.header import Header

# magic, version, cipher (0: none), repository id, length of the content
HEAD = struct.Struct("<8sHB5x16sQ")
TAG = 32
VERSION = 1


def seal(magic: bytes, header: Header, content: bytes) -> bytes:
    """The object that carries ``content``; ``magic`` has 8 bytes and tells what kind of content it is."""
    body = HEAD.pack(magic, VERSION, 0, header.id, len(content)) + content
    return body + keyed_hash(header.keys.seal, body)


def unseal(magic: bytes, header: Header, data: bytes, what: str) -> bytes:
    """The content of an object; RepositoryCorrupt naming ``what`` if anything about it is not as ``seal`` made it."""
    if len(data) < HEAD.size + TAG:
        raise RepositoryCorrupt(f"{what} is truncated: it has {len(data)} bytes")
    own, version, cipher, repository, length = HEAD.unpack_from(data)
    if own != magic:
        raise RepositoryCorrupt(f"{what} is not what its name tells")
    if version != VERSION or cipher != 0:
        raise RepositoryCorrupt(f"{what} has format {version}.{cipher}, this program reads {VERSION}.0")
    if repository != header.id:
        raise RepositoryCorrupt(f"{what} belongs to another repository")
    if length != len(data) - HEAD.size - TAG:
        raise RepositoryCorrupt(f"{what} is truncated: it has {len(data)} bytes")
    if not hmac.compare_digest(keyed_hash(header.keys.seal, data[:-TAG]), data[-TAG:]):
        raise RepositoryCorrupt(f"{what} does not match its checksum")
    return data[HEAD.size : -TAG]
