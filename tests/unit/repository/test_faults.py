"""A storage that is full or fails at any operation: a clear error, nothing published or lost, space given back."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import (
    CHUNK,
    SETTINGS,
    FaultyStorage,
    keys_of,
    make,
    manifest,
    objects,
    reopen,
    sparse_image,
    store,
    volume,
)
from vmbackupd.errors import BackupError, RepositoryFull, StorageError
from vmbackupd.repository import LocalStorage, Repository

pytestmark = pytest.mark.usefixtures("both_sorts")

SIZE = 400 * CHUNK


def backup(storage: FaultyStorage, image: bytes, backup_id: str = "two") -> None:
    keys = keys_of(storage.storage)
    with Repository.open(storage, settings=SETTINGS, keys=keys) as repository, repository.writer(backup_id) as writer:
        sink = writer.image(len(image))
        sink.write(0, image)
        tree = sink.finish()
        writer.publish(manifest(backup_id, volume("vda", tree, len(image))))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [RepositoryFull("no space left"), StorageError("input/output error")])
def test_every_operation_fails_once(tmp_path: Path, error: BackupError, late: bool) -> None:
    first = sparse_image(random.Random(1), SIZE)
    second = sparse_image(random.Random(2), SIZE)
    path = tmp_path / "counted"
    store(make(path), "one", first)
    counted = FaultyStorage(LocalStorage(path))
    backup(counted, second)
    assert {name.split()[0] for name in counted.operations} >= {"put", "get", "list", "stat", "claim"}
    for number in range(len(counted.operations)):
        path = tmp_path / str(number)
        tree = store(make(path), "one", first)
        before = set(objects(path))
        storage = FaultyStorage(LocalStorage(path))
        storage.faults = {number: error}
        storage.late = late
        failed = False
        try:
            backup(storage, second)
        except type(error) as reason:
            failed = True
            assert str(error) in str(reason)
        opened = reopen(path)
        assert opened.image(tree).read(0, SIZE) == first
        listed = {summary.id: summary.error for summary in opened.backups()}
        assert listed.pop("one") is None
        if listed:  # published though the last word was an error: then it is whole
            assert listed == {"two": None}
            assert opened.image(opened.manifest("two").volumes[0].tree or "").read(0, SIZE) == second
        else:
            assert failed
        opened.clean_up()
        left = set(objects(path)) - before
        if not listed and not any(name.startswith("indexes") for name in left):
            assert left == set()
        # and the next backup works
        store(opened, "three", second)
        assert opened.image(opened.manifest("three").volumes[0].tree or "").read(0, SIZE) == second


def test_storage_fails_for_good_while_writing(tmp_path: Path) -> None:
    """All threads end, the caller gets the storage's own error."""
    make(tmp_path)
    storage = FaultyStorage(LocalStorage(tmp_path))
    storage.always = ("put packs", RepositoryFull("disk full"))
    repository = Repository.open(storage, settings=SETTINGS, keys=keys_of(storage))
    with pytest.raises(RepositoryFull, match="disk full"), repository.writer("one") as writer:
        sink = writer.image(64 * SIZE)
        rng = random.Random(3)
        for number in range(64):
            sink.write(number * SIZE, rng.randbytes(SIZE))
        sink.finish()
        writer.publish(manifest("one"))
    assert objects(tmp_path) == {}


def test_read_errors(tmp_path: Path) -> None:
    tree = store(make(tmp_path), "one", sparse_image(random.Random(4), SIZE, density=1))
    storage = FaultyStorage(LocalStorage(tmp_path))
    source = Repository.open(storage, keys=keys_of(storage)).image(tree)
    image = source.read(0, SIZE)
    storage.always = ("open packs", StorageError("/repo: Input/output error"))
    assert source.read(0, SIZE) == image  # the packs are open already
    storage.always = None
    repository = Repository.open(storage, keys=keys_of(storage))
    storage.always = ("open packs", StorageError("/repo: Input/output error"))
    with pytest.raises(StorageError, match="Input/output error"):
        repository.image(tree)


def test_file_size_limit(tmp_path: Path) -> None:
    """The kernel itself refuses to write on: EFBIG instead of a full disk."""
    make(tmp_path)
    program = (
        "import resource; from pathlib import Path\n"
        "from tests.unit.repository.repository_support import *\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({100 * 1024}, {100 * 1024}))\n"
        f"try: store(reopen(Path({str(tmp_path)!r})), 'one', random.Random(1).randbytes({SIZE}))\n"
        "except RepositoryFull as reason: print(reason)\n"
    ).replace("import resource;", "import random, resource; from vmbackupd.errors import RepositoryFull;")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert str(tmp_path) in done.stdout
    assert "File too large" in done.stdout
    assert objects(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A filesystem of 4 MiB, in a mount namespace of a child where we are not allowed to mount ourselves."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    return tmp_path


def test_full_disk(small_disk: Path) -> None:
    program = (
        "import random, sys; from pathlib import Path\n"
        "from tests.unit.repository.repository_support import *\n"
        "from vmbackupd.errors import RepositoryFull\n"
        "path = Path(sys.argv[1]) / 'repository'\n"
        "repository = make(path)\n"
        "image = random.Random(1).randbytes(2 * 2**20)\n"
        "tree = store(repository, 'one', image)\n"
        "free = repository.storage.free_bytes()\n"
        "for attempt in range(3):\n"
        "    try: store(repository, 'two', random.Random(2).randbytes(3 * 2**20))\n"
        "    except RepositoryFull as reason: print(reason)\n"
        "    assert [item.id for item in repository.backups()] == ['one']\n"
        "    assert repository.image(tree).read(0, len(image)) == image\n"
        "    assert abs(repository.storage.free_bytes() - free) <= 64 * 1024\n"
        "store(repository, 'three', random.Random(3).randbytes(2**20))\n"
        "assert reopen(path).image(tree).read(0, len(image)) == image\n"
    )
    script = 'mount -t tmpfs -o size=4m none "$1" && exec "$2" -c "$3" "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(small_disk), sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"cannot mount here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("No space left on device") == 3


def test_limits_of_this_test() -> None:
    """The size limit above must not have leaked into this process."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
