"""A file read by the repository's own workers: the tree that handing over would make."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from typing_extensions import Buffer

from tests.unit.repository.repository_support import make
from vmbackupd.engine.copyloop import Progress
from vmbackupd.engine.filein import read_file
from vmbackupd.errors import SourceError
from vmbackupd.repository import LocalStorage
from vmbackupd.repository.catalog import PACKS


def sparse_file(path: Path, rng: random.Random, chunk: int) -> int:
    """An image whose data and holes begin and end anywhere; its size."""
    size = rng.randrange(1, 600 * chunk)
    with path.open("wb") as file:
        file.truncate(size)
        for _ in range(rng.randrange(12)):
            file.seek(rng.randrange(size))
            data = rng.choice([rng.randbytes, bytes])(rng.randrange(40 * chunk))
            file.write(data[: size - file.tell()])
    return size


@pytest.mark.parametrize("chunk", [4096, 65536])
def test_the_tree_is_that_of_the_chunks_one_by_one(tmp_path: Path, rng: random.Random, chunk: int) -> None:
    repository = make(tmp_path / "repository", chunk_size=chunk)
    for _ in range(10):
        path = tmp_path / "image"
        size = sparse_file(path, rng, chunk)
        whole = path.read_bytes()
        with repository.writer("one") as writer, path.open("rb") as file:
            sink = writer.image(size)
            sink.write(0, bytes(min(size, chunk)))  # what was there before does not matter
            progress = Progress()
            read_file(file.fileno(), sink, progress)
            tree = sink.finish()
            plain = writer.image(size)
            plain.write(0, whole)
            assert plain.finish() == tree
            assert writer.source(tree).read(0, size) == whole
        assert progress.bytes_done == size


def test_a_file_that_shrinks_is_an_error_and_the_writer_goes_on(
    tmp_path: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shrinks when the first pack is full: only as much as fits the packs in memory can have been read by then."""
    repository = make(tmp_path / "repository")
    path = tmp_path / "image"
    path.write_bytes(rng.randbytes(8 << 20))
    put = LocalStorage.put_if_absent

    def truncate_and_put(self: LocalStorage, name: str, parts: Iterable[Buffer]) -> bool:
        if name.startswith(f"{PACKS}/"):
            os.truncate(path, 4096)
        return put(self, name, parts)

    monkeypatch.setattr(LocalStorage, "put_if_absent", truncate_and_put)
    with repository.writer("one") as writer, path.open("rb") as file:
        sink = writer.image(8 << 20)
        with pytest.raises(SourceError, match=r"the disk: it ends before byte \d+: it was truncated"):
            read_file(file.fileno(), sink, Progress(), label="the disk")
        again = writer.image(4096)
        read_file(file.fileno(), again, Progress())
        assert writer.source(again.finish()).read(0, 4096) == path.read_bytes()


def test_a_descriptor_that_cannot_be_read(tmp_path: Path, rng: random.Random) -> None:
    repository = make(tmp_path / "repository")
    path = tmp_path / "image"
    path.write_bytes(rng.randbytes(8 * 4096))
    descriptor = os.open(path, os.O_WRONLY)
    try:
        wrong = pytest.raises(SourceError, match=r"image: reading .* Bad file descriptor")
        with repository.writer("one") as writer, wrong:
            sink = writer.image(8 * 4096)
            read_file(descriptor, sink, Progress(), label="image")
    finally:
        os.close(descriptor)
