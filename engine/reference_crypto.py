"""A plain twin of the repository's encryption, written from docs/format.md and sharing no code with the program's own.

Nothing in the product imports this. ``Decrypt`` is an AEAD by another library: (cipher id, key, nonce, associated data,
ciphertext and tag) -> content, raising where it does not match.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

KeyedHash = Callable[[bytes, bytes], bytes]
Decrypt = Callable[[int, bytes, bytes, bytes, bytes], bytes]

DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class Secrets:
    """The keys that are made of the master key."""

    def __init__(self, master: bytes, keyed_hash: KeyedHash) -> None:
        self.hash_key = keyed_hash(master, b"vmbackupd hash key")
        self._hash = keyed_hash
        self._content = keyed_hash(master, b"vmbackupd content key")
        self._object = keyed_hash(master, b"vmbackupd object key")
        self._header = keyed_hash(master, b"vmbackupd header")
        self._seal = keyed_hash(self.hash_key, b"vmbackupd checksums")
        self._names = keyed_hash(self.hash_key, b"vmbackupd manifest names")

    def manifest(self, backup: str) -> str:
        """The name of a backup's manifest object."""
        return "manifests/" + self._hash(self._names, backup.encode())[:16].hex()

    def check_header(self, data: bytes) -> None:
        """Is this the master key, and the header unchanged?"""
        fields = json.loads(data)
        del fields["checksum"]
        check = fields["encryption"].pop("check")
        assert self._hash(self._header, _canonical(fields)).hex() == check

    def envelope(self, data: bytes, magic: bytes, repository: bytes, decrypt: Decrypt) -> bytes:
        """The content of a manifest or the like."""
        assert self._hash(self._seal, data[:-32]) == data[-32:]
        found, version, cipher, owner, length = struct.unpack_from("<8sHB5x16sQ", data)
        assert (found, version, owner) == (magic, 1, repository)
        head, salt, sealed = data[:40], data[40:72], data[72:-32]
        assert len(sealed) == length + 16
        return decrypt(cipher, self._hash(self._object, salt), bytes(12), head, sealed)

    def payload(self, pack: bytes, offset: int, decrypt: Decrypt) -> bytes:
        """The compressed content of the record at ``offset``."""
        record = pack[offset : offset + 48]
        (stored,) = struct.unpack_from("<I", record, 32)
        nonce = struct.pack("<I", offset) + record[:8]
        sealed = pack[offset + 48 : offset + 48 + stored]
        return decrypt(record[41], self._hash(self._content, pack[32:48]), nonce, record, sealed)


def master_key(slot: bytes, secret: bytes, keyed_hash: KeyedHash, decrypt: Decrypt) -> bytes:
    """What a key slot holds. The secret of a passphrase is the passphrase, of a recovery key its 32 bytes."""
    fields: dict[str, Any] = json.loads(slot)
    assert fields.pop("checksum") == hashlib.sha256(_canonical(fields)).hexdigest()
    wrapped = bytes.fromhex(fields.pop("wrapped"))
    kdf = fields["kdf"]
    salt = bytes.fromhex(kdf["salt"])
    if kdf["name"] == "scrypt":
        key = hashlib.scrypt(secret, salt=salt, n=kdf["n"], r=kdf["r"], p=kdf["p"], maxmem=2**28, dklen=32)
    else:
        assert kdf["name"] == "blake3"
        key = keyed_hash(salt, secret)
    return decrypt(1, key, bytes.fromhex(fields["nonce"]), _canonical(fields), wrapped)


def recovery_key(text: str) -> bytes:
    """The 32 bytes of a recovery key as it is printed."""
    number = 0
    for digit in text.replace("-", ""):
        number = number * 32 + DIGITS.index(digit)
    data = number.to_bytes(35, "big")
    assert hashlib.sha256(b"vmbackupd recovery key" + data[:32]).digest()[:3] == data[32:]
    return data[:32]


def _canonical(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
