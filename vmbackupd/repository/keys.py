"""Key slots: the master key of an encrypted repository, wrapped by secrets that people and hosts keep.

A slot is an object ``keys/SLOT``. Any of them opens the repository; they are added and revoked without touching data.
What a slot holds, and what revoking one does not do, is in docs/format.md.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import secrets
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vmbackupd.engine import aead
from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.errors import Busy, InvalidArgument, KeyRequired, NotFound, RepositoryCorrupt, WrongKey
from vmbackupd.repository.header import MASTER_KEY, Header, canonical, checksum, get_hex
from vmbackupd.repository.storage import Storage
from vmbackupd.typed import get_float, get_int, get_object, get_str, parse_object

log = logging.getLogger(__name__)

KEYS = "keys"
VERSION = 1
SLOT = re.compile(r"[0-9a-f]{16}")
SLOT_BYTES = 2**16

KEYFILE, PASSPHRASE, CREDENTIAL, RECOVERY = "keyfile", "passphrase", "credential", "recovery"
SECRET_FILES = frozenset({KEYFILE, CREDENTIAL})

SHORTEST_SECRET = 32
LONGEST_SECRET = 2**20
SHORTEST_PASSPHRASE = 8

SCRYPT = {"n": 2**16, "r": 8, "p": 1}
"""Cost of a guess at a passphrase: 128 n r bytes of memory, 64 MiB, and about 0.2 s."""
SCRYPT_MEMORY = 2**28  # bytes that a slot from the storage may make us use

RECOVERY_CHECK = 3  # bytes of checksum: with 32 bytes of key, 56 characters
GROUP = 4
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
RFC4648 = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
TO_CROCKFORD = str.maketrans(RFC4648, CROCKFORD)
FROM_TYPED = str.maketrans(CROCKFORD + "ILO", RFC4648 + "BBA")  # what is read for 1, 1 and 0


# ---- secrets


class KeySource(Protocol):
    """Where a secret comes from that opens a slot."""

    @property
    def kind(self) -> str:
        """The kind of a slot that is added for it."""

    @property
    def opens(self) -> frozenset[str]:
        """The kinds of slots that it may open."""

    def secret(self) -> bytes:
        """The secret. KeyRequired if it cannot be had, InvalidArgument if it is none."""

    def __str__(self) -> str:
        """What it is, for messages; nothing of the secret."""


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A file of 32 bytes or more, taken as they are: ``head -c 32 /dev/urandom > FILE`` makes one."""

    path: Path
    kind = KEYFILE
    opens = SECRET_FILES

    def secret(self) -> bytes:
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_mode & 0o077:
                    log.warning("%s can be read by others than its owner: chmod 600 it", self)
                data = file.read(LONGEST_SECRET + 1)
        except OSError as reason:
            raise KeyRequired(f"{self} cannot be read: {reason.strerror}") from reason
        return _long_enough(data, str(self))

    def __str__(self) -> str:
        return f"key file {self.path}"


@dataclass(frozen=True, slots=True)
class Credential:
    """A systemd credential (``LoadCredentialEncrypted=NAME`` in the unit), like a key file."""

    name: str
    kind = CREDENTIAL
    opens = SECRET_FILES

    def secret(self) -> bytes:
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise KeyRequired(f"{self}: no credentials were passed to this service (LoadCredential= in its unit)")
        if "/" in self.name or self.name in ("", ".", ".."):
            raise InvalidArgument(f"{self.name!r} is no name of a credential")
        try:
            data = Path(directory, self.name).read_bytes()
        except OSError as reason:
            raise KeyRequired(f"{self} cannot be read: {reason.strerror}") from reason
        return _long_enough(data, str(self))

    def __str__(self) -> str:
        return f"credential {self.name}"


@dataclass(frozen=True, slots=True)
class Passphrase:
    """What somebody remembers: UTF-8, brought into one of the forms that look alike (NFC), at least 8 bytes."""

    text: bytes = field(repr=False)
    kind = PASSPHRASE
    opens = frozenset({PASSPHRASE})

    @classmethod
    def from_file(cls, path: Path) -> Passphrase:
        """The first line of a file. KeyRequired."""
        try:
            with open(path, "rb") as file:
                return cls(file.readline(LONGEST_SECRET).rstrip(b"\r\n"))
        except OSError as reason:
            raise KeyRequired(f"passphrase file {path} cannot be read: {reason.strerror}") from reason

    def secret(self) -> bytes:
        try:
            text = unicodedata.normalize("NFC", self.text.decode()).encode()
        except UnicodeDecodeError:
            raise InvalidArgument("the passphrase is not UTF-8") from None
        if len(text) < SHORTEST_PASSPHRASE:
            raise InvalidArgument(f"the passphrase has {len(text)} bytes, at least {SHORTEST_PASSPHRASE} are needed")
        return text

    def __str__(self) -> str:
        return "the passphrase"


@dataclass(frozen=True, slots=True)
class RecoveryKey:
    """What ``new_recovery_key`` made, as it was typed back: case, spaces, dashes and line ends do not matter."""

    text: str = field(repr=False)
    kind = RECOVERY
    opens = frozenset({RECOVERY})

    def secret(self) -> bytes:
        typed = re.sub(r"[\s-]+", "", self.text).upper()
        try:
            data = base64.b32decode(typed.translate(FROM_TYPED))
        except (binascii.Error, ValueError):
            data = b""
        key, check = data[:MASTER_KEY], data[MASTER_KEY:]
        if len(data) != MASTER_KEY + RECOVERY_CHECK or check != _recovery_check(key):
            raise InvalidArgument(
                f"this is no recovery key, or it was mistyped: it has 56 letters and digits, {len(typed)} were given"
            )
        return key

    def __str__(self) -> str:
        return "the recovery key"


def new_master_key() -> bytes:
    """The key of a new repository: what the slots wrap."""
    return secrets.token_bytes(MASTER_KEY)


def new_recovery_key() -> str:
    """A key to print and lock away: 14 groups of 4 letters and digits, none that look alike, with a checksum."""
    key = secrets.token_bytes(MASTER_KEY)
    text = base64.b32encode(key + _recovery_check(key)).decode().translate(TO_CROCKFORD)
    return "-".join(text[at : at + GROUP] for at in range(0, len(text), GROUP))


def _recovery_check(key: bytes) -> bytes:
    return hashlib.sha256(b"vmbackupd recovery key" + key).digest()[:RECOVERY_CHECK]


def _long_enough(data: bytes, what: str) -> bytes:
    if not SHORTEST_SECRET <= len(data) <= LONGEST_SECRET:
        raise InvalidArgument(f"{what} has {len(data)} bytes, at least {SHORTEST_SECRET} random ones are needed")
    return data


# ---- slots


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A key slot, as anybody who sees the storage can read it. ``created``: seconds since 1970; ``error``: why it is of
    no use, else None."""

    id: str
    kind: str = ""
    label: str = ""
    created: float = 0.0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Slot:
    """A slot that parses. ``fields`` are those that ``wrapped`` is bound to."""

    info: SlotInfo
    kdf: Mapping[str, Any]
    nonce: bytes
    wrapped: bytes
    fields: Mapping[str, Any]

    def unwrap(self, secret: bytes) -> bytes | None:
        """The master key, None if this is not the slot's secret. RepositoryCorrupt."""
        key = _derive(self.kdf, secret, f"key slot {self.info.id}")
        return aead.decrypt(aead.AES_GCM, key, self.nonce, canonical(self.fields), self.wrapped)


def slot_name(slot_id: str) -> str:
    """The object that holds this slot."""
    return f"{KEYS}/{slot_id}"


def add_slot(storage: Storage, header: Header, master: bytes, source: KeySource, label: str) -> SlotInfo:
    """One more secret that opens the repository. ``label`` is for people, and can be read without any key.

    InvalidArgument for a secret or a label that will not do, KeyRequired, WrongKey if ``master`` is not the
    repository's, StorageError.
    """
    header.unlocked(master)
    if not 0 < len(label) <= 100 or not label.isprintable():
        raise InvalidArgument(f"the label {label[:100]!r} is not 1 to 100 printable characters")
    slot_id, salt, nonce = secrets.token_hex(8), secrets.token_bytes(32).hex(), secrets.token_bytes(12)
    kdf = {"name": "scrypt", **SCRYPT, "salt": salt} if source.kind == PASSPHRASE else {"name": "blake3", "salt": salt}
    fields = {
        "version": VERSION,
        "id": slot_id,
        "repository": header.id.hex(),
        "kind": source.kind,
        "label": label,
        "created": round(time.time(), 3),
        "kdf": kdf,
        "nonce": nonce.hex(),
    }
    key = _derive(kdf, source.secret(), f"key slot {slot_id}")
    wrapped = aead.encrypt(aead.AES_GCM, key, nonce, canonical(fields), master)
    whole: dict[str, Any] = {**fields, "wrapped": wrapped.hex()}
    data = json.dumps({**whole, "checksum": checksum(whole)}, indent=2, ensure_ascii=False).encode() + b"\n"
    if not storage.put_if_absent(slot_name(slot_id), [data]):
        raise Busy(f"there is a key slot {slot_id} already: try again")
    return _parse(data, slot_id, header).info


def list_slots(storage: Storage, header: Header | None = None) -> list[SlotInfo]:
    """All slots, oldest first; needs no key. One that is damaged is listed with the reason. StorageError.

    ``header``: with it, a slot of another repository is told too.
    """
    found = []
    for info in storage.list(f"{KEYS}/"):
        slot_id = info.name.removeprefix(f"{KEYS}/")
        if not SLOT.fullmatch(slot_id):
            continue
        try:
            found.append(_read(storage, slot_id, header).info)
        except FileNotFoundError:
            continue  # revoked since the listing
        except RepositoryCorrupt as reason:
            found.append(SlotInfo(slot_id, error=str(reason)))
    return sorted(found, key=lambda slot: (slot.created, slot.id))


def revoke_slot(storage: Storage, header: Header, slot_id: str) -> None:
    """Remove a slot. NotFound, InvalidArgument for the last one that is of use, StorageError.

    Whoever kept the slot's secret and a copy of the slot can still make the master key of them.
    """
    slots = list_slots(storage, header)
    if slot_id not in {slot.id for slot in slots}:
        raise NotFound(f"there is no key slot {slot_id} at {storage.place}")
    if not any(slot.error is None and slot.id != slot_id for slot in slots):
        raise InvalidArgument(f"key slot {slot_id} is the last one: without it nobody could read the repository")
    data = storage.get(slot_name(slot_id), 0, SLOT_BYTES)
    storage.delete(slot_name(slot_id))
    if not any(slot.error is None for slot in list_slots(storage, header)):
        # another host revoked the other one at the same time
        storage.put_if_absent(slot_name(slot_id), [data])
        raise Busy(f"all other key slots were revoked meanwhile: slot {slot_id} stays")


def unlock(storage: Storage, header: Header, sources: Sequence[KeySource]) -> bytes:
    """The master key. KeyRequired if none was given or none could be read, WrongKey if none fits, RepositoryCorrupt if
    the header was changed or there are no slots, StorageError."""
    slots, problems = _usable(storage, header)
    if not sources:
        kinds = ", ".join(sorted({slot.info.kind for slot in slots})) or "none is left"
        raise KeyRequired(f"the repository at {storage.place} is encrypted and no key was given; it has: {kinds}")
    if not slots:
        told = "; ".join(problems) or f"there is no object {KEYS}/…"
        raise RepositoryCorrupt(f"the repository at {storage.place} has no key slot that is of use: {told}")
    # what takes a passphrase's time comes last
    unread: list[KeyRequired | InvalidArgument] = []
    for source in sorted(sources, key=lambda one: one.kind == PASSPHRASE):
        try:
            secret = source.secret()
        except (KeyRequired, InvalidArgument) as reason:
            unread.append(reason)
            continue
        for slot in slots:
            master = slot.unwrap(secret) if slot.info.kind in source.opens else None
            if master is not None:
                return _checked(storage, header, master)
    if len(unread) == len(sources):
        raise unread[0]
    tried = [*map(str, sources), *(f"({reason})" for reason in unread)]
    held = [f"{slot.info.kind} {slot.info.label!r}" for slot in slots]
    raise WrongKey(
        f"{', '.join(tried)}: opens none of the key slots of the repository at {storage.place} "
        f"({', '.join(held + problems)})"
    )


def _checked(storage: Storage, header: Header, master: bytes) -> bytes:
    try:
        header.unlocked(master)
    except WrongKey:
        raise RepositoryCorrupt(
            f"{storage.place}: the repository's header was changed, its key slots fit no more"
        ) from None
    return master


def _usable(storage: Storage, header: Header) -> tuple[list[_Slot], list[str]]:
    """The slots that parse, and what is wrong with the others."""
    slots, problems = [], []
    for info in list_slots(storage, header):
        if info.error is not None:
            log.warning("%s: %s", storage.place, info.error)
            problems.append(info.error)
            continue
        try:
            slots.append(_read(storage, info.id, header))
        except FileNotFoundError:
            continue
    return slots, problems


def _read(storage: Storage, slot_id: str, header: Header | None) -> _Slot:
    """FileNotFoundError, RepositoryCorrupt, StorageError."""
    return _parse(storage.get(slot_name(slot_id), 0, SLOT_BYTES), slot_id, header)


def _parse(data: bytes, slot_id: str, header: Header | None) -> _Slot:
    at, error = f"key slot {slot_id}", RepositoryCorrupt
    whole = parse_object(data, what=at, max_length=SLOT_BYTES, error=error)
    if whole.pop("checksum", None) != checksum(whole):
        raise error(f"{at} does not match its checksum")
    version = get_int(whole, "version", at=at, error=error)
    if version != VERSION:
        raise error(f"{at} has version {version}, this program reads {VERSION}")
    if get_str(whole, "id", at=at, error=error) != slot_id:
        raise error(f"{at} is stored under the wrong name")
    if header is not None and get_str(whole, "repository", at=at, error=error) != header.id.hex():
        raise error(f"{at} belongs to another repository")
    info = SlotInfo(
        slot_id,
        get_str(whole, "kind", max_length=20, at=at, error=error),
        get_str(whole, "label", max_length=100, at=at, error=error),
        get_float(whole, "created", at=at, error=error),
    )
    kdf = get_object(whole, "kdf", at=at, error=error)
    nonce, wrapped = get_hex(whole, "nonce", 12, at), get_hex(whole, "wrapped", MASTER_KEY + aead.TAG, at)
    return _Slot(info, kdf, nonce, wrapped, {key: value for key, value in whole.items() if key != "wrapped"})


def _derive(kdf: Mapping[str, Any], secret: bytes, at: str) -> bytes:
    """The key that wraps the master key. RepositoryCorrupt for a derivation that is unknown or would cost too much."""
    error = RepositoryCorrupt
    salt = get_hex(kdf, "salt", 32, at)
    name = get_str(kdf, "name", max_length=20, at=at, error=error)
    if name == "blake3":
        return keyed_hash(salt, secret)
    if name != "scrypt":
        raise error(f"{at}: key derivation {name!r} is unknown to this program")
    n, r, p = (get_int(kdf, cost, minimum=1, maximum=2**24, at=at, error=error) for cost in ("n", "r", "p"))
    if n & (n - 1) or n < 2 or 128 * n * r > SCRYPT_MEMORY or p > 16:
        raise error(f"{at}: scrypt with n {n}, r {r}, p {p} costs too much")
    return hashlib.scrypt(secret, salt=salt, n=n, r=r, p=p, maxmem=128 * r * (n + p + 4), dklen=32)
