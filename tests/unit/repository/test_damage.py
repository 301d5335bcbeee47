"""Objects truncated and flipped at random: what is read is right, or the error names what is wrong. Never a crash."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import CHUNK, make, manifest, objects, reopen, sparse_image, volume
from vmbackupd.errors import NotFound, RepositoryCorrupt

pytestmark = pytest.mark.usefixtures("both_sorts")


@pytest.fixture(scope="module")
def sound(both_sorts: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A repository of two backups, and their images by tree."""
    path = tmp_path_factory.mktemp("sound") / "repository"
    rng = random.Random(1)
    repository = make(path)
    images = {}
    for number in range(2):
        image = sparse_image(rng, 250 * CHUNK + number)
        with repository.writer(f"backup-{number}") as writer:
            sink = writer.image(len(image))
            sink.write(0, image)
            tree = sink.finish()
            blob = writer.blob(b"<domain/>" * 100)
            writer.publish(manifest(f"backup-{number}", volume("vda", tree, len(image)), config={"domain.xml": blob}))
        images[tree] = image
    return path, images


def read_all(path: Path, images: dict[str, bytes]) -> list[str]:
    """Read everything there is; the errors. Wrong content fails the test."""
    errors = []
    try:
        repository = reopen(path)
    except RepositoryCorrupt as reason:
        return [str(reason)]
    with repository:
        errors += [summary.error for summary in repository.backups() if summary.error is not None]
        for number in range(2):
            try:
                found = repository.manifest(f"backup-{number}")
                assert repository.blob(found.config["domain.xml"]) == b"<domain/>" * 100
            except (RepositoryCorrupt, NotFound) as reason:
                errors.append(str(reason))
        for tree, image in images.items():
            try:
                source = repository.image(tree)
                assert source.size == len(image)
                for at in range(0, len(image), 20 * CHUNK):
                    assert source.read(at, min(20 * CHUNK, len(image) - at)) == image[at : at + 20 * CHUNK]
                source.data_bytes()
                list(source.walk())
            except RepositoryCorrupt as reason:
                errors.append(str(reason))
    return errors


@pytest.mark.parametrize("kind", ["packs", "indexes", "manifests"])
@pytest.mark.parametrize("seed", range(12))
def test_damaged_objects(tmp_path: Path, sound: tuple[Path, dict[str, bytes]], kind: str, seed: int) -> None:
    rng = random.Random(f"{kind} {seed}")
    source, images = sound
    path = tmp_path / "repository"
    shutil.copytree(source, path)
    names = [name for name in objects(path) if name.startswith(kind)]
    for _ in range(6):
        victim = path / rng.choice(sorted(names))
        good = victim.read_bytes()
        damaged = bytearray(good)
        way = rng.random()
        if way < 0.2:
            damaged = damaged[: rng.randrange(len(good))]
        elif way < 0.3:
            damaged += rng.randbytes(rng.randrange(1, 200))
        elif way < 0.5:
            at = rng.randrange(len(good))
            damaged[at : at + rng.randrange(1, 5000)] = bytes(min(4096, len(good) - at))
        else:
            for _ in range(rng.choice([1, 1, 5, 50])):
                damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        victim.write_bytes(damaged)
        errors = read_all(path, images)
        if kind == "indexes":
            assert errors == []  # the packs tell everything
        elif kind == "manifests":
            assert errors
            assert all("manifest of backup " in error for error in errors)
        else:
            assert all(error.startswith("chunk ") for error in errors)
        victim.write_bytes(good)
        for extra in set(objects(path)) - set(objects(source)):
            (path / extra).unlink()
    assert read_all(path, images) == []


def test_missing_pack_is_named(tmp_path: Path, sound: tuple[Path, dict[str, bytes]]) -> None:
    source, images = sound
    path = tmp_path / "repository"
    shutil.copytree(source, path)
    packs = sorted(name for name in objects(path) if name.startswith("packs"))
    for name in packs:
        data = (path / name).read_bytes()
        (path / name).unlink()
        errors = read_all(path, images)
        assert errors
        assert any(name.rpartition("/")[2] in error for error in errors)
        (path / name).write_bytes(data)
    assert read_all(path, images) == []


def test_swapped_objects(tmp_path: Path, sound: tuple[Path, dict[str, bytes]]) -> None:
    """Two sound objects of one kind, each under the other's name."""
    source, images = sound
    for kind in ("packs", "indexes", "manifests"):
        path = tmp_path / kind
        shutil.copytree(source, path)
        one, two = sorted(name for name in objects(path) if name.startswith(kind))[:2]
        (path / one).rename(path / "third")
        (path / two).rename(path / one)
        (path / "third").rename(path / two)
        errors = read_all(path, images)
        assert bool(errors) == (kind != "indexes")


def test_damaged_pack_is_healed_by_another_copy(tmp_path: Path, sound: tuple[Path, dict[str, bytes]]) -> None:
    """A chunk that two packs hold is read from the one that is sound."""
    source, images = sound
    path = tmp_path / "repository"
    shutil.copytree(source, path)
    kept = {name: data for name, data in objects(path).items() if name.startswith("indexes")}
    for name in kept:
        (path / name).unlink()
    # with no index a writer knows nothing and stores everything again
    repository = reopen(path)
    tree, image = next(iter(images.items()))
    with repository.writer("again") as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        assert sink.finish() == tree
        assert sink.chunks_new > 0
        writer.publish(manifest("again", volume("vda", tree, len(image))))
    for name, data in kept.items():
        (path / name).write_bytes(data)
    old = {name for name in objects(source) if name.startswith("packs")}
    for name in old:
        (path / name).write_bytes(bytes(len(objects(source)[name])))
    assert reopen(path).image(tree).read(0, len(image)) == image
