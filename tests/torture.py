"""SIGKILL at random instants: writers, prune and garbage collectors at work at once on one repository.

    python -m tests.torture [KILLS] [--seed N] [--full-disk] [--directory PATH]

Processes work on one local repository: two make backups (whole ones and ones that build on the one before), one prunes,
two collect garbage. At random instants one or all of them are killed and replaced. After each kill every backup that
exists is read back and compared byte for byte; when all were killed, those told of as published and not pruned
are all there, and after a collection hardly more than they need. At the end everything is forgotten and collected, and
nothing may be left. With ``--full-disk`` the repository lies on a small file system of its own (needs root), which is
full again and again: everybody fails, and nothing is lost.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.unit.repository.repository_support import CHUNK, make, manifest, reopen, volume
from vmbackupd.errors import BackupError, NotFound, RepositoryFull
from vmbackupd.repository import Repository, Settings
from vmbackupd.repository.retention import KeepPolicy

SETTINGS = Settings(workers=2, pack_size=32 * CHUNK)
CHUNKS = 120
KEPT = 4
LONGEST = 0.4  # seconds between kills, at most
SMALL_DISK = 1200 * 2**10
ROLES = ("full", "update", "prune", "gc", "gc")


# ---- the processes that are killed


def image_of(name: str) -> bytes:
    """The image of a backup: the chunks come from a pool, so that backups share most of them."""
    rng = random.Random(name)
    return b"".join(pool(rng.randrange(3 * CHUNKS)) for _ in range(CHUNKS))


def pool(number: int) -> bytes:
    return b"" + random.Random(number).randbytes(64) * (CHUNK // 64 // 2) + random.Random(-number).randbytes(CHUNK // 2)


def work(path: Path, role: str, seed: str) -> int:
    """What one process does until it is killed; it prints the names of backups that are published or forgotten."""
    rng = random.Random(seed)
    number = 0
    with reopen(path, SETTINGS) as repository:
        print("ready", flush=True)
        while True:
            number += 1
            try:
                turn(repository, role, f"{seed}-{number}", rng)
            except RepositoryFull:
                print("full", flush=True)
            except NotFound:
                continue  # somebody else forgot it


def turn(repository: Repository, role: str, name: str, rng: random.Random) -> None:
    if role == "gc":
        repository.gc()
    elif role == "prune":
        for decision in repository.prune(KeepPolicy(keep_last=KEPT), dry_run=True):
            if not decision.keep:
                print(f"forgetting {decision.backup.id}", flush=True)
                repository.forget([decision.backup.id])
        time.sleep(rng.random() * 0.05)  # so that backups pile up between prunes
    else:
        back_up(repository, role, name)


def back_up(repository: Repository, role: str, name: str) -> None:
    image = image_of(name)
    with repository.writer(name) as writer:
        backups = [item for item in repository.backups() if item.error is None] if role == "update" else []
        if backups:
            base = writer.base(backups[-1].id)
            sink = writer.update(base.volumes[0].tree or "")
            before = image_of(base.id)
        else:
            sink, before = writer.image(len(image)), bytes(len(image))
        for at in range(0, len(image), CHUNK):
            if image[at : at + CHUNK] != before[at : at + CHUNK]:
                sink.write(at, image[at : at + CHUNK])
        now = time.time()
        published = manifest(name, volume("vda", sink.finish(), len(image)))
        writer.publish(type(published)(**{**fields_of(published), "t1": now, "t2": now, "created": now}))
    print(f"published {name}", flush=True)


def fields_of(published: object) -> dict[str, object]:
    return {name: getattr(published, name) for name in published.__dataclass_fields__}  # type: ignore[attr-defined]


# ---- the one who kills and looks


@dataclass
class Torture:
    """One run. ``published``: told of by a writer; ``forgotten``: a prune said that it was about to forget it."""

    path: Path
    rng: random.Random
    full_disk: bool = False
    published: set[str] = field(default_factory=set)
    forgotten: set[str] = field(default_factory=set)
    digests: dict[str, bytes] = field(default_factory=dict)
    kills: int = 0
    fulls: int = 0
    read: int = 0

    def run(self, kills: int, tell: Callable[[str], None]) -> None:
        make(self.path, settings=SETTINGS).close()
        children: list[Child] = []
        try:
            while self.kills < kills:
                while len(children) < len(ROLES):
                    missing = next(role for role in ROLES if [c.role for c in children].count(role) < ROLES.count(role))
                    children.append(Child(self.path, missing, f"{missing}{self.rng.randrange(2**32)}"))
                while not any(child.ready for child in children):
                    self.listen(children, LONGEST)
                self.listen(children, self.rng.random() ** 2 * LONGEST)
                ready = [child for child in children if child.ready]
                victims = list(children) if self.rng.random() < 0.1 else [self.rng.choice(ready)]
                for child in victims:
                    children.remove(child)
                    self.hear(child.kill())
                    self.kills += 1
                self.look(quiet=not children)
                if self.kills % 50 < len(victims):
                    tell(f"{self.kills} kills, {len(self.published)} published, {self.read} read back")
        finally:
            for child in children:
                self.hear(child.kill())
        self.look(quiet=True)
        self.end()

    def listen(self, children: list[Child], seconds: float) -> None:
        """Take in what they tell, for so long: the instant of the kill is this test's input."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            ready, _, _ = select.select([child.output for child in children], [], [], left)
            for child in children:
                if child.output in ready:
                    self.hear(child.read())

    def hear(self, lines: list[str]) -> None:
        for line in lines:
            what, _, name = line.partition(" ")
            if what == "published":
                self.published.add(name)
            elif what == "forgetting":
                self.forgotten.add(name)
            elif what == "full":
                self.fulls += 1

    def look(self, *, quiet: bool) -> None:
        """Read back everything that is published. ``quiet``: nobody else is at work."""
        with reopen(self.path, SETTINGS) as repository:
            listed = {item.id: item.error for item in repository.backups()}
            assert set(listed.values()) <= {None}, listed
            if quiet:
                lost = self.published - self.forgotten - listed.keys()
                assert not lost, f"published and gone: {lost}"
            for name in listed:
                self.read_back(repository, name)
            if quiet:
                self.check_space(repository, set(listed))

    def read_back(self, repository: Repository, name: str) -> None:
        try:
            with repository.reading(name) as found:
                image = repository.image(found.volumes[0].tree or "")
                data = image.read(0, image.size)
        except NotFound:
            return  # pruned since the listing
        if name not in self.digests:
            self.digests[name] = hashlib.sha256(image_of(name)).digest()
        assert hashlib.sha256(data).digest() == self.digests[name], f"{name} reads as something else"
        self.read += 1

    def check_space(self, repository: Repository, listed: set[str]) -> None:
        """After a collection with nobody at work there is hardly more than what the backups need."""
        try:
            repository.gc()
        except RepositoryFull:
            return
        needed = {image_of(name)[at : at + CHUNK] for name in listed for at in range(0, CHUNKS * CHUNK, CHUNK)}
        used = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        room = 1.5 * len(needed) * CHUNK + 64 * 2**10 * (1 + len(listed))
        assert used < room, f"{used} bytes for {len(needed)} chunks of {CHUNK}"
        left = [file for kind in ("sessions", "condemned", "waits") for file in self.path.glob(f"{kind}/*")]
        assert not left, left

    def end(self) -> None:
        """Forget everything: nothing is left."""
        with reopen(self.path, SETTINGS) as repository:
            repository.forget([item.id for item in repository.backups()])
            repository.gc()
        left = [str(file) for file in self.path.rglob("*") if file.is_file() and file.name != "repository.json"]
        assert not left, left


class Child:
    """A process that works until it is killed."""

    def __init__(self, path: Path, role: str, seed: str) -> None:
        self.role = role
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture", "--work", role, seed, "--directory", str(path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self.output = self._process.stdout.fileno()
        self._rest = b""
        self.ready = False
        os.set_blocking(self.output, False)

    def read(self) -> list[str]:
        """The lines it printed since. AssertionError if it has ended by itself."""
        try:
            data = os.read(self.output, 2**16)
        except BlockingIOError:
            return []
        if not data:
            self._process.wait(60)
            self.kill()  # says why it ended
        *lines, self._rest = (self._rest + data).split(b"\n")
        self.ready = self.ready or b"ready" in lines
        return [line.decode() for line in lines]

    def kill(self) -> list[str]:
        """Kill it; what it said last. AssertionError if it had ended by itself."""
        ended = self._process.poll()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        os.set_blocking(self.output, True)
        assert self._process.stdout is not None and self._process.stderr is not None
        rest = self._rest + self._process.stdout.read()
        errors = self._process.stderr.read().decode()
        self._process.stdout.close()
        self._process.stderr.close()
        assert ended is None, f"{self.role} ended by itself: {errors}"
        return [line.decode() for line in rest.split(b"\n")[:-1]]


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A file system of a few MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def torture(directory: Path, kills: int, seed: int, *, full_disk: bool = False, tell: Callable[[str], None]) -> Torture:
    """Run it below ``directory``, an empty one. AssertionError if anything is lost or left."""
    run = Torture(directory / "repository", random.Random(seed), full_disk)
    if full_disk:
        with small_disk(directory):
            run.run(kills, tell)
    else:
        run.run(kills, tell)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description="kill writers, prune and gc at random instants")
    parser.add_argument("kills", nargs="?", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--full-disk", action="store_true")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--work", nargs=2, metavar=("ROLE", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.directory, *options.work)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="torture-") as directory:
        try:
            done = torture(Path(directory), options.kills, options.seed, full_disk=options.full_disk, tell=print)
        except (AssertionError, BackupError) as reason:
            print(f"torture: seed {options.seed}: {reason}", file=sys.stderr)
            return 1
    print(
        f"{done.kills} kills in {time.monotonic() - began:.0f} s: {len(done.published)} backups published, "
        f"{done.read} times one was read back, the disk was full {done.fulls} times; nothing was lost, nothing is left"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
