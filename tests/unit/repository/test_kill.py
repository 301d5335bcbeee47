"""Writers killed with SIGKILL at random instants: what was published is whole, what was not is gone without a trace."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.repository.repository_support import CHUNK, SETTINGS, make, objects, reopen, sparse_image, store
from vmbackupd.repository.catalog import INDEXES, PACKS
from vmbackupd.repository.sessions import SESSIONS

pytestmark = pytest.mark.usefixtures("both_sorts")

KILLS = 20
SIZE = 300 * CHUNK

WRITER = """
import random, sys
from pathlib import Path
from tests.unit.repository.repository_support import *
path, seed = Path(sys.argv[1]), sys.argv[2]
repository = reopen(path)
print("ready", flush=True)
for number in range(1000):
    name = f"backup-{seed}-{number}"
    store(repository, name, sparse_image(random.Random(name), %d))
    print(name, flush=True)
"""


def expected(name: str) -> bytes:
    return sparse_image(random.Random(name), SIZE)


def run_and_kill(path: Path, seeds: list[str], delay: float) -> set[str]:
    """Start a writer for each seed, kill them all after ``delay`` seconds of work; what they told was published."""
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER % SIZE, str(path), seed], stdout=subprocess.PIPE, text=True)
        for seed in seeds
    ]
    told: set[str] = set()
    try:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        time.sleep(delay)  # not to wait for anything: the instant of the kill is the input of this test
    finally:
        for child in children:
            child.kill()
        for child in children:
            output, _ = child.communicate()
            assert child.returncode == -signal.SIGKILL
            told |= set(output.split())
    return told


def test_killed_writers(tmp_path: Path) -> None:
    rng = random.Random(1)
    make(tmp_path)
    checked: set[str] = set()
    for kill in range(KILLS):
        seeds = [f"{kill}a", f"{kill}b"][: rng.choice([1, 2])]
        told = run_and_kill(tmp_path, seeds, rng.random() * 0.15)
        repository = reopen(tmp_path)
        listed = {summary.id: summary.error for summary in repository.backups()}
        assert set(listed.values()) <= {None}
        assert told | checked <= set(listed)
        assert len(listed) <= len(checked | told) + len(seeds)
        repository.clean_up()
        for name in set(listed) - checked:
            tree = repository.manifest(name).volumes[0].tree
            assert tree is not None
            assert repository.image(tree).read(0, SIZE) == expected(name)
        checked = set(listed)
        left = objects(tmp_path)
        assert not [name for name in left if name.startswith(SESSIONS) or ".tmp-" in name]
        # an index whose manifest was not published may stay, with its packs, until garbage is collected; and packs
        # whose writer was killed between the mark that there may be an index and the index
        covered = {pack_id.hex() for pack_id in repository.catalog.covered()}
        assert covered <= {name.rpartition("/")[2] for name in left if name.startswith(PACKS)}
    assert len(checked) > KILLS // 2
    for index in (tmp_path / INDEXES).iterdir():
        index.unlink()
    repository = reopen(tmp_path)
    for name in checked:
        tree = repository.manifest(name).volumes[0].tree
        assert repository.image(tree or "").read(0, SIZE) == expected(name)


def test_living_writers_are_left_alone(tmp_path: Path) -> None:
    make(tmp_path)
    repository = reopen(tmp_path)
    with repository.writer("one") as writer:
        sink = writer.image(200 * CHUNK)
        sink.write(0, random.Random(1).randbytes(200 * CHUNK))
        sink.finish()
        full = 200 * (CHUNK + 48) // SETTINGS.pack_size  # packs on their way; the last one stays open
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob(f"{PACKS}/*/*"))) < full and time.monotonic() < deadline:
            time.sleep(0.01)
        before = objects(tmp_path)
        assert sum(name.startswith(PACKS) for name in before) == full
        assert reopen(tmp_path).clean_up() == 0
        assert before.items() <= objects(tmp_path).items()  # another pack may have been on its way
    assert objects(tmp_path) == {}


def test_killed_before_and_after_the_index(tmp_path: Path) -> None:
    """Packs that no index ever told of go at once. Others may be in use: they are left to the garbage collector."""
    repository = make(tmp_path)
    rng = random.Random(2)
    store(repository, "one", rng.randbytes(100 * CHUNK))
    kept = objects(tmp_path)
    for covered in (False, True):
        writer = repository.writer("two")
        sink = writer.image(101 * CHUNK)
        sink.write(0, rng.randbytes(101 * CHUNK))
        sink.finish()
        if covered:
            writer._output.finish()
        writer._close()
        left = objects(tmp_path)
        assert {name for name in left if name.startswith("packs")} > {name for name in kept if name.startswith("packs")}
        assert reopen(tmp_path).clean_up() == 0
        assert objects(tmp_path) == left
        writer._session.drop()  # as if it had been killed
        session = f"{SESSIONS}/{writer.id.hex()}"
        if covered:
            assert reopen(tmp_path).clean_up() == 0
            assert set(left) - set(objects(tmp_path)) == {session, f"{session}.covered"}
        else:
            assert reopen(tmp_path).clean_up() > 0
            assert objects(tmp_path) == kept


def test_a_session_that_cannot_be_read(tmp_path: Path) -> None:
    repository = make(tmp_path)
    store(repository, "one", b"x" * CHUNK)
    kept = objects(tmp_path)
    (tmp_path / SESSIONS / ("ab" * 12)).write_bytes(b"{}")
    (tmp_path / SESSIONS / f"{'cd' * 12}.covered").write_bytes(b"1")
    reopen(tmp_path).clean_up()
    assert objects(tmp_path) == kept
