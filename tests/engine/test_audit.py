"""The audit against plain comparison, over a real repository and a real NBD server."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.engine.randoms import some_chunks
from tests.engine.servers import nbdkit
from tests.unit.repository.repository_support import make, sparse_image, store
from vmbackupd.engine import reference
from vmbackupd.engine.audit import AuditSink
from vmbackupd.engine.copyloop import copy_in
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import InvalidArgument, SourceError

CHUNK = 65536


def changed(rng: random.Random, image: bytes) -> bytes:
    """Some bytes are others, some chunks became holes, and some holes data."""
    now = bytearray(image)
    for _ in range(rng.randrange(6)):
        at = rng.randrange(len(now))
        now[at] ^= 1 << rng.randrange(8)
    for _ in range(rng.randrange(6)):
        first = rng.randrange(len(now) // CHUNK)
        part = slice(first * CHUNK, min(len(now), (first + rng.choice([1, 3, 70])) * CHUNK))
        length = part.stop - part.start
        now[part] = rng.choice([bytes(length), rng.randbytes(length), image[part]])
    return bytes(now)


@pytest.mark.usefixtures("both_sorts")
def test_against_plain_comparison(tmp_path: Path, rng: random.Random) -> None:
    image = sparse_image(rng, 12 * 1024**2 + rng.randrange(CHUNK), chunk=CHUNK)
    chunks = -(-len(image) // CHUNK)
    repository = make(tmp_path / "repository", chunk_size=CHUNK)
    tree = store(repository, "base", image)
    for _ in range(8):
        now = changed(rng, image)
        (tmp_path / "now").write_bytes(now)
        sample = some_chunks(rng, chunks)
        sample.set(chunks - 1)
        sink = AuditSink(repository.image(tree))
        with nbdkit(tmp_path, "file", str(tmp_path / "now")) as path, NbdConnection(unix=path) as disk:
            copy_in(disk, sink, Progress(), only=sample)
        wanted = reference.items_of(sample.runs())
        assert sink.compared == len(wanted)
        assert reference.items_of(sink.missed.runs()) == reference.missed(image, now, wanted, CHUNK)


def test_a_hole_is_compared_without_reading(tmp_path: Path) -> None:
    """Where the server has holes nothing travels, and data that was there before is missed."""
    image = bytearray(512 * CHUNK)
    for index in (3, 4, 300):
        image[index * CHUNK] = 1
    repository = make(tmp_path / "repository", chunk_size=CHUNK)
    sink, progress = AuditSink(repository.image(store(repository, "base", bytes(image)))), Progress()
    with nbdkit(tmp_path, "memory", str(len(image))) as path, NbdConnection(unix=path) as disk:
        copy_in(disk, sink, progress)
    assert (progress.bytes_read, sink.compared) == (0, 512)
    assert list(sink.missed.runs()) == [(3, 2), (300, 1)]


def test_what_is_no_chunk_of_the_base(tmp_path: Path) -> None:
    repository = make(tmp_path / "repository", chunk_size=CHUNK)
    sink = AuditSink(repository.image(store(repository, "base", bytes(CHUNK * 4))))
    with (
        nbdkit(tmp_path, "memory", str(CHUNK * 3)) as path,
        NbdConnection(unix=path) as disk,
        pytest.raises(SourceError, match="196608 bytes"),
    ):
        copy_in(disk, sink, Progress())
    assert sink.compared == 0
    with pytest.raises(InvalidArgument):
        AuditSink(repository.image("no tree"))
