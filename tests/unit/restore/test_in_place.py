"""Restores to new raw files, and over targets that hold most of the volume already."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.restore_kit import LUN_ID, Kit, loop_device, make_kit, same
from vmbackupd.errors import TargetRefused
from vmbackupd.job.options import RestoreOptions
from vmbackupd.model import RevertMode
from vmbackupd.restore.execute import execute
from vmbackupd.restore.planner import make_plan

CHUNK = 65536


class Watcher:
    """An observer and journal that only remembers."""

    def __init__(self) -> None:
        self.pending: list[tuple[str, str]] = []

    def step(self, name: str) -> None: ...
    def progress(self, done: int, total: int) -> None: ...
    def warning(self, text: str) -> None: ...

    def effect(self, undo: str, argument: str) -> Callable[[], None]:
        self.pending.append((undo, argument))
        return lambda: self.pending.remove((undo, argument))


def run(tmp_path: Path, test: Callable[[Kit], Awaitable[None]], mode: RevertMode = RevertMode.BACKUP) -> None:
    async def go() -> None:
        kit = await make_kit(tmp_path, mode)
        with closing(kit.repository):
            await test(kit)

    asyncio.run(go())


async def restore(kit: Kit, volumes: dict[str, str], *, in_place: bool = True, force: bool = False) -> dict[str, int]:
    """Bytes written by volume."""
    stated = {record.id: "none" for record in kit.manifest.volumes} | volumes
    options = RestoreOptions(volumes=stated, in_place=in_place, force=force)
    watcher = Watcher()
    plan = await make_plan(
        kit.manifest, options, repository=kit.repository, hypervisor=None, storage_daemon=kit.storage_daemon
    )
    result = await execute(
        plan,
        repository=kit.repository,
        manifest=kit.manifest,
        storage_daemon=kit.storage_daemon,
        hypervisor=None,
        observer=watcher,
        on_effect=watcher.effect,
    )
    assert watcher.pending == []
    written = result["bytes_written"]
    assert isinstance(written, dict)
    return written


def change(path: Path, *places: int) -> None:
    with path.open("r+b") as file:
        for place in places:
            file.seek(place)
            old = file.read(1)
            file.seek(place)
            file.write(bytes([old[0] ^ 0xFF]))


def test_a_new_raw_file_needs_no_server(tmp_path: Path) -> None:
    """It is written straight; holes stay holes; it bears its name when it is complete."""
    target = tmp_path / "vda.raw"

    async def test(kit: Kit) -> None:
        def none() -> None:
            raise AssertionError("a storage daemon was started")

        kit.storage_daemon = none  # type: ignore[method-assign,assignment]
        written = await restore(kit, {"vda": str(target)})
        assert same(target, kit.expected("vda"))
        assert 0 < written["vda"] < os.stat(target).st_size
        assert os.stat(target).st_blocks * 512 < os.stat(target).st_size
        assert os.stat(target).st_mode & 0o777 == 0o600

    run(tmp_path, test)


def test_a_new_raw_file_that_the_restore_reverts(tmp_path: Path) -> None:
    target = tmp_path / "vda.raw"

    async def test(kit: Kit) -> None:
        written = await restore(kit, {"vda": str(target)})
        assert same(target, kit.expected("vda"))
        assert written["vda"] > 0

    run(tmp_path, test, RevertMode.RESTORE)


@pytest.mark.parametrize("mode", [RevertMode.BACKUP, RevertMode.RESTORE])
def test_only_differences_are_written_to_a_raw_file(tmp_path: Path, mode: RevertMode) -> None:
    target = tmp_path / "vda.raw"

    async def test(kit: Kit) -> None:
        await restore(kit, {"vda": str(target)})
        change(target, 5, CHUNK * 40, CHUNK * 41 - 1, 200 * CHUNK)
        written = await restore(kit, {"vda": str(target)})
        assert same(target, kit.expected("vda"))
        if mode is RevertMode.BACKUP:
            assert written["vda"] == 3 * CHUNK
            assert await restore(kit, {"vda": str(target)}) == {"vda": 0}

    run(tmp_path, test, mode)


def test_without_in_place_data_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "vda.raw"

    async def test(kit: Kit) -> None:
        await restore(kit, {"vda": str(target)})
        with pytest.raises(TargetRefused, match="not empty"):
            await restore(kit, {"vda": str(target)}, in_place=False)
        written = await restore(kit, {"vda": str(target)}, in_place=False, force=True)
        assert written["vda"] == os.stat(target).st_size
        assert same(target, kit.expected("vda"))

    run(tmp_path, test)


def test_a_longer_file_is_cut(tmp_path: Path) -> None:
    target = tmp_path / "vda.raw"

    async def test(kit: Kit) -> None:
        await restore(kit, {"vda": str(target)})
        with target.open("ab") as file:
            file.write(b"the rest of something" * 1000)
        assert await restore(kit, {"vda": str(target)}) == {"vda": 0}
        assert same(target, kit.expected("vda"))

    run(tmp_path, test)


def qemu(*words: str) -> None:
    subprocess.run([words[0], *words[1:]], check=True, stdout=subprocess.DEVNULL)


def test_only_differences_are_written_to_a_qcow2_file(tmp_path: Path) -> None:
    target = tmp_path / "vda.qcow2"

    async def test(kit: Kit) -> None:
        await restore(kit, {"vda": str(target)})
        inode = target.stat().st_ino
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P 7 {5 * CHUNK} 512", str(target))
        assert await restore(kit, {"vda": str(target)}) == {"vda": CHUNK}
        assert await restore(kit, {"vda": str(target)}) == {"vda": 0}
        assert same(target, kit.expected("vda"), ("qcow2", "raw"))
        assert target.stat().st_ino == inode
        qemu("qemu-img", "check", "-q", str(target))

    run(tmp_path, test)


def test_a_qcow2_file_that_is_more_than_its_content_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "vda.qcow2"

    async def test(kit: Kit) -> None:
        await restore(kit, {"vda": str(target)})
        for words in (
            ["qemu-img", "snapshot", "-c", "one", str(target)],
            ["qemu-img", "resize", "-q", str(target), "+1M"],
            ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(kit.expected("vda")), "-F", "raw", str(target)],
        ):
            qemu(*words)
            with pytest.raises(TargetRefused, match="not empty"):
                await restore(kit, {"vda": str(target)})
            assert (await restore(kit, {"vda": str(target)}, force=True))["vda"] > 0
            assert same(target, kit.expected("vda"), ("qcow2", "raw"))
        target.write_bytes(b"no image at all" * 1000)
        with pytest.raises(TargetRefused, match="not empty"):
            await restore(kit, {"vda": str(target)})

    run(tmp_path, test)


def test_only_differences_are_written_to_a_block_device(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    with backing.open("wb") as file:
        file.write(os.urandom(16 << 20))

    async def test(kit: Kit) -> None:
        with loop_device(backing) as device:
            first = await restore(kit, {LUN_ID: device})
            assert first[LUN_ID] == 16 << 20
            change(Path(device), 3 * CHUNK)
            assert await restore(kit, {LUN_ID: device}) == {LUN_ID: CHUNK}
        assert same(backing, kit.expected(LUN_ID))

    run(tmp_path, test)
