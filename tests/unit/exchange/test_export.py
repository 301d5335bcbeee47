"""Exports: what other tools read is what was stored, and a file has its name only when it is complete and sound."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require
from tests.unit.exchange.exchange_support import (
    CHUNK,
    Effects,
    Watcher,
    daemons,
    disk_image,
    run,
    sparse_file,
    stored,
    stored_at_t2,
    tool,
)
from tests.unit.repository.repository_support import reopen
from vmbackupd.errors import Cancelled, InvalidArgument, NotFound, RepositoryCorrupt, TargetError, TargetRefused
from vmbackupd.exchange.export import ExportTarget, export_volume
from vmbackupd.hypervisor.storage_daemon import ImageSpec
from vmbackupd.repository import Manifest, Repository

SIZE = 24 << 20


def export(
    tmp_path: Path, repository: Repository, manifest: Manifest, target: ExportTarget, volume: str = "vda"
) -> dict[str, object]:
    """Export, and see to it that nothing but the file is left."""
    effects, watcher = Effects(), Watcher()
    directory = Path(target.path).parent
    before = set(os.listdir(directory)) if directory.exists() else set()
    done = run(
        export_volume(
            repository,
            manifest,
            volume,
            target,
            storage_daemon=daemons(tmp_path),
            observer=watcher,
            on_effect=effects,
        )
    )
    assert effects.pending == [] and ("unlink", target.path + ".part") in effects.seen
    assert watcher.done == watcher.total and watcher.steps[0] == "prepare-target"
    assert set(os.listdir(directory)) == before | {os.path.basename(target.path)}
    assert list(tmp_path.glob("run/*")) == []
    assert os.stat(target.path).st_mode & 0o777 == 0o600
    return done


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.mkdir()
    return path


@pytest.mark.parametrize("chunk", [4096, CHUNK, 1 << 20])
@pytest.mark.parametrize(
    ("format", "compression"), [("raw", None), ("qcow2", None), ("qcow2", "zlib"), ("qcow2", "zstd")]
)
def test_other_tools_read_what_was_stored(
    tmp_path: Path, out: Path, chunk: int, format: str, compression: str | None
) -> None:
    image = disk_image(random.Random(f"{chunk} {format} {compression}"), SIZE + 512)
    original = sparse_file(tmp_path / "original.raw", image)
    repository, manifest = stored(tmp_path, image, chunk=chunk)
    path = out / f"vda.{format}"
    with repository:
        done = export(tmp_path, repository, manifest, ExportTarget(str(path), format, compression))
    tool("qemu-img", "compare", "-f", "raw", "-F", format, original, path)
    info = json.loads(tool("qemu-img", "info", "--output=json", "-f", format, path))
    assert info["virtual-size"] == SIZE + 512
    # Holes stay holes; a chunk that holds data is written whole.
    assert info["actual-size"] < SIZE * 3 // 4 or chunk > CHUNK
    assert done["allocated"] == os.stat(path).st_blocks * 512
    if format == "raw":
        assert path.read_bytes() == image
    else:
        checked = json.loads(tool("qemu-img", "check", "--output=json", "-f", "qcow2", path))
        assert checked.get("leaks", 0) == checked.get("corruptions", 0) == 0
        allocated, compressed = checked["allocated-clusters"], checked.get("compressed-clusters", 0)
        # what does not shrink is stored as it is
        assert compressed > allocated // 2 if compression else compressed == 0
        assert info["format-specific"]["data"]["compression-type"] == (compression or "zlib")


def test_an_encrypted_repository_is_exported_from(tmp_path: Path, out: Path) -> None:
    image = disk_image(random.Random(15), 4 << 20)
    original = sparse_file(tmp_path / "original.raw", image)
    repository, manifest = stored(tmp_path, image, encrypted=True)
    with repository:
        export(tmp_path, repository, manifest, ExportTarget(str(out / "vda"), "qcow2"))
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", original, out / "vda")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_volume_that_is_reverted_at_restore_time_is_exported_as_of_t1(tmp_path: Path, out: Path, format: str) -> None:
    repository, manifest, expected = stored_at_t2(tmp_path, random.Random(7), 8 << 20)
    original = sparse_file(tmp_path / "t1.raw", expected)
    with repository:
        export(tmp_path, repository, manifest, ExportTarget(str(out / "vda"), format))
    tool("qemu-img", "compare", "-f", "raw", "-F", format, original, out / "vda")


def test_a_size_that_is_no_whole_sectors_is_rounded_up(tmp_path: Path, out: Path) -> None:
    image = disk_image(random.Random(8), 1_000_001)
    repository, manifest = stored(tmp_path, image)
    with repository:
        for format in ("raw", "qcow2"):
            export(tmp_path, repository, manifest, ExportTarget(str(out / format), format))
    assert (out / "raw").read_bytes() == image + bytes(-len(image) % 512)
    tool("qemu-img", "compare", "-f", "raw", "-F", "qcow2", out / "raw", out / "qcow2")


def test_an_existing_file_is_refused_unless_it_is_to_be_replaced(tmp_path: Path, out: Path) -> None:
    image = disk_image(random.Random(9), 1 << 20)
    repository, manifest = stored(tmp_path, image)
    path = out / "vda.raw"
    path.write_bytes(b"precious")
    with repository:
        with pytest.raises(TargetRefused, match="vda.raw exists already.*--force"):
            export(tmp_path, repository, manifest, ExportTarget(str(path)))
        assert path.read_bytes() == b"precious"
        export(tmp_path, repository, manifest, ExportTarget(str(path), replace=True))
        assert path.read_bytes() == image
        (out / "link").symlink_to(path)
        (out / "pipe").mkdir()
        for name in ("link", "pipe"):
            with pytest.raises(TargetRefused, match="no regular file"):
                export(tmp_path, repository, manifest, ExportTarget(str(out / name), replace=True))
        with pytest.raises(TargetRefused, match="directory .* does not exist"):
            export(tmp_path, repository, manifest, ExportTarget(str(out / "none" / "x")))
        with pytest.raises(NotFound, match="has no volume 'vdb': it has vda"):
            export(tmp_path, repository, manifest, ExportTarget(str(out / "new")), volume="vdb")
    assert sorted(os.listdir(out)) == ["link", "pipe", "vda.raw"]


def test_a_file_a_vm_has_open_is_never_replaced(tmp_path: Path, out: Path) -> None:
    repository, manifest = stored(tmp_path, disk_image(random.Random(10), 1 << 20))
    path = out / "vda.raw"
    path.write_bytes(bytes(1 << 20))

    async def work() -> None:
        async with daemons(tmp_path)() as vm:
            await vm.export("disk", ImageSpec("raw", str(path)), writable=True)
            await export_volume(
                repository,
                manifest,
                "vda",
                ExportTarget(str(path), replace=True),
                storage_daemon=daemons(tmp_path),
                observer=Watcher(),
                on_effect=Effects(),
            )

    with repository, pytest.raises(TargetRefused, match="in use"):
        run(work())
    assert path.read_bytes() == bytes(1 << 20)


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "relative"},
        {"path": "/directory/"},
        {"format": "vhd"},
        {"format": "raw", "compression": "zlib"},
        {"format": "qcow2", "compression": "lz4"},
    ],
)
def test_nonsense_is_refused_before_anything_is_done(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        ExportTarget(**{"path": "/tmp/x", **wrong})


@pytest.mark.parametrize(("format", "compression"), [("raw", None), ("qcow2", None), ("qcow2", "zlib")])
def test_a_cancelled_export_leaves_nothing(tmp_path: Path, out: Path, format: str, compression: str | None) -> None:
    repository, manifest = stored(tmp_path, random.Random(11).randbytes(64 << 20))
    effects, watcher = Effects(), Watcher()

    async def work() -> None:
        task = asyncio.create_task(
            export_volume(
                repository,
                manifest,
                "vda",
                ExportTarget(str(out / "x"), format, compression),
                storage_daemon=daemons(tmp_path),
                observer=watcher,
                on_effect=effects,
            )
        )
        watcher.on_progress = lambda done: None if task.done() else (task.cancel(), None)[1]
        await task

    with repository, pytest.raises((asyncio.CancelledError, Cancelled)):
        run(work())
    assert os.listdir(out) == [] and list(tmp_path.glob("run/*")) == [] and effects.pending == []


def test_damage_in_the_repository_is_told_and_leaves_nothing(tmp_path: Path, out: Path) -> None:
    repository, manifest = stored(tmp_path, random.Random(12).randbytes(4 << 20))
    pack = max((tmp_path / "repository").glob("packs/*/*"), key=lambda path: path.stat().st_size)
    pack.chmod(0o600)
    with pack.open("r+b") as file:
        file.seek(100_000)
        file.write(b"damage")
    with repository, pytest.raises(RepositoryCorrupt, match="volume vda was not exported to .*/x"):
        export(tmp_path, repository, manifest, ExportTarget(str(out / "x")))
    assert os.listdir(out) == []


def in_small_filesystem(tmp_path: Path, *arguments: str) -> str:
    """Run this file's :func:`export_to_small` where ``small`` is a filesystem of 8 MiB."""
    for program in ("unshare", "mount"):
        require(program, shutil.which(program) is not None)
    (tmp_path / "small").mkdir()
    script = 'mount -t tmpfs -o size=8m none "$1" && shift && exec "$@"'
    code = f"from {__name__} import export_to_small; export_to_small(*__import__('sys').argv[1:])"
    argv = ["unshare", "--mount", "sh", "-c", script, "sh", str(tmp_path / "small"), sys.executable, "-c", code]
    return tool(*argv, tmp_path, *arguments)


def export_to_small(directory: str, *compression: str) -> None:
    """The part that runs in a process of its own: fails, says why, and leaves nothing."""
    tmp_path, small = Path(directory), Path(directory) / "small"
    repository, manifest = stored(tmp_path, random.Random(13).randbytes(16 << 20))
    target = ExportTarget(str(small / "x"), "qcow2" if compression else "raw", *compression)
    with repository:
        try:
            export(tmp_path, repository, manifest, target)
        except (TargetRefused, TargetError) as error:
            print(type(error).__name__, error)
    assert os.listdir(small) == []


def test_what_cannot_fit_is_refused_at_once(tmp_path: Path) -> None:
    told = in_small_filesystem(tmp_path)
    assert told.startswith("TargetRefused") and "16.0 MiB of data" in told and "8.0 MiB free" in told


def test_a_filesystem_that_becomes_full_is_told_plainly(tmp_path: Path) -> None:
    told = in_small_filesystem(tmp_path, "zlib")
    assert told.startswith("TargetError") and "its filesystem is full" in told


def test_a_killed_export_leaves_a_part_file_and_no_process(tmp_path: Path, out: Path) -> None:
    """What is left bears no name an image would have; the journal's undo removes it."""
    repository, _ = stored(tmp_path, random.Random(14).randbytes(64 << 20))
    repository.close()
    code = f"from {__name__} import export_forever; export_forever({str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        daemon = int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert os.listdir(out) == ["x.part"]
    wait_for_end(daemon)


def export_forever(directory: str) -> None:
    """An export that stops when it is half done, and tells the storage daemon's process id."""
    tmp_path = Path(directory)
    watcher = Watcher()

    def halfway(done: int) -> None:
        children = Path("/proc/self/task").glob("*/children")
        pids = [pid for path in children for pid in path.read_text().split()]
        print(pids[0], flush=True)
        while True:
            signal.pause()

    watcher.on_progress = halfway
    with reopen(tmp_path / "repository") as repository:
        run(
            export_volume(
                repository,
                repository.manifest("web1-1"),
                "vda",
                ExportTarget(str(tmp_path / "out" / "x"), "qcow2"),
                storage_daemon=daemons(tmp_path),
                observer=watcher,
                on_effect=Effects(),
            )
        )


def wait_for_end(pid: int) -> None:
    """Wait until a process that is nobody's child of ours has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([fd], [], [], 20)[0], f"process {pid} is still there"
    finally:
        os.close(fd)
