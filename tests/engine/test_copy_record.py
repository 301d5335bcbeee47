"""Records that are carried from packs to packs: by several threads, beside new content, with little memory, in vain."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.unit.repository.repository_support import decrypt, keyed_hash
from vmbackupd.engine import aead
from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.chunkstore import ChunkStore
from vmbackupd.engine.index import IndexFile, IndexSet
from vmbackupd.engine.reference_crypto import Secrets
from vmbackupd.engine.reference_image import Namer, contents, plain_payload
from vmbackupd.engine.zstd import Codec
from vmbackupd.errors import StorageError
from vmbackupd.repository.catalog import spill_file

MASTER = bytes(range(32))
SECRETS = Secrets(MASTER, keyed_hash)
NAMES = {
    kind: keyed_hash(SECRETS.hash_key, b"vmbackupd " + what + b" names") for kind, what in ((1, b"chunk"), (2, b"node"))
}
SEAL = keyed_hash(SECRETS.hash_key, b"vmbackupd checksums")
CONTENT_KEY = keyed_hash(MASTER, b"vmbackupd content key")
REPOSITORY = b"r" * 16

Record = tuple[bytes, int, int, int, bytes]


class Packs:
    """Packs in memory; what a store and a reader ask a storage for."""

    def __init__(self, cipher: int) -> None:
        self.cipher = cipher
        self.held: dict[bytes, bytes] = {}

    @property
    def content_key(self) -> bytes | None:
        return CONTENT_KEY if self.cipher else None

    def put(self, pack_id: bytes, parts: Iterable[Any]) -> None:
        self.held[pack_id] = b"".join(parts)

    def open_pack(self, pack_id: bytes) -> int | None:
        return None

    def read_pack(self, pack_id: bytes, offset: int, length: int) -> bytes:
        return self.held[pack_id][offset : offset + length]

    def store(self, put: Callable[[bytes, list[Any]], None] | None = None, **more: Any) -> ChunkStore:
        store = ChunkStore(
            IndexSet(),
            chunk_key=NAMES[1],
            node_key=NAMES[2],
            seal_key=SEAL,
            repository=REPOSITORY,
            writer=random.randbytes(12),
            put_pack=put or self.put,
            spill_file=spill_file,
            workers=1,
            largest=8192,
            pack_size=32768,
            content_key=self.content_key,
            cipher=self.cipher,
            **more,
        )
        store.start()
        return store

    def known(self) -> dict[bytes, bytes]:
        """Every content, read by the reference."""

        def payload(pack: bytes, offset: int) -> bytes:
            return SECRETS.payload(pack, offset, decrypt) if self.cipher else plain_payload(pack, offset)

        namer = Namer(SECRETS.hash_key, keyed_hash)
        return contents(list(self.held.values()), namer, Codec(1, 2**23).decompress, payload)


def some_records(rng: random.Random, count: int) -> tuple[dict[bytes, bytes], list[Record]]:
    """Contents by name, and their records, as a reader hands them out."""
    codec, by_name, records = Codec(1, 8192), {}, []
    for _ in range(count):
        content = rng.choice([rng.randbytes, lambda size: rng.randbytes(8) * (size // 8 + 1)])(rng.randrange(1, 8000))
        kind = rng.choice([1, 2])
        name = keyed_hash(NAMES[kind], content)
        frame = codec.compress(content)
        by_name[name] = content
        records.append((name, kind, len(content), 0 if frame is None else 1, content if frame is None else frame))
    return by_name, records


def open_index(finished: list[tuple[bytes, Iterable[Any]]]) -> IndexSet:
    return IndexSet(
        [IndexFile(spill_file(parts), SEAL, REPOSITORY, index_id.hex(), index_id) for index_id, parts in finished]
    )


@pytest.mark.parametrize("cipher", [0, aead.AES_GCM, aead.CHACHA_POLY])
@pytest.mark.parametrize("segment_entries", [50, 2**19])
def test_many_threads_copy(cipher: int, segment_entries: int) -> None:
    """Each record ends up in one pack, whoever copies it; entries that leave memory are found again."""
    rng = random.Random(f"{cipher} {segment_entries}")
    by_name, records = some_records(rng, 400)
    packs = Packs(cipher)
    store = packs.store(segment_entries=segment_entries)
    copied: list[bytes] = []

    def copy(mine: list[Record]) -> None:
        for record in mine:
            if store.copy_record(*record):
                copied.append(record[0])

    try:
        threads = [threading.Thread(target=copy, args=(rng.sample(records, len(records)),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        index = open_index(store.finish())
    finally:
        store.close()
    assert sorted(copied) == sorted(by_name)
    assert len(packs.held) > 5
    assert packs.known() == by_name
    reader = ChunkReader(
        index, chunk_key=NAMES[1], node_key=NAMES[2], storage=packs, largest=8192, content_key=packs.content_key
    )
    for name, kind, raw, compression, payload in records:
        assert reader.content(name, kind) == by_name[name]
        assert reader.record(name, kind) == (compression, raw, payload)


@pytest.mark.parametrize("cipher", [0, aead.AES_GCM])
def test_the_storage_fails(cipher: int) -> None:
    """Whoever copies gets the storage's own error, and waits for nothing."""
    _, records = some_records(random.Random(1), 400)

    def fail(pack_id: bytes, parts: list[Any]) -> None:
        raise StorageError("the disk is on fire")

    store = Packs(cipher).store(fail)
    try:
        with pytest.raises(StorageError, match="on fire"):
            for record in records:
                store.copy_record(*record)
        with pytest.raises(StorageError, match="on fire"):
            store.finish()
    finally:
        store.close()
