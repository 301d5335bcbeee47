"""Increments by dirty bitmap against full reads, on real QEMU disks and a real repository: whatever happens to a disk
between two backups, the image that was built on the one before is the image that is there, to the byte."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import libvirt
import pytest

from tests.unit.hypervisor.machine import Machine, create, disk
from vmbackupd.engine.copyloop import Progress, copy_in
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.hypervisor.base import BITMAP_PREFIX, bitmap_name
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor
from vmbackupd.hypervisor.storage_daemon import ImageSpec, StorageDaemon
from vmbackupd.job.bitmaps import changed_since
from vmbackupd.repository import LocalStorage, Repository, RepositoryWriter

SIZE, CHUNK = 32 << 20, 1 << 16


@pytest.fixture
def machine(new_machine: Callable[..., Machine], tmp_path: Path) -> Machine:
    return new_machine(disk(create(tmp_path / "a.qcow2"), "vda"))


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[RepositoryWriter]:
    storage = LocalStorage(tmp_path / "repository")
    storage.create()
    with Repository.create(storage).writer("all") as writer:
        yield writer


class Backups:
    """Backups of vda in a row: a checkpoint, what the guest does until T2, and the image below an overlay."""

    def __init__(self, machine: Machine, writer: RepositoryWriter) -> None:
        self.machine, self.writer = machine, writer
        self.number = 0
        self.base: str | None = None
        self.read = 0  # chunks read for the last one

    @property
    def checkpoint(self) -> str:
        return f"{BITMAP_PREFIX}j{self.number}"

    @contextmanager
    def still(self) -> Iterator[None]:
        """What is done inside is done while the disk lies below an overlay."""
        overlay = f"{self.machine.dir}/vda.j{self.number}"
        self.machine.with_hypervisor(lambda hv: hv.snapshot(self.machine.uuid, {"vda": overlay}))
        yield
        self.machine.with_hypervisor(lambda hv: hv.drop_overlay(self.machine.uuid, overlay))

    def record(self) -> None:
        """Begin the next checkpoint."""
        self.number += 1
        begun = self.machine.with_hypervisor(
            lambda hv: hv.begin_bitmaps(self.machine.uuid, self.checkpoint, ["vda"]))
        assert begun == {"vda": None}

    def why_not(self) -> str | None:
        """Why the disk cannot be built on the backup before."""
        before = f"{BITMAP_PREFIX}j{self.number - 1}"
        return self.machine.with_hypervisor(
            lambda hv: hv.bitmap_reasons(self.machine.uuid, before, ["vda"]))["vda"]

    def whole(self) -> str:
        return self._copy(None)

    def increment(self) -> str:
        return self._copy(f"{BITMAP_PREFIX}j{self.number - 1}")

    def _copy(self, since: str | None) -> str:
        name = None if since is None else bitmap_name(since, "vda")

        async def work(_: LibvirtHypervisor) -> str:
            async with StorageDaemon(self.machine.dir / "run") as daemon:
                spec = ImageSpec("qcow2", f"{self.machine.dir}/a.qcow2")
                socket, export = await daemon.export("x", spec, bitmap=name)
                with NbdConnection(unix=socket, export=export, bitmap=name) as source:
                    return self._read(source)

        return self.machine.with_hypervisor(work)

    def _read(self, source: NbdConnection) -> str:
        if not source.has_bitmap or self.base is None:
            sink = self.writer.image(source.size)
            copy_in(source, sink, Progress())
        else:
            changed = changed_since(self.writer.source(self.base), source, Progress())
            self.read = changed.count()
            sink = self.writer.update(self.base)
            copy_in(source, sink, Progress(), only=changed)
        return sink.finish()

    def published(self, tree: str) -> None:
        """The backup is in the repository: what was recorded before it is no longer needed."""
        self.base = tree
        before = f"{BITMAP_PREFIX}j{self.number - 1}"
        self.machine.with_hypervisor(lambda hv: hv.drop_bitmaps(self.machine.uuid, before))


@pytest.fixture
def backups(machine: Machine, writer: RepositoryWriter) -> Backups:
    return Backups(machine, writer)


def first(backups: Backups) -> str:
    """A first backup, whole."""
    backups.record()
    with backups.still():
        tree = backups.whole()
    backups.published(tree)
    return tree


def set_back(backups: Backups, tree: str, chunk: int, content: bytes) -> str:
    """The tree with one chunk as it was at T1: what the revert makes of a T2 image."""
    sink = backups.writer.update(tree)
    sink.write(chunk * CHUNK, content)
    return sink.finish()


@pytest.mark.parametrize("late", [False, True], ids=["begun before T1", "begun at T2"])
def test_what_a_revert_set_back_is_changed_again(backups: Backups, late: bool) -> None:
    """The second backup holds a chunk as of T1 that the disk holds as of T2. A bitmap that begins at T2 misses it, and
    the third backup would silently be wrong: it is why the bitmap begins before T1."""
    machine = backups.machine
    machine.write("virtio-disk0", 1, "0", "1M")
    first(backups)
    if not late:
        backups.record()
    machine.write("virtio-disk0", 2, "512k", "64k")  # after T1
    with backups.still():
        if late:
            backups.base, backups.number = backups.whole(), backups.number + 1
            t2 = backups.base
        else:
            t2 = backups.increment()
    if late:
        backups.number -= 1
        backups.record()
    backups.published(set_back(backups, t2, 8, b"\1" * CHUNK))
    backups.record()
    with backups.still():
        same = backups.increment() == backups.whole()
    assert same is not late


def test_nothing_is_read_of_what_did_not_change(backups: Backups) -> None:
    backups.machine.write("virtio-disk0", 1, "0", "8M")
    tree = first(backups)
    backups.record()
    with backups.still():
        assert backups.increment() == tree
    assert backups.read == 0


def test_a_disk_that_was_cut_and_grown_back_is_read_where_it_was_cut(backups: Backups) -> None:
    """QEMU marks nothing of it."""
    machine = backups.machine
    machine.write("virtio-disk0", 1, "0", "32M")
    first(backups)
    for size in (16 << 20, SIZE):
        machine.dom.blockResize("vda", size, libvirt.VIR_DOMAIN_BLOCK_RESIZE_BYTES)
    machine.write("virtio-disk0", 2, "24M", "64k")
    backups.record()
    with backups.still():
        assert backups.increment() == backups.whole()


def happenings(machine: Machine, dice: random.Random) -> list[Callable[[], None]]:
    """What may happen to a disk between two backups."""
    def place() -> tuple[str, str]:
        chunk = dice.randrange(SIZE // 4096)
        return str(chunk * 4096), str(min(dice.choice([4096, 65536, 1 << 20]), SIZE - chunk * 4096))

    def their_snapshot() -> None:
        """Somebody's overlay that comes and goes."""
        path = f"{machine.dir}/theirs"
        machine.with_hypervisor(lambda hv: hv.snapshot(machine.uuid, {"vda": path}))
        machine.write("virtio-disk0", dice.randrange(256), *place())
        machine.with_hypervisor(lambda hv: hv.drop_overlay(machine.uuid, path))

    def restart() -> None:
        machine.dom.destroy()
        machine.dom.create()

    return [*[lambda: machine.write("virtio-disk0", dice.randrange(256), *place())] * 6,
            *[lambda: machine.zero("virtio-disk0", *place())] * 2,
            *[lambda: machine.discard("virtio-disk0", *place())] * 2,
            their_snapshot, restart, machine.host.restart_libvirtd, machine.crash]


@pytest.mark.parametrize("seed", range(3))
def test_increments_are_what_is_there(backups: Backups, seed: int) -> None:
    """Twelve backups in a row, with the guest writing until T2, after it, and things happening between."""
    machine, rng = backups.machine, random.Random(seed)
    machine.write("virtio-disk0", 1, "0", "4M")
    first(backups)
    built = 0
    for _ in range(12):
        for _ in range(rng.randrange(6)):
            rng.choice(happenings(machine, rng))()
        backups.record()
        machine.write("virtio-disk0", rng.randrange(256), str(rng.randrange(500) * CHUNK), "64k")
        why_not = backups.why_not()
        with backups.still():
            whole = backups.whole()
            if why_not is None:
                built += 1
                assert backups.increment() == whole
            machine.write("virtio-disk0", rng.randrange(256), str(rng.randrange(500) * CHUNK), "64k")
        backups.published(whole)
    assert built >= 4  # of the others a crash cost the bitmap
    assert not [name for name in os.listdir(machine.dir) if ".j" in name]
