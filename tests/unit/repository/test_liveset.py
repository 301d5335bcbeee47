"""What is live is exactly what the trees refer to, in every pack that holds it."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    known,
    make,
    manifest,
    reopen,
    sparse_image,
    store,
    volume,
)
from vmbackupd.engine import reference_index as reference
from vmbackupd.engine.liveset import LiveSet
from vmbackupd.engine.reference_image import records
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository import Repository
from vmbackupd.repository.catalog import pack_name


def filled(path: Path, rng: random.Random) -> list[str]:
    """Trees of several backups that share content, some of it stored twice."""
    repository = make(path)
    images = [sparse_image(rng, 300 * CHUNK + 7) for _ in range(2)]
    trees = [store(repository, f"backup-{number}", image) for number, image in enumerate(images)]
    # begun before anything was published: it stores what the others have too
    with repository.writer("early") as early:
        with repository.writer("other") as other:
            sink = other.image(len(images[0]))
            sink.write(0, b"new" + images[1][3:])
            trees.append(sink.finish())
            other.publish(manifest("other", volume("vda", trees[-1], len(images[0]))))
        early.base("backup-1")
        sink = early.update(trees[1])
        sink.write(100 * CHUNK, rng.randbytes(3 * CHUNK))
        sink.write(0, b"new" + images[1][3 : 50 * CHUNK])
        trees.append(sink.finish())
        early.publish(manifest("early", volume("vda", trees[-1], len(images[1]))))
    repository.close()
    return trees


def own_entries(repository: Repository) -> dict[bytes, bytes]:
    """Each pack's own index."""
    return {
        pack_id: repository.catalog.read_pack_entries(pack_id, size)[0]
        for pack_id, size in repository.catalog.list_packs().items()
    }


def kept_records(path: Path, packs: Iterable[bytes]) -> list[tuple[bytes, Any]]:
    return [(pack_id, record) for pack_id in packs for record in records((path / pack_name(pack_id)).read_bytes())]


@pytest.mark.parametrize("seed", range(4))
def test_usage_is_that_of_the_plain_twin(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "repository"
    trees = filled(path, rng)
    with reopen(path) as repository:
        plain = known(repository, path)
        own = own_entries(repository)
        for chosen in (trees, trees[:1], trees[1:], trees[2:] * 2, []):
            live = reference.live(chosen, plain)
            found = LiveSet(repository.catalog.current)
            for tree in chosen:
                found.add_tree(repository.reader(repository.catalog.current), bytes.fromhex(tree))
            found.finish()
            assert found.missing == []
            usage = {}
            for pack_id in own:
                held = list(records((path / pack_name(pack_id)).read_bytes()))
                sizes = [(record[0] in live, 48 + len(record[4])) for record in held]
                usage[pack_id] = (
                    sum(is_live for is_live, _ in sizes),
                    len(sizes),
                    sum(size for is_live, size in sizes if is_live),
                    sum(size for _, size in sizes),
                )
                names = [record[0] for record in held if record[0] in live]
                assert [record[0] for record in found.live_among(own[pack_id])] == names
                assert list(found.live_entries(pack_id)) == found.live_among(own[pack_id])
            told = found.pack_usage()
            assert {pack_id: told[pack_id][1::2] for pack_id in told} == {pack: usage[pack][1::2] for pack in usage}
            # one copy of each counts
            assert all(told[pack_id][at] <= usage[pack_id][at] for pack_id in told for at in range(4))
            sizes = {record[0]: 48 + len(record[4]) for _, record in kept_records(path, own) if record[0] in live}
            assert sum(figures[0] for figures in told.values()) == len(sizes)
            assert sum(figures[2] for figures in told.values()) == sum(sizes.values())
            some = set(rng.sample(sorted(own), len(own) // 2))
            assert {pack_id: told[1::2] for pack_id, told in found.pack_usage(some).items()} == {
                pack_id: usage[pack_id][1::2] for pack_id in some
            }
            for name in plain:
                assert found.is_live(name) == (name in live)


def test_packs_that_are_passed_over(tmp_path: Path) -> None:
    """Records only in condemned packs are missing, those with another copy are not."""
    rng = random.Random(5)
    path = tmp_path / "repository"
    trees = filled(path, rng)
    with reopen(path) as repository:
        plain = known(repository, path)
        packs = repository.catalog.list_packs()
        holders: dict[bytes, set[bytes]] = {}
        kinds = {}
        for pack_id in packs:
            for record in records((path / pack_name(pack_id)).read_bytes()):
                holders.setdefault(record[0], set()).add(pack_id)
                kinds[record[0]] = record[1]
        assert any(len(where) > 1 for where in holders.values())
        for _ in range(20):
            condemned = set(rng.sample(sorted(packs), rng.randrange(1, len(packs))))
            index = repository.catalog.for_writer(packs, condemned)
            found = LiveSet(index)
            for tree in trees:
                found.add_tree(repository.reader(repository.catalog.current), bytes.fromhex(tree))
            found.finish()
            lost = {name for name in reference.live(trees, plain) if holders[name] <= condemned}
            assert {(name, kind) for name, kind, _ in found.missing} == {(name, kinds[name]) for name in lost}
            assert found.missing_count >= len(lost)
            assert set(found.pack_usage()) == set(packs) - condemned
            assert all(not found.is_live(name) for name in lost)


def test_a_node_that_cannot_be_read(tmp_path: Path) -> None:
    """It might lead anywhere: nobody may go on as if it did not."""
    path = tmp_path / "repository"
    repository = make(path)
    tree = store(repository, "one", sparse_image(random.Random(1), 300 * CHUNK))
    for pack_id in repository.catalog.list_packs():
        (path / pack_name(pack_id)).unlink()
    with reopen(path) as again, pytest.raises(RepositoryCorrupt, match=tree):
        LiveSet(again.catalog.current).add_tree(again.reader(again.catalog.current), bytes.fromhex(tree))
    repository.close()


def test_one_in_a_cycle_is_collected(tmp_path: Path) -> None:
    """An error's traceback can hold it, and be held by what it holds."""
    repository = make(tmp_path)
    store(repository, "one", b"x" * CHUNK)

    class Held(LiveSet):
        pass

    for _ in range(3):
        held = Held(repository.catalog.current)
        held.itself = [held, repository.catalog.current]  # type: ignore[attr-defined]
        held.missing.append(held)  # type: ignore[arg-type]
        del held
        gc.collect()
