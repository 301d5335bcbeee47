"""Trees and images against the slow twin, on random operations in random order."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    known,
    make,
    manifest,
    namer,
    reference_image,
    reopen,
    sparse_image,
    store,
    volume,
)
from vmbackupd.engine.reference_image import cut, image_of, tree_of
from vmbackupd.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("both_sorts")

SIZES = [
    0,
    1,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    15 * CHUNK,
    16 * CHUNK,
    16 * CHUNK + 7,
    17 * CHUNK,
    300 * CHUNK,
    700 * CHUNK + 99,
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("density", [0.0, 0.05, 0.9])
def test_image_equals_the_twin(tmp_path: Path, size: int, density: float) -> None:
    rng = random.Random(size)
    repository = make(tmp_path)
    image = sparse_image(rng, size, density=density)
    tree = store(repository, "one", image)
    expected, nodes = tree_of(cut(image, CHUNK), size, CHUNK, 16, namer(repository))
    assert tree == expected
    found = known(repository, tmp_path)
    assert nodes.items() <= found.items()
    assert len(found) == len(nodes) + len(set(cut(image, CHUNK).values()))
    assert image_of(tree, found) == image
    source = reopen(tmp_path).image(tree)
    assert (source.size, source.chunk_size) == (size, CHUNK)
    assert source.read(0, size) == image


@pytest.mark.parametrize("seed", range(8))
def test_random_operations(tmp_path: Path, seed: int) -> None:
    """Chunks in any order, written again, zeroed, in an image that may start from another one."""
    rng = random.Random(seed)
    repository = make(tmp_path)
    count = rng.randrange(1, 900)
    size = count * CHUNK - rng.randrange(CHUNK)
    model = bytearray(sparse_image(rng, size, density=rng.random()))
    base, last = store(repository, "base", bytes(model)), "base"
    for round_number in range(3):
        fresh = rng.random() < 0.3
        if fresh:
            model = bytearray(size)
        with repository.writer(f"round-{round_number}") as writer:
            assert writer.base(last).trees() == [base]
            sink = writer.image(size) if fresh else writer.update(base)
            for _ in range(rng.randrange(1, 400)):
                first = rng.randrange(count)
                start = first * CHUNK
                if rng.random() < 0.3:
                    many = min(rng.choice([1, 1, 3, 16, 40, 300]), count - first)
                    sink.zero(first, many)
                    model[start : start + many * CHUNK] = bytes(min(many * CHUNK, size - start))
                else:
                    data = rng.choice([rng.randbytes(CHUNK), bytes(CHUNK), b"same" * (CHUNK // 4)])[: size - start]
                    sink.write(start, data)
                    model[start : start + len(data)] = data
            base = sink.finish()
            # visible to its writer at once, also from packs that are still in memory
            assert writer.source(base).read(0, size) == model
            last = f"round-{round_number}"
            writer.publish(manifest(last, volume("vda", base, size)))
        assert base == tree_of(cut(bytes(model), CHUNK), size, CHUNK, 16, namer(repository))[0]
        assert reference_image(repository, tmp_path, base) == model


def test_reads_of_any_range(tmp_path: Path) -> None:
    rng = random.Random(9)
    repository = make(tmp_path)
    size = 500 * CHUNK + 17
    image = sparse_image(rng, size, density=0.3)
    source = repository.image(store(repository, "one", image))
    for _ in range(300):
        start = rng.randrange(size + 1)
        length = min(rng.choice([0, 1, 100, CHUNK, 5 * CHUNK, 100 * CHUNK]), size - start)
        assert source.read(start, length) == image[start : start + length]
    for start, length in [(size, 1), (size + 1, 0), (0, size + 1), (2**63, 1)]:
        with pytest.raises(InvalidArgument):
            source.read(start, length)
    covered = set()
    last = 0
    for start, length in source.extents():
        assert start >= last
        last = start + length
        covered |= set(range(start // CHUNK, -(-last // CHUNK)))
    assert covered == set(cut(image, CHUNK))
    assert source.data_bytes() == sum(map(len, cut(image, CHUNK).values()))


def test_update_stores_changed_chunks_and_their_path_only(tmp_path: Path) -> None:
    rng = random.Random(10)
    repository = make(tmp_path)
    size = 4096 * CHUNK  # three levels of 16
    base = store(repository, "base", rng.randbytes(size))
    with repository.writer("second") as writer:
        writer.base("base")
        sink = writer.update(base)
        sink.write(1234 * CHUNK, rng.randbytes(CHUNK))
        tree = sink.finish()
        assert (sink.chunks_new, sink.nodes_new) == (1, 3)
        # a chunk, three nodes and a root record, each with its header of 48 bytes and perhaps its tag of 16
        header = 64 if repository.header.encrypted else 48
        assert sink.bytes_stored <= header + CHUNK + 3 * (header + 16 + 16 * 32) + header + 64
        same = writer.update(tree)
        assert same.finish() == tree
        assert same.bytes_stored == 0
        writer.publish(manifest("second", volume("vda", tree, size)))


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    rng = random.Random(11)
    repository = make(tmp_path)
    image = sparse_image(rng, 300 * CHUNK)
    tree = store(repository, "one", image)
    with repository.writer("two") as writer:
        again = writer.image(len(image))
        again.write(0, image)
        assert again.finish() == tree
        assert (again.bytes_stored, again.chunks_new, again.nodes_new) == (0, 0, 0)
        shifted = writer.image(len(image) + CHUNK)
        shifted.write(CHUNK, image)
        shifted.finish()
        assert shifted.chunks_new == 0 < shifted.nodes_new


def test_wrong_calls(tmp_path: Path) -> None:
    repository = make(tmp_path)
    with repository.writer("one") as writer:
        sink = writer.image(10 * CHUNK + 5)
        for offset, length in [(1, CHUNK), (0, 5), (10 * CHUNK, CHUNK), (11 * CHUNK, 1), (2**63, CHUNK)]:
            with pytest.raises(InvalidArgument):
                sink.write(offset, b"x" * length)
        for first, count in [(0, 12), (11, 1), (2**63, 2**63), (1, 2**64 - 1)]:
            with pytest.raises(InvalidArgument):
                sink.zero(first, count)
        sink.zero(0, 11)
        tree = sink.finish()
        for call in (sink.finish, lambda: sink.write(0, b"x" * CHUNK), lambda: sink.zero(0, 1)):
            with pytest.raises(InvalidArgument):
                call()
        with pytest.raises(InvalidArgument):
            writer.image(2**50 + 1)
        for bad in ("", "xyz", tree[:-1], tree.upper() + "0", tree[:-2] + "  "):
            with pytest.raises(InvalidArgument):
                writer.source(bad)
