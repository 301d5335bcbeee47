"""What lies beside packs and indexes: the header, key slots, sealed objects and what is in them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from tests.fuzz.edits import edited
from tests.fuzz.sealed import HEADER, REPOSITORY, keyed
from tests.unit.repository.repository_support import manifest
from tests.unit.repository.test_manifest import full
from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.errors import BackupError, RepositoryCorrupt
from vmbackupd.repository import envelope, keys
from vmbackupd.repository.header import Header, checksum
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.repository import MANIFEST_MAGIC
from vmbackupd.typed import parse_object

SLOT = "ab" * 8


def as_json(data: bytes, samples: Sequence[Any]) -> bytes:
    """``E``, a number and edits: that sample, changed; anything else is the text itself."""
    if data[:1] != b"E" or len(data) < 2:
        return data
    try:
        return json.dumps(edited(samples[data[1] % len(samples)], data[2:])).encode()
    except RecursionError:
        return b""


def run_manifest(data: bytes) -> None:
    """The content of a manifest; what is accepted can be written and reads the same."""
    data = as_json(data, SAMPLES_MANIFEST)
    try:
        fields = parse_object(data, what="manifest", max_length=1 << 20, error=RepositoryCorrupt)
        parsed = Manifest.from_json(fields, at="manifest")
    except RepositoryCorrupt:
        return
    again = parse_object(parsed.encode(), what="manifest", max_length=1 << 24, error=RepositoryCorrupt)
    assert Manifest.from_json(again, at="manifest") == parsed
    parsed.trees()


def samples_manifest() -> list[Any]:
    """The manifest with everything that can be in one, and a plain one."""
    return [json.loads(full().encode()), json.loads(manifest("b1").encode())]


SAMPLES_MANIFEST = samples_manifest()


def seeds_manifest() -> list[bytes]:
    texts = [json.dumps(sample).encode() for sample in SAMPLES_MANIFEST]
    return [*texts, b"{}", *(b"E\0" + bytes([place, 1, place]) for place in range(40))]


def run_envelope(data: bytes) -> None:
    """A sealed object, its seal repaired after an ``R``."""
    if data[:1] == b"R" and len(data) > 33:
        data = data[1:-32] + keyed_seal(data[1:-32])
    try:
        content = envelope.unseal(MANIFEST_MAGIC, HEADER, data, "object")
    except RepositoryCorrupt:
        return
    assert len(content) < len(data)


def keyed_seal(body: bytes) -> bytes:
    return keyed_hash(HEADER.keys.seal, body)


def seeds_envelope() -> list[bytes]:
    sealed = envelope.seal(MANIFEST_MAGIC, HEADER, b"some content")
    return [b"R" + sealed, b"-" + sealed, sealed, b"R" + envelope.seal(MANIFEST_MAGIC, HEADER, b"")]


def with_checksum(data: bytes) -> bytes:
    """A JSON object with the checksum that fits it; anything else as it is."""
    try:
        fields: Any = json.loads(data)
        fields.pop("checksum", None)
        return json.dumps({**fields, "checksum": checksum(fields)}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def run_header(data: bytes) -> None:
    data = as_json(data, SAMPLES_HEADER)
    try:
        header = Header.decode(with_checksum(data), "here")
    except RepositoryCorrupt:
        return
    assert Header.decode(header.encode(), "here") == header


def samples_header() -> list[Any]:
    return [
        json.loads(header.encode())
        for header in (HEADER, dataclasses.replace(HEADER, hash_key=None, check=bytes(32), master=bytes(32)))
    ]


SAMPLES_HEADER = samples_header()


def seeds_header() -> list[bytes]:
    texts = [json.dumps(sample).encode() for sample in SAMPLES_HEADER]
    return [*texts, *(b"E" + bytes([place % 2, place, 1, place]) for place in range(20))]


def run_slot(data: bytes) -> None:
    """A key slot: read, and its key derived where that costs little."""
    data = as_json(data, SAMPLES_SLOT)
    try:
        slot = keys._parse(with_checksum(data), SLOT, HEADER)
        cost = slot.kdf.get("n")
        if not isinstance(cost, int) or cost <= 16:
            slot.unwrap(b"secret" * 6)
    except BackupError:
        pass


def samples_slot() -> list[Any]:
    slot = {
        "version": 1, "id": SLOT, "repository": REPOSITORY.hex(), "kind": "passphrase", "label": "x", "created": 1.0,
        "nonce": "00" * 12, "wrapped": "00" * 48,
    }  # fmt: skip
    slow = {"name": "scrypt", "salt": "00" * 32, "n": 16, "r": 8, "p": 1}
    fast = {"name": "blake3", "salt": keyed(b"").hex()}
    return [{**slot, "kdf": kdf} for kdf in (slow, fast)]


SAMPLES_SLOT = samples_slot()


def seeds_slot() -> list[bytes]:
    texts = [json.dumps(sample).encode() for sample in SAMPLES_SLOT]
    return [*texts, *(b"E" + bytes([place % 2, place, 1, place]) for place in range(20))]
