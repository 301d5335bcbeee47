"""Small objects with a checksum that only a holder of the repository's key can make: manifests, sessions and the like.

Where the repository is encrypted their content is too. Each object has a key of its own, made from 32 random bytes, so
that no nonce can occur twice.
"""

from __future__ import annotations

import hmac
import secrets
import struct

from vmbackupd.engine import aead
from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository.header import Header

# magic, version, cipher (0: none), repository id, length of the content
HEAD = struct.Struct("<8sHB5x16sQ")
SALT = 32
TAG = 32
VERSION = 1
NONCE = bytes(12)  # a key is used once


def seal(magic: bytes, header: Header, content: bytes) -> bytes:
    """The object that carries ``content``; ``magic`` has 8 bytes and tells what kind of content it is.

    Any content may stand under any name: it has to tell itself what it belongs to. KeyRequired.
    """
    key = header.object_key
    if key is None:
        body = HEAD.pack(magic, VERSION, 0, header.id, len(content)) + content
    else:
        cipher, salt = aead.preferred(), secrets.token_bytes(SALT)
        head = HEAD.pack(magic, VERSION, cipher, header.id, len(content))
        body = head + salt + aead.encrypt(cipher, keyed_hash(key, salt), NONCE, head, content)
    return body + keyed_hash(header.keys.seal, body)


def unseal(magic: bytes, header: Header, data: bytes, what: str) -> bytes:
    """The content of an object; RepositoryCorrupt naming ``what`` if anything about it is not as ``seal`` made it.

    An object without encryption in a repository that has it is refused. KeyRequired.
    """
    key = header.object_key
    added = HEAD.size + TAG + (0 if key is None else SALT + aead.TAG)
    if len(data) < HEAD.size + TAG:
        raise RepositoryCorrupt(f"{what} is truncated: it has {len(data)} bytes")
    own, version, cipher, repository, length = HEAD.unpack_from(data)
    if own != magic:
        raise RepositoryCorrupt(f"{what} is not what its name tells")
    if version != VERSION or cipher > aead.CHACHA_POLY:
        raise RepositoryCorrupt(f"{what} has format {version} and cipher {cipher}: this program does not know both")
    if repository != header.id:
        raise RepositoryCorrupt(f"{what} belongs to another repository")
    if (cipher != 0) != header.encrypted:
        raise RepositoryCorrupt(f"{what} {'is not' if header.encrypted else 'is'} encrypted, unlike the repository")
    if length != len(data) - added:
        raise RepositoryCorrupt(f"{what} is truncated: it has {len(data)} bytes")
    if not hmac.compare_digest(keyed_hash(header.keys.seal, data[:-TAG]), data[-TAG:]):
        raise RepositoryCorrupt(f"{what} does not match its checksum")
    if key is None:
        return data[HEAD.size : -TAG]
    start = HEAD.size + SALT
    content = aead.decrypt(cipher, keyed_hash(key, data[HEAD.size : start]), NONCE, data[: HEAD.size], data[start:-TAG])
    if content is None:
        raise RepositoryCorrupt(f"{what} does not match its encryption's checksum")
    return content
