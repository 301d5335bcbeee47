"""What the repository's tests share: small repositories, the reference reader, and storages that fail on order."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import blake3
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from vmbackupd.engine.reference_crypto import Secrets
from vmbackupd.engine.reference_image import Namer, contents, image_of, plain_payload
from vmbackupd.engine.zstd import Codec
from vmbackupd.errors import BackupError
from vmbackupd.model import Consistency, Method, RevertMode, VolumeKind, VolumeRecord
from vmbackupd.repository import LocalStorage, Manifest, ObjectInfo, Repository, Settings, VmIdentity
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.header import Header
from vmbackupd.repository.keys import KEYS, add_slot, new_master_key

CHUNK = 4096
SETTINGS = Settings(workers=2, pack_size=256 * 1024)


def keyed_hash(key: bytes, data: bytes) -> bytes:
    """Keyed BLAKE3 as the reference implementation has it."""
    return blake3.blake3(data, key=key).digest()


def decrypt(cipher: int, key: bytes, nonce: bytes, bound: bytes, data: bytes) -> bytes:
    """The repository's ciphers as another library has them."""
    return {1: AESGCM, 2: ChaCha20Poly1305}[cipher](key).decrypt(nonce, data, bound)


class FixedKey:
    """A key that needs no file: the tests' repositories that are encrypted have it."""

    kind = "keyfile"
    opens = frozenset({"keyfile"})

    def __init__(self, secret: bytes = b"the secret of the tests' repositories") -> None:
        self._secret = secret

    def secret(self) -> bytes:
        return self._secret

    def __str__(self) -> str:
        return "fixed key"


FIXED_KEY = FixedKey()
SORT = {"encrypted": False}


def make(
    path: Path,
    *,
    fanout: int = 16,
    chunk_size: int = CHUNK,
    settings: Settings = SETTINGS,
    encrypted: bool | None = None,
) -> Repository:
    """A repository with small chunks and nodes, so that small images have deep trees.

    ``encrypted``: None for what the fixture ``both_sorts`` says, else not.
    """
    storage = LocalStorage(path)
    storage.create()
    master = new_master_key() if (SORT["encrypted"] if encrypted is None else encrypted) else None
    header = Header.new(chunk_size=chunk_size, fanout=fanout, master=master)
    if master is not None:
        add_slot(storage, header, master, FIXED_KEY, "tests")
    assert storage.put_if_absent(HEADER_NAME, [header.encode()])
    return reopen(path, settings)


@pytest.fixture(scope="module", params=["plain", "encrypted"])
def both_sorts(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test that uses it runs twice: ``make`` makes plain repositories, then encrypted ones."""
    SORT["encrypted"] = request.param == "encrypted"
    yield request.param
    SORT["encrypted"] = False


def keys_of(storage: Any) -> tuple[FixedKey, ...]:
    """What opens this storage's repository, if ``make`` made it."""
    return (FIXED_KEY,) if Header.load(storage).encrypted else ()


def reopen(path: Path, settings: Settings = SETTINGS) -> Repository:
    storage = LocalStorage(path)
    return Repository.open(storage, settings=settings, keys=keys_of(storage))


def namer(repository: Repository) -> Namer:
    assert repository.header.hash_key is not None
    return Namer(repository.header.hash_key, keyed_hash)


def known(repository: Repository, path: Path) -> dict[bytes, bytes]:
    """Everything in the packs below ``path``, read by the reference."""
    codec = Codec(1, 2**23)
    packs = [file.read_bytes() for file in sorted(path.glob("packs/*/*"))]
    master = repository.header.master
    secrets = None if master is None else Secrets(master, keyed_hash)

    def payload(pack: bytes, offset: int) -> bytes:
        return plain_payload(pack, offset) if secrets is None else secrets.payload(pack, offset, decrypt)

    return contents(packs, namer(repository), codec.decompress, payload)


def reference_image(repository: Repository, path: Path, tree: str) -> bytes:
    return image_of(tree, known(repository, path))


def sparse_image(rng: random.Random, size: int, *, density: float = 0.5, chunk: int = CHUNK) -> bytes:
    """An image of holes, noise, text and repeated chunks."""
    image = bytearray(size)
    shared = [rng.randbytes(chunk) for _ in range(4)]
    for at in range(0, size, chunk):
        if rng.random() < density:
            content = rng.choice(
                [rng.randbytes(chunk), rng.choice(shared), rng.randbytes(16) * (chunk // 16), b"\1" + bytes(chunk - 1)]
            )
            image[at : at + chunk] = content[: size - at]
    return bytes(image)


def volume(name: str, tree: str, size: int, **more: Any) -> VolumeRecord:
    return VolumeRecord(name, VolumeKind.VIRTUAL, Method.GUEST_SNAPSHOT, Consistency.APPLICATION, size, tree, **more)


def manifest(backup: str, *volumes: VolumeRecord, **more: Any) -> Manifest:
    vm = VmIdentity("web1", "6f1d1c1e-0000-4000-8000-000000000001")
    return Manifest(backup, vm, 1000.0, 1001.5, 1002.5, 42.5, RevertMode.BACKUP, tuple(volumes), **more)


def store(repository: Repository, backup: str, image: bytes) -> str:
    """Publish a backup of one image; its tree."""
    with repository.writer(backup) as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        tree = sink.finish()
        writer.publish(manifest(backup, volume("vda", tree, len(image))))
    return tree


def objects(path: Path, *, keys: bool = False) -> dict[str, bytes]:
    """All files below ``path`` but the header, and the key slots unless they are asked for."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != HEADER_NAME and (keys or file.parent.name != KEYS)
    }


class FaultyStorage:
    """A storage that works until an operation's number comes up in ``faults``, then raises that error: before it does
    anything, or (``late``) after it was done, like a server whose answer was lost."""

    def __init__(self, storage: LocalStorage, *, descriptors: bool = True) -> None:
        self.storage = storage
        self.descriptors = descriptors
        self.faults: dict[int, BackupError] = {}
        self.late = False
        self.operations: list[str] = []
        self.always: tuple[str, BackupError] | None = None

    @property
    def certain_ends(self) -> bool:
        return self.storage.certain_ends

    def _run(self, what: str, call: Any) -> Any:
        number = len(self.operations)
        self.operations.append(what)
        error = self.faults.get(number)
        if self.always is not None and what.startswith(self.always[0]):
            error = self.always[1]
        if error is not None and not self.late:
            raise type(error)(*error.args)
        result = call()
        if error is not None:
            del result  # a claim that was made and is not known to anybody
            raise type(error)(*error.args)
        return result

    @property
    def place(self) -> str:
        return self.storage.place

    def put_if_absent(self, name: str, parts: Iterable[Any]) -> bool:
        return self._run(f"put {name}", lambda: self.storage.put_if_absent(name, parts))

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self._run(f"get {name}", lambda: self.storage.get(name, offset, length))

    def list(self, prefix: str, *, sizes: bool = True) -> Iterator[ObjectInfo]:
        yield from self._run(f"list {prefix}", lambda: list(self.storage.list(prefix, sizes=sizes)))

    def stat(self, name: str) -> ObjectInfo | None:
        return self._run(f"stat {name}", lambda: self.storage.stat(name))

    def delete(self, name: str) -> bool:
        return self._run(f"delete {name}", lambda: self.storage.delete(name))

    def delete_many(self, names: Iterable[str]) -> int:
        return sum(self.delete(name) for name in list(names))

    def open(self, name: str) -> int | None:
        if not self.descriptors:
            return None
        return self._run(f"open {name}", lambda: self.storage.open(name))

    def claim(self, name: str, data: bytes) -> Any:
        return self._run(f"claim {name}", lambda: self.storage.claim(name, data))

    def abandoned(self, name: str) -> bool:
        return self._run(f"abandoned {name}", lambda: self.storage.abandoned(name))

    def renew(self, names: Iterable[str]) -> int:
        return self._run("renew", lambda: self.storage.renew(names))

    def remove_temporaries(self) -> int:
        return self.storage.remove_temporaries()

    def free_bytes(self) -> int | None:
        return self.storage.free_bytes()

    def close(self) -> None:
        self.storage.close()
