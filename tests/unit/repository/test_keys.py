"""Key slots: every kind of secret, wrong ones, adding and revoking, and slots that were tampered with."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import string
import time
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    FIXED_KEY,
    SETTINGS,
    FaultyStorage,
    FixedKey,
    decrypt,
    keyed_hash,
    make,
    reopen,
    store,
)
from vmbackupd.engine.reference_crypto import Secrets, master_key, recovery_key
from vmbackupd.errors import (
    InvalidArgument,
    KeyRequired,
    NotEncrypted,
    NotFound,
    RepositoryCorrupt,
    StorageError,
    WrongKey,
)
from vmbackupd.repository import (
    Credential,
    KeyFile,
    KeySource,
    LocalStorage,
    Passphrase,
    RecoveryKey,
    Repository,
    keys,
    new_recovery_key,
)
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header, checksum


@pytest.fixture(autouse=True)
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(keys.SCRYPT, "n", 2**10)


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, KeySource]:
    """One secret of each kind."""
    (tmp_path / "key").write_bytes(secrets.token_bytes(32))
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "repository").write_bytes(secrets.token_bytes(100))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    return {
        "keyfile": KeyFile(tmp_path / "key"),
        "credential": Credential("repository"),
        "passphrase": Passphrase("pass wörd".encode()),
        "recovery": RecoveryKey(new_recovery_key()),
    }


def place(tmp_path: Path, name: str = "repository") -> LocalStorage:
    storage = LocalStorage(tmp_path / name)
    storage.create()
    return storage


def test_any_of_the_keys_opens_it(tmp_path: Path, sources: dict[str, KeySource]) -> None:
    storage = place(tmp_path)
    with Repository.create(storage, keys=tuple(sources.values())) as made:
        store(made, "one", b"content" * 1000)
        identity, slots = made.id, made.key_slots()
    assert {slot.label: slot.kind for slot in slots} == {kind: kind for kind in sources}
    assert all(slot.error is None and time.time() - 60 < slot.created <= time.time() for slot in slots)
    assert keys.list_slots(storage) == slots  # needs no key
    for source in sources.values():
        with Repository.open(storage, keys=[source]) as opened:
            assert opened.id == identity
            assert opened.header.encrypted
            assert [backup.id for backup in opened.backups()] == ["one"]


def test_the_reference_opens_every_slot(tmp_path: Path, sources: dict[str, KeySource]) -> None:
    storage = place(tmp_path)
    with Repository.create(storage, keys=tuple(sources.values())) as made:
        master, slots = made.header.master, made.key_slots()
        assert master is not None
    assert len(slots) == len(sources)
    for slot in slots:
        data = storage.get(f"keys/{slot.id}")
        assert master_key(data, sources[slot.label].secret(), keyed_hash, decrypt) == master
        assert master not in data
        assert master.hex().encode() not in data
    Secrets(master, keyed_hash).check_header(storage.get(HEADER_NAME))


def test_cost_of_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(keys.SCRYPT, "n", 2**16)
    storage = place(tmp_path)
    Repository.create(storage, keys=[Passphrase(b"pass word")]).close()
    (slot,) = (tmp_path / "repository" / "keys").iterdir()
    assert {**json.loads(slot.read_bytes())["kdf"], "salt": ""} == {
        "name": "scrypt",
        "n": 2**16,
        "r": 8,
        "p": 1,
        "salt": "",
    }


# ---- wrong keys


def test_a_wrong_key_is_told_before_anything_is_read(tmp_path: Path, sources: dict[str, KeySource]) -> None:
    storage = FaultyStorage(place(tmp_path))
    with Repository.create(storage, keys=tuple(sources.values())) as made:
        store(made, "one", b"content" * 1000)
    (tmp_path / "other").write_bytes(bytes(32))
    for wrong in (
        KeyFile(tmp_path / "other"),
        Passphrase(b"pass word"),
        RecoveryKey(new_recovery_key()),
        FixedKey(b"x" * 40),
    ):
        storage.operations.clear()
        with pytest.raises(WrongKey, match="opens none of the key slots") as caught:
            Repository.open(storage, keys=[wrong])
        assert "recovery 'recovery'" in str(caught.value)
        read = [name for what, _, name in (operation.partition(" ") for operation in storage.operations)]
        assert all(name.startswith(("keys/", HEADER_NAME)) for name in read)


def test_no_key(tmp_path: Path, sources: dict[str, KeySource], monkeypatch: pytest.MonkeyPatch) -> None:
    storage = place(tmp_path)
    Repository.create(storage, keys=tuple(sources.values())).close()
    with pytest.raises(KeyRequired, match="it has: credential, keyfile, passphrase, recovery"):
        Repository.open(storage)
    with pytest.raises(KeyRequired, match="key file /nonexistent cannot be read: No such file"):
        Repository.open(storage, keys=[KeyFile(Path("/nonexistent"))])
    with pytest.raises(KeyRequired, match="credential nothing cannot be read"):
        Repository.open(storage, keys=[Credential("nothing")])
    with pytest.raises(InvalidArgument, match="no name of a credential"):
        Repository.open(storage, keys=[Credential("../key")])
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    with pytest.raises(KeyRequired, match="LoadCredential="):
        Repository.open(storage, keys=[Credential("repository")])
    # one that cannot be read does not keep another from opening
    Repository.open(storage, keys=[KeyFile(Path("/nonexistent")), sources["recovery"]]).close()


def test_a_locked_header_names_nothing(tmp_path: Path) -> None:
    make(tmp_path, encrypted=True).close()
    header = Header.load(LocalStorage(tmp_path))
    assert (header.encrypted, header.hash_key, header.master) == (True, None, None)
    for use in (lambda: header.keys, lambda: header.content_key, lambda: header.manifest_name("one")):
        with pytest.raises(KeyRequired, match="needs one of its keys"):
            use()
    with pytest.raises(WrongKey):
        header.unlocked(bytes(32))


def test_a_client_with_a_key_refuses_a_repository_without_encryption(tmp_path: Path) -> None:
    """Otherwise whoever holds the storage could put a plain repository in its place and get everything unencrypted."""
    make(tmp_path).close()
    with pytest.raises(NotEncrypted, match="is not encrypted, but a key is configured"):
        Repository.open(LocalStorage(tmp_path), keys=[FIXED_KEY])


def test_secrets_do_not_show(tmp_path: Path) -> None:
    recovery = new_recovery_key()
    with make(tmp_path, encrypted=True) as repository:
        assert repository.header.master is not None
        shown = f"{repository.header!r} {Passphrase(b'pass word')!r} {RecoveryKey(recovery)!r}"
        for secret in (repository.header.master.hex(), str(repository.header.master), "pass word", recovery):
            assert secret not in shown


# ---- secrets that will not do


def test_secrets_that_are_too_short(tmp_path: Path) -> None:
    storage = place(tmp_path)
    (tmp_path / "short").write_bytes(b"x" * 31)
    (tmp_path / "long").write_bytes(bytes(2**20 + 1))
    for wrong in (KeyFile(tmp_path / "short"), KeyFile(tmp_path / "long"), Passphrase(b"1234567"), RecoveryKey("")):
        with pytest.raises(InvalidArgument):
            Repository.create(storage, keys=[wrong])
    with pytest.raises(InvalidArgument, match="not UTF-8"):
        Passphrase(b"\xff" * 10).secret()
    assert not list((tmp_path / "repository").glob("*.json"))


def test_a_key_file_that_others_can_read_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "key"
    path.write_bytes(bytes(32))
    for mode, told in ((0o600, False), (0o400, False), (0o640, True), (0o604, True)):
        path.chmod(mode)
        caplog.clear()
        KeyFile(path).secret()
        assert ("can be read by others" in caplog.text) == told


def test_passphrases_that_look_alike_are_the_same(tmp_path: Path) -> None:
    assert Passphrase("cafe\u0301 olé".encode()).secret() == Passphrase("café ole\u0301".encode()).secret()
    (tmp_path / "file").write_bytes(b"pass word\r\nanother line\n")
    assert Passphrase.from_file(tmp_path / "file").secret() == b"pass word"
    with pytest.raises(KeyRequired, match="passphrase file"):
        Passphrase.from_file(tmp_path / "none")


def test_recovery_key_is_typed_back() -> None:
    for _ in range(50):
        text = new_recovery_key()
        assert len(text.split("-")) == 14
        assert set(text) <= set(string.digits + string.ascii_uppercase + "-") - set("ILOU")
        key = RecoveryKey(text).secret()
        assert key == recovery_key(text)
        for typed in (text.lower(), text.replace("-", " "), f" {text.replace('-', '')}\n", text.replace("1", "I")):
            assert RecoveryKey(typed).secret() == key
        assert RecoveryKey(text.replace("1", "l").replace("0", "o")).secret() == key


def test_mistyped_recovery_key() -> None:
    text = new_recovery_key()
    for at, character in enumerate(text):
        if character == "-":
            continue
        other = "2" if character != "2" else "3"
        with pytest.raises(InvalidArgument, match="mistyped"):
            RecoveryKey(text[:at] + other + text[at + 1 :]).secret()
    for wrong in (text[:-1], text + "2", text[5:], "", "no key at all", "U" * 56, "\N{SNOWMAN}" * 56):
        with pytest.raises(InvalidArgument, match="mistyped"):
            RecoveryKey(wrong).secret()


# ---- adding and revoking


def test_slots_are_added_and_revoked_without_touching_data(tmp_path: Path, sources: dict[str, KeySource]) -> None:
    storage = place(tmp_path)
    repository = Repository.create(storage, keys=[sources["keyfile"]])
    tree = store(repository, "one", b"content" * 1000)
    path = tmp_path / "repository"

    def data() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.parent.name != "keys"}

    before = data()
    added = repository.add_key(sources["passphrase"], "the boss's own, \N{SNOWMAN}")
    assert added in repository.key_slots()
    (first,) = (slot for slot in repository.key_slots() if slot.id != added.id)
    repository.revoke_key(first.id)
    assert repository.key_slots() == [added]
    with pytest.raises(WrongKey):
        Repository.open(storage, keys=[sources["keyfile"]])
    with Repository.open(storage, keys=[sources["passphrase"]]) as opened:
        assert opened.image(tree).read(0, 7) == b"content"
    assert data() == before
    with pytest.raises(NotFound):
        repository.revoke_key(first.id)
    with pytest.raises(InvalidArgument, match="the last one"):
        repository.revoke_key(added.id)
    for label in ("", "x" * 101, "two\nlines"):
        with pytest.raises(InvalidArgument, match="label"):
            repository.add_key(sources["keyfile"], label)
    repository.close()


def test_keys_of_a_repository_without_encryption(tmp_path: Path) -> None:
    with make(tmp_path) as repository:
        assert repository.key_slots() == []
        with pytest.raises(InvalidArgument, match="is not encrypted"):
            repository.add_key(FIXED_KEY, "x")


def test_a_slot_that_is_damaged_does_not_count_as_one_that_is_left(tmp_path: Path) -> None:
    with make(tmp_path, encrypted=True) as repository:
        added = repository.add_key(FIXED_KEY, "second")
        other = next(slot.id for slot in repository.key_slots() if slot.id != added.id)
        (tmp_path / "keys" / other).write_bytes(b"{}")
        with pytest.raises(InvalidArgument, match="the last one"):
            repository.revoke_key(added.id)
        repository.revoke_key(other)


def test_the_same_file_opens_as_key_file_and_as_credential(
    tmp_path: Path, sources: dict[str, KeySource], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = place(tmp_path)
    Repository.create(storage, keys=[sources["credential"]]).close()
    Repository.open(storage, keys=[KeyFile(Path(os.environ["CREDENTIALS_DIRECTORY"]) / "repository")]).close()


# ---- tampering


def test_every_byte_of_a_slot(tmp_path: Path) -> None:
    with make(tmp_path, encrypted=True) as repository:
        master, header = repository.header.master, repository.header
    (slot,) = (tmp_path / "keys").iterdir()
    good = slot.read_bytes()
    storage = LocalStorage(tmp_path)
    fields = json.loads(good)
    wrong = [good[:length] for length in range(0, len(good) - 2, 3)]
    for at in range(len(good)):
        for bit in (0, 5):
            wrong.append(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
    for data in wrong:
        slot.write_bytes(data)
        (info,) = keys.list_slots(storage, header)
        if info.error is None:
            assert json.loads(data) == fields  # white space
            continue
        assert slot.name in info.error
        with pytest.raises(RepositoryCorrupt, match=slot.name):
            keys.unlock(storage, Header.load(storage), [FIXED_KEY])
    slot.write_bytes(good)
    assert keys.unlock(storage, header, [FIXED_KEY]) == master


def test_fields_of_a_slot_are_bound_to_the_key(tmp_path: Path) -> None:
    """Somebody who knows the format changes a slot and its checksum."""
    make(tmp_path, encrypted=True).close()
    (slot,) = (tmp_path / "keys").iterdir()
    good = json.loads(slot.read_bytes())
    del good["checksum"]
    salt = good["kdf"]["salt"]
    changes = [
        {"label": "mine"},
        {"created": 1.0},
        {"kind": "credential"},
        {"more": 1},
        {"nonce": bytes(12).hex()},
        {"kdf": {"name": "blake3", "salt": bytes(32).hex()}},
        {"kdf": {"name": "scrypt", "salt": salt, "n": 2, "r": 1, "p": 1}},
        {"wrapped": bytes(48).hex()},
    ]
    for change in changes:
        whole = {**good, **change}
        slot.write_text(json.dumps({**whole, "checksum": checksum(whole)}))
        with pytest.raises(WrongKey):
            reopen(tmp_path)
    costly = [(2**24, 2**10, 1), (2**16, 2**24, 1), (3, 8, 1), (2**10, 8, 17), (1, 8, 1), (0, 8, 1), (2, 0, 1)]
    refused = [{"kdf": {"name": "scrypt", "salt": salt, "n": n, "r": r, "p": p}} for n, r, p in costly]
    refused += [{"kdf": {"name": "md5", "salt": salt}}, {"kdf": {"name": "blake3", "salt": "00"}}, {"version": 2}]
    refused += [{"repository": "0" * 32}, {"id": "0" * 16}, {"wrapped": "00"}, {"nonce": "zz" * 12}, {"kdf": 7}]
    for change in refused:
        whole = {**good, **change}
        slot.write_text(json.dumps({**whole, "checksum": checksum(whole)}))
        with pytest.raises(RepositoryCorrupt, match=slot.name):
            reopen(tmp_path)


def test_a_slot_of_another_repository(tmp_path: Path) -> None:
    make(tmp_path / "one", encrypted=True).close()
    make(tmp_path / "two", encrypted=True).close()
    (own,) = (tmp_path / "one" / "keys").iterdir()
    (other,) = (tmp_path / "two" / "keys").iterdir()
    shutil.copy(other, own.parent / other.name)
    with reopen(tmp_path / "one") as repository:  # its own slot opens it still
        errors = {slot.id: slot.error for slot in repository.key_slots()}
        assert errors[own.name] is None
        assert "another repository" in str(errors[other.name])
    own.unlink()
    with pytest.raises(RepositoryCorrupt, match="no key slot that is of use.*belongs to another repository"):
        reopen(tmp_path / "one")
    shutil.copy(other, own)
    (own.parent / other.name).unlink()
    with pytest.raises(RepositoryCorrupt, match="stored under the wrong name"):
        reopen(tmp_path / "one")
    own.unlink()
    with pytest.raises(RepositoryCorrupt, match="no key slot that is of use"):
        reopen(tmp_path / "one")


def test_fields_of_the_header_are_bound_to_the_key(tmp_path: Path) -> None:
    """Somebody who knows the format changes the header and its checksum."""
    make(tmp_path, encrypted=True).close()
    path = tmp_path / HEADER_NAME
    good = json.loads(path.read_bytes())
    del good["checksum"]
    changes = [{"chunk_size": 8192}, {"fanout": 32}, {"created": 1.0}]
    for change in [*changes, {"encryption": {"cipher": "aead", "check": "00" * 32}}]:
        whole = {**good, **change}
        path.write_text(json.dumps({**whole, "checksum": checksum(whole)}))
        with pytest.raises(RepositoryCorrupt, match="header was changed"):
            reopen(tmp_path)
    whole = {**good, "id": "0" * 32}
    path.write_text(json.dumps({**whole, "checksum": checksum(whole)}))
    with pytest.raises(RepositoryCorrupt, match="belongs to another repository"):
        reopen(tmp_path)
    for encryption in ({"cipher": "rot13", "check": "00" * 32}, {"cipher": "aead"}, {}, 1):
        whole = {**good, "encryption": encryption}
        path.write_text(json.dumps({**whole, "checksum": checksum(whole)}))
        with pytest.raises(RepositoryCorrupt, match=HEADER_NAME):
            reopen(tmp_path)


@pytest.mark.parametrize("late", [False, True])
def test_no_repository_without_slots_is_left(tmp_path: Path, late: bool) -> None:
    """Creating it is cut off at each operation: what stands can be opened, or made again."""
    for point in range(8):
        storage = FaultyStorage(place(tmp_path, f"at-{point}"))
        storage.faults, storage.late = {point: StorageError("cut off")}, late
        with contextlib.suppress(StorageError):
            Repository.create(storage, chunk_size=CHUNK, settings=SETTINGS, keys=[FIXED_KEY]).close()
        storage.faults = {}
        if storage.stat(HEADER_NAME) is None:
            Repository.create(storage, keys=[FIXED_KEY]).close()
        with pytest.raises(InvalidArgument, match="already"):
            Repository.create(storage, keys=[FIXED_KEY])
        Repository.open(storage, keys=[FIXED_KEY]).close()
