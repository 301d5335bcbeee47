"""Encrypted repositories: read back by the reference, telling nothing, and every change to an object noticed."""

from __future__ import annotations

import json
import random
import shutil
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import blake3
import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    FIXED_KEY,
    SETTINGS,
    decrypt,
    keyed_hash,
    known,
    make,
    manifest,
    objects,
    reference_image,
    reopen,
    sparse_image,
    store,
    volume,
)
from vmbackupd.engine import aead
from vmbackupd.engine import pack as packs
from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.index import IndexSet
from vmbackupd.engine.reference_crypto import Secrets
from vmbackupd.engine.zstd import Codec
from vmbackupd.errors import NotEncrypted, NotFound, RepositoryCorrupt
from vmbackupd.repository import LocalStorage, Repository, Settings
from vmbackupd.repository.catalog import spill_file
from vmbackupd.repository.envelope import seal, unseal
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header, checksum

CIPHERS = [aead.AES_GCM, aead.CHACHA_POLY]
MARKERS = [b"vm-of-the-board", b"the contents of a secret file", b"disk-of-the-board", b"night-before-the-merger"]


def with_cipher(cipher: int) -> Settings:
    return Settings(workers=2, pack_size=256 * 1024, cipher=cipher)


# ---- the reference


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize("chunk_size", [4096, 65536])
def test_the_reference_reads_what_the_engine_wrote(tmp_path: Path, cipher: int, chunk_size: int) -> None:
    rng = random.Random(f"{cipher} {chunk_size}")
    repository = make(tmp_path, chunk_size=chunk_size, settings=with_cipher(cipher), encrypted=True)
    images = {}
    for number in range(3):
        image = sparse_image(rng, rng.randrange(60 * chunk_size), density=rng.random(), chunk=chunk_size)
        images[store(repository, f"backup-{number}", image)] = image
    for pack in tmp_path.glob("packs/*/*"):
        assert pack.read_bytes()[64 + 41] == cipher
    assert repository.header.master is not None
    secrets = Secrets(repository.header.master, keyed_hash)
    secrets.check_header((tmp_path / HEADER_NAME).read_bytes())
    for number, (tree, image) in enumerate(images.items()):
        assert reference_image(repository, tmp_path, tree) == image
        data = (tmp_path / secrets.manifest(f"backup-{number}")).read_bytes()
        content = json.loads(secrets.envelope(data, b"VMBKMANI", repository.header.id, decrypt))
        assert (content["id"], content["volumes"][0]["tree"]) == (f"backup-{number}", tree)
        with reopen(tmp_path) as opened:
            assert opened.image(tree).read(0, len(image)) == image
            assert opened.manifest(f"backup-{number}").volumes[0].tree == tree
            with pytest.raises(NotFound):
                opened.manifest("backup-9")


def test_hosts_with_different_ciphers_share_a_repository(tmp_path: Path) -> None:
    rng = random.Random(1)
    one = make(tmp_path, settings=with_cipher(aead.AES_GCM), encrypted=True)
    two = reopen(tmp_path, with_cipher(aead.CHACHA_POLY))
    image = sparse_image(rng, 100 * CHUNK)
    tree = store(one, "one", image)
    changed = bytearray(image)
    changed[:CHUNK] = rng.randbytes(CHUNK)
    with two.writer("two") as writer:
        writer.base("one")
        sink = writer.update(tree)
        sink.write(0, changed[:CHUNK])
        other = sink.finish()
        assert sink.chunks_new == 1
        # what is still in memory is encrypted there, too
        assert writer.source(other).read(0, len(image)) == changed
        writer.publish(manifest("two", volume("vda", other, len(image))))
    for repository in (one, two, reopen(tmp_path)):
        assert repository.image(tree).read(0, len(image)) == image
        assert repository.image(other).read(0, len(image)) == changed


def test_the_same_content_is_stored_once(tmp_path: Path) -> None:
    image = random.Random(1).randbytes(50 * CHUNK)
    repository = make(tmp_path, encrypted=True)
    assert store(repository, "one", image) == store(repository, "two", image)
    packed = sum(len(data) for name, data in objects(tmp_path).items() if name.startswith("packs"))
    assert packed < 1.1 * len(image)


# ---- what can be seen


def write_marked(repository: Repository) -> None:
    """A backup with a marker in everything that a user could take for secret."""
    rng = random.Random(2)
    text = MARKERS[1]
    image = b"".join(
        [text + rng.randbytes(CHUNK - len(text)), text + bytes(CHUNK - len(text)), (text * CHUNK)[:CHUNK], bytes(CHUNK)]
    )
    backup = MARKERS[3].decode()
    with repository.writer(backup) as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        blob = writer.blob(b"<name>" + MARKERS[0] + b"</name>" + rng.randbytes(100))
        tree = sink.finish()
        writer.publish(
            manifest(
                backup,
                volume(MARKERS[2].decode(), tree, len(image), details={"domain": MARKERS[0].decode()}),
                config={"domain.xml": blob},
            )
        )


@pytest.mark.parametrize("cipher", CIPHERS)
def test_nothing_of_the_content_can_be_seen(tmp_path: Path, cipher: int) -> None:
    with make(tmp_path / "plain") as plain:
        write_marked(plain)
    with make(tmp_path / "secret", settings=with_cipher(cipher), encrypted=True) as secret:
        write_marked(secret)
        (backup,) = secret.backups()
        tree, master = secret.manifest(backup.id).volumes[0].tree, secret.header.master
        assert tree is not None
        assert master is not None
        derived = [
            secret.header.hash_key,
            secret.header.content_key,
            secret.header.object_key,
            secret.header.keys.chunk,
        ]
    shown = {name: name.encode() + data for name, data in objects(tmp_path / "plain").items()}
    for marker in MARKERS:  # the test would see them
        assert any(marker in data for data in shown.values()), marker
    hidden = {name: name.encode() + data for name, data in objects(tmp_path / "secret", keys=True).items()}
    hidden[HEADER_NAME] = (tmp_path / "secret" / HEADER_NAME).read_bytes()
    contents = list(known(reopen(tmp_path / "secret"), tmp_path / "secret").values())
    names = [plain_hash(content) for content in contents]
    for key in (master, *derived):
        assert key is not None
        names += [key, key.hex().encode()]
    for name, data in hidden.items():
        for marker in (*MARKERS, tree.encode(), *names):
            assert marker not in data, (name, marker)
        for marker in MARKERS:
            assert marker.hex().encode() not in data, (name, marker)


def test_who_is_at_work_cannot_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions, verdicts and marks: neither their names nor their contents tell of backups, reasons and hosts."""
    monkeypatch.setattr(socket, "gethostname", lambda: "host-of-the-board")
    shown = []
    for encrypted in (False, True):
        path = tmp_path / str(encrypted)
        with make(path, encrypted=encrypted) as repository:
            write_marked(repository)
            backup = MARKERS[3].decode()
            repository.protect(backup, True)
            with repository.writer("backup-of-next-night"), repository.reading(backup):
                repository.condemn(list(repository.catalog.list_packs()), reason="a reason of its own")
                repository.gc()  # it waits for those at work
                found = objects(path)
        kinds = {name.partition("/")[0] for name in found}
        assert {"sessions", "condemned", "waits", "protected"} <= kinds
        words = ["host-of-the-board", backup, "backup-of-next-night", "a reason of its own", '"pid"', "writer"]
        everything = b"".join(name.encode() + data for name, data in found.items() if not name.startswith("packs"))
        shown.append({word for word in words if word.encode() in everything})
    assert shown == [set(words), set()]


def plain_hash(content: bytes) -> bytes:
    """What anybody could compute from a content that he knows."""
    return blake3.blake3(content).digest()


def test_the_same_content_has_other_names_elsewhere(tmp_path: Path) -> None:
    trees = set()
    for name in ("one", "two"):
        with make(tmp_path / name, encrypted=True) as repository:
            trees.add(store(repository, "backup", b"the same content everywhere" * 1000))
    assert len(trees) == 2
    records = [set(known(reopen(tmp_path / name), tmp_path / name)) for name in ("one", "two")]
    assert not records[0] & records[1]


def test_no_key_and_nonce_twice(tmp_path: Path) -> None:
    """Over several writers: a nonce occurs once in its pack, a pack's id once, a salt once."""
    repository = make(tmp_path, encrypted=True)
    rng = random.Random(3)
    for number in range(4):
        store(repository, f"backup-{number}", sparse_image(rng, 200 * CHUNK, density=1.0))
    salts, identities = [], []
    for path, data in objects(tmp_path).items():
        if path.startswith("manifests"):
            salts.append(data[40:72])
        if path.startswith("packs"):
            identities.append(data[32:48])
            nonces = [struct.pack("<I", at) + data[at : at + 8] for at in records_of(data)]
            assert len(nonces) == len(set(nonces)) > 1
    assert len(salts) == len(set(salts)) == 4
    assert len(identities) == len(set(identities)) > 4


def records_of(pack: bytes) -> list[int]:
    """The offsets of a pack's records."""
    index, count = struct.unpack_from("<QI", pack, len(pack) - 72)
    return [struct.unpack_from("<I", pack, index + 48 * number + 36)[0] for number in range(count)]


# ---- tampering: packs


class OnePack:
    """A storage of one pack, in memory, for ``ChunkReader``."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)

    def open_pack(self, pack_id: bytes) -> int | None:
        return None

    def read_pack(self, pack_id: bytes, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])


@dataclass
class Target:
    """A pack and a reader that reads from it whatever the test makes of it."""

    repository: Repository
    good: bytes
    storage: OnePack
    reader: ChunkReader

    def examine(self) -> None:
        """Header, trailer and own index, as a rebuild checks them; RepositoryCorrupt."""
        header, size = self.repository.header, len(self.storage.data)
        pack_id = self.good[32:48]
        packs.check_header(bytes(self.storage.data[:64]), header.id, pack_id, "pack", encrypted=True)
        offset, _ = packs.parse_trailer(bytes(self.storage.data[-80:]), size, pack_id, "pack")
        packs.check_tail(bytes(self.storage.data[offset:]), header.keys.seal, "pack")

    def read(self, at: int) -> bytes:
        """The content of the record that was at ``at``."""
        return self.reader.content(self.good[at : at + 32], self.good[at + 39])


@pytest.fixture(params=CIPHERS)
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Target]:
    """A pack of a few records of each kind: compressed, stored as they are, a node, a root record."""
    rng = random.Random(4)
    with make(tmp_path, settings=with_cipher(request.param), encrypted=True) as repository:
        store(repository, "one", rng.randbytes(CHUNK) + b"text " * 819 + b"\0" + rng.randbytes(100))
        (path,) = tmp_path.glob("packs/*/*")
        good = path.read_bytes()
        storage = OnePack(good)
        keys = repository.header.keys
        reader = ChunkReader(
            repository.catalog.current,
            chunk_key=keys.chunk,
            node_key=keys.node,
            storage=storage,
            largest=repository.header.largest,
            content_key=repository.header.content_key,
        )
        yield Target(repository, good, storage, reader)


def test_every_byte_of_a_pack(target: Target) -> None:
    rng = random.Random(5)
    places = records_of(target.good)
    starts = [*places, struct.unpack_from("<Q", target.good, len(target.good) - 72)[0]]
    sound = {at: target.read(at) for at in places}
    assert {target.good[at + 39] for at in places} == {1, 2, 3}
    assert {target.good[at + 40] for at in places} == {0, 1}
    target.examine()
    for at in range(len(target.good)):
        target.storage.data[at] ^= 1 << rng.randrange(8)
        hit = [start for start, end in zip(starts, starts[1:], strict=False) if start <= at < end]
        if hit:
            # a changed header is noticed before anything is decrypted, or by the tag
            reason = "another place" if at >= hit[0] + 48 else "something else|another place"
            with pytest.raises(RepositoryCorrupt, match=reason) as caught:
                target.read(hit[0])
            assert target.good[32:48].hex() in str(caught.value)
        else:
            with pytest.raises(RepositoryCorrupt, match="pack"):
                target.examine()
        target.storage.data[at] = target.good[at]
    assert {at: target.read(at) for at in places} == sound


def test_a_truncated_pack(target: Target) -> None:
    places = records_of(target.good)
    for length in range(0, len(target.good), 7):
        target.storage.data = bytearray(target.good[:length])
        with pytest.raises(RepositoryCorrupt):
            target.examine()
        for at in places:
            if at + 48 + struct.unpack_from("<I", target.good, at + 32)[0] > length:
                with pytest.raises(RepositoryCorrupt, match="truncated"):
                    target.read(at)
            else:
                target.read(at)


def test_a_record_in_another_place(target: Target) -> None:
    """Two records of the same length, each with the other's bytes; and each payload under the other's header."""
    header = target.repository.header
    good = target.good
    rng = random.Random(6)
    store(target.repository, "two", rng.randbytes(2 * CHUNK))
    path = next(path for path in target.repository.storage.list("packs/") if good[32:48].hex() not in path.name)
    data = target.repository.storage.get(path.name)
    one, two = [at for at in records_of(data) if data[at + 39] == 1]
    length = struct.unpack_from("<I", data, one + 32)[0]
    assert length == struct.unpack_from("<I", data, two + 32)[0] == CHUNK + 16
    keys = header.keys
    reader = ChunkReader(
        target.repository.catalog.refresh(),
        chunk_key=keys.chunk,
        node_key=keys.node,
        storage=(storage := OnePack(data)),
        largest=header.largest,
        content_key=header.content_key,
    )
    reader.content(data[one : one + 32], 1)
    for start in (0, 48):  # whole records, payloads
        changed = bytearray(data)
        changed[one + start : one + 48 + length] = data[two + start : two + 48 + length]
        changed[two + start : two + 48 + length] = data[one + start : one + 48 + length]
        storage.data = changed
        for at in (one, two):
            with pytest.raises(RepositoryCorrupt, match="something else" if start == 0 else "another place"):
                reader.content(data[at : at + 32], 1)
    # the pack as a whole under another pack's name
    with pytest.raises(RepositoryCorrupt, match="wrong name"):
        packs.check_header(data[:64], header.id, good[32:48], "pack", encrypted=True)


def test_a_pack_that_is_not_encrypted_is_refused(tmp_path: Path) -> None:
    """Even one made with the right keys for names: nothing unencrypted gets in."""
    repository = make(tmp_path, encrypted=True)
    keys = repository.header.keys
    made: dict[bytes, bytes] = {}
    chunks = ChunkStore(
        IndexSet(),
        chunk_key=keys.chunk,
        node_key=keys.node,
        seal_key=keys.seal,
        repository=repository.header.id,
        writer=b"w" * 12,
        put_pack=lambda pack_id, parts: made.update({pack_id: b"".join(parts)}),
        spill_file=spill_file,
        workers=1,
    )
    chunks.start()
    content = b"content"
    name = keyed_hash(keys.chunk, content)
    assert chunks.copy_record(name, 1, len(content), 0, content)
    ((index_id, parts),) = chunks.finish()
    ((pack_id, data),) = made.items()
    repository.storage.put_if_absent(f"packs/{pack_id.hex()[:2]}/{pack_id.hex()}", [data])
    repository.storage.put_if_absent(f"indexes/{index_id.hex()}", parts)
    with reopen(tmp_path) as opened, pytest.raises(RepositoryCorrupt, match="something else"):
        opened.reader(opened.catalog.current).content(name, 1)
    with pytest.raises(RepositoryCorrupt, match="is not encrypted, unlike the repository"):
        packs.check_header(data[:64], repository.header.id, pack_id, "pack", encrypted=True)
    assert packs.scan_records(data, keys.chunk, keys.node, Codec(), content_key=repository.header.content_key) == b""
    assert len(packs.scan_records(data, keys.chunk, keys.node, Codec())) == 48


def test_the_records_of_a_pack_without_its_index(target: Target) -> None:
    header = target.repository.header
    index, count = struct.unpack_from("<QI", target.good, len(target.good) - 72)
    entries = target.good[index : index + 48 * count]
    keys, codec = header.keys, Codec(1, 2**23)

    def scan(data: bytes) -> bytes:
        return packs.scan_records(data, keys.chunk, keys.node, codec, content_key=header.content_key)

    assert scan(target.good[:index]) == entries
    rng = random.Random(7)
    for _ in range(200):
        at = rng.randrange(64, index)
        found = scan(target.good[:at] + bytes([target.good[at] ^ 1 << rng.randrange(8)]) + target.good[at + 1 : index])
        whole = [entry for entry, start in enumerate(records_of(target.good)) if start <= at]
        assert found == entries[: 48 * whole[-1]]
    other = bytearray(target.good[:index])
    other[32] ^= 1  # the id of another pack
    assert scan(bytes(other)) == b""


# ---- tampering: envelopes and names


@pytest.mark.parametrize("encrypted", [False, True])
def test_every_byte_of_an_envelope(encrypted: bool) -> None:
    rng = random.Random(8)
    header = Header.new(chunk_size=4096, fanout=16, master=bytes(range(32)) if encrypted else None)
    for content in (b"", b"x", rng.randbytes(300)):
        sealed = seal(b"VMBKMANI", header, content)
        assert unseal(b"VMBKMANI", header, sealed, "x") == content
        for at in range(len(sealed)):
            changed = sealed[:at] + bytes([sealed[at] ^ 1 << rng.randrange(8)]) + sealed[at + 1 :]
            with pytest.raises(RepositoryCorrupt, match=r"^x "):
                unseal(b"VMBKMANI", header, changed, "x")
            with pytest.raises(RepositoryCorrupt, match="truncated"):
                unseal(b"VMBKMANI", header, sealed[:at], "x")
        with pytest.raises(RepositoryCorrupt, match="truncated"):
            unseal(b"VMBKMANI", header, sealed + b"\0", "x")
        with pytest.raises(RepositoryCorrupt, match="not what its name tells"):
            unseal(b"VMBKVOID", header, sealed, "x")
        if len(content) > 1:
            assert (content in sealed) == (not encrypted)
        assert (sealed == seal(b"VMBKMANI", header, content)) == (not encrypted)


def test_an_envelope_of_the_other_sort(tmp_path: Path) -> None:
    secret = Header.new(chunk_size=4096, fanout=16, master=bytes(32))
    plain = Header(secret.id, secret.created, 1, secret.hash_key, 4096, 16)
    with pytest.raises(RepositoryCorrupt, match="is not encrypted, unlike"):
        unseal(b"VMBKMANI", secret, seal(b"VMBKMANI", plain, b"content" * 20), "x")
    with pytest.raises(RepositoryCorrupt, match="is encrypted, unlike"):
        unseal(b"VMBKMANI", plain, seal(b"VMBKMANI", secret, b"content" * 20), "x")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two encrypted repositories, ``one`` and ``two``, with the same key file, each with two backups of an image."""
    path = tmp_path_factory.mktemp("pair")
    for name in ("one", "two"):
        with make(path / name, encrypted=True) as repository:
            for number in range(2):
                store(repository, f"backup-{number}", random.Random(number).randbytes(10 * CHUNK))
    return path


@pytest.mark.parametrize("kind", ["packs", "indexes", "manifests", "keys"])
def test_objects_of_another_repository(tmp_path: Path, pair: Path, kind: str) -> None:
    """Put under the name of one of its own, and under their own name."""
    path = tmp_path / "copy"
    shutil.copytree(pair / "one", path)
    own = sorted(name for name in objects(path, keys=True) if name.startswith(kind))[0]
    other = sorted(name for name in objects(pair / "two", keys=True) if name.startswith(kind))[0]
    (path / own).write_bytes((pair / "two" / other).read_bytes())
    if kind == "keys":
        with pytest.raises(RepositoryCorrupt, match="no key slot that is of use"):
            reopen(path)
        return
    with reopen(path) as repository:
        errors = [backup.error for backup in repository.backups() if backup.error]
        assert bool(errors) == (kind == "manifests")
        assert all("another repository" in error for error in errors)
        failed = 0
        for number in range(2):
            try:
                tree = repository.manifest(f"backup-{number}").volumes[0].tree or ""
                assert repository.image(tree).read(0, 10 * CHUNK) == random.Random(number).randbytes(10 * CHUNK)
            except RepositoryCorrupt:
                failed += 1
        assert failed == (0 if kind == "indexes" else 1)
    shutil.copy(pair / "one" / own, path / own)
    (path / other).parent.mkdir(exist_ok=True)
    shutil.copy(pair / "two" / other, path / other)
    with reopen(path) as repository:
        assert [backup.id for backup in repository.backups() if not backup.error] == ["backup-0", "backup-1"]


def test_manifests_under_each_others_names(tmp_path: Path, pair: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(pair / "one", path)
    one, two = sorted((path / "manifests").iterdir())
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    with reopen(path) as repository:
        errors = [backup.error for backup in repository.backups()]
        assert [error for error in errors if error] == [error for error in errors if error and "swapped" in error]
        assert len([error for error in errors if error]) == 1
    one.write_bytes(kept)


def test_an_old_header_of_the_same_place(tmp_path: Path, pair: Path) -> None:
    """The header of another repository: its keys do not fit the slots."""
    path = tmp_path / "copy"
    shutil.copytree(pair / "one", path)
    shutil.copy(pair / "two" / HEADER_NAME, path / HEADER_NAME)
    with pytest.raises(RepositoryCorrupt, match="no key slot that is of use"):
        reopen(path)


def test_a_plain_header_in_its_place(tmp_path: Path, pair: Path) -> None:
    path = tmp_path / "copy"
    shutil.copytree(pair / "one", path)
    fields = json.loads((path / HEADER_NAME).read_bytes())
    del fields["checksum"]
    fields.update(encryption=None, hash_key="00" * 32)
    (path / HEADER_NAME).write_text(json.dumps({**fields, "checksum": checksum(fields)}))
    with pytest.raises(NotEncrypted):
        Repository.open(LocalStorage(path), settings=SETTINGS, keys=[FIXED_KEY])


# ---- records from one pack to another


@pytest.mark.parametrize("cipher", [0, *CIPHERS])
def test_records_are_copied(tmp_path: Path, cipher: int) -> None:
    """What repacking does: every record carried over is the same content, encrypted for its new place."""
    rng = random.Random(9)
    repository = make(tmp_path, settings=with_cipher(cipher), encrypted=cipher > 0)
    image = sparse_image(rng, 300 * CHUNK)
    tree = store(repository, "one", image)
    index = repository.catalog.current
    contents = known(repository, tmp_path)
    before = sorted(tmp_path.glob("packs/*/*"))
    places = [(data[at : at + 32], data[at + 39]) for data in map(Path.read_bytes, before) for at in records_of(data)]
    reader = repository.reader(index)
    with repository.writer("two") as writer:
        writer.base("one")
        chunks = writer._store
        for name, kind in places:
            compression, raw, payload = reader.record(name, kind)
            content = Codec().decompress(payload, raw) if compression else payload
            assert content == contents[name]
            assert chunks.copy_record(name, kind, raw, compression, payload)
            assert not chunks.copy_record(name, kind, raw, compression, payload)
        for wrong in (
            (name[1:], kind, raw, compression, payload),
            (name, 0, raw, compression, payload),
            (name, 4, raw, compression, payload),
            (name, kind, 0, 0, b""),
            (name, kind, raw, 2, payload),
            (name, kind, len(payload) + 1, 0, payload),
            (name, kind, 2**24, 1, payload),
        ):
            with pytest.raises(ValueError, match="no record"):
                chunks.copy_record(*wrong)
        writer.publish(manifest("two", volume("vda", tree, len(image))))
    for path in before:
        path.unlink()
    for name in list(objects(tmp_path)):
        if name.startswith("indexes"):
            (tmp_path / name).unlink()
    with reopen(tmp_path) as opened:
        assert opened.image(tree).read(0, len(image)) == image
        assert known(opened, tmp_path) == contents


def test_a_damaged_record_is_not_copied(target: Target) -> None:
    at = records_of(target.good)[0]
    target.storage.data[at + 60] ^= 1
    with pytest.raises(RepositoryCorrupt):
        target.reader.record(target.good[at : at + 32], target.good[at + 39])
