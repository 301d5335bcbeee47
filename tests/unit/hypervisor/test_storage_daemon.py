"""qemu-storage-daemon with real images, read and written by other NBD and image programs."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.unit.hypervisor.machine import Machine, create, pattern, tool
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.nbdimage import NbdSource
from vmbackupd.errors import HypervisorError, InvalidArgument
from vmbackupd.hypervisor.images import create_overlay, image_chain, qcow2_in_use
from vmbackupd.hypervisor.storage_daemon import (
    ImageSpec,
    IscsiLun,
    NbdExport,
    StorageDaemon,
    create_qcow2,
    end_leftovers,
    image_info,
)

T = TypeVar("T")


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[StorageDaemon], Awaitable[object]]], None]:
    """Do something with a storage daemon; afterwards nothing of it is left."""

    def runner(work: Callable[[StorageDaemon], Awaitable[object]]) -> None:
        async def main() -> None:
            async with StorageDaemon(tmp_path / "run") as daemon:
                await work(daemon)

        asyncio.run(main())
        assert os.listdir(tmp_path / "run") == []

    return runner


def uri(export: NbdExport) -> str:
    return f"nbd+unix:///{export.name}?socket={export.socket}"


async def to_raw(export: NbdExport, path: Path) -> Path:
    await asyncio.to_thread(tool, "nbdcopy", uri(export), str(path))
    return path


def write(path: Path, format: str, number: int, at: str, length: str) -> None:
    tool("qemu-io", "-f", format, "-c", f"write -P {number} {at} {length}", str(path))


Run = Callable[[Callable[[StorageDaemon], Awaitable[object]]], None]


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_an_image_reads_as_qemu_reads_it(run: Run, tmp_path: Path, format: str) -> None:
    image = create(tmp_path / "image", format)
    write(image, format, 7, "1M", "3M")

    async def work(daemon: StorageDaemon) -> None:
        export = await daemon.export("disk", ImageSpec(format, str(image)))
        info = json.loads(await asyncio.to_thread(tool, "nbdinfo", "--json", uri(export)))
        assert info["exports"][0]["export-size"] == 32 << 20
        assert info["exports"][0]["is_read_only"] and info["exports"][0]["can_multi_conn"]
        copy = await to_raw(export, tmp_path / "copy.raw")
        tool("qemu-img", "compare", "-f", format, "-F", "raw", str(image), str(copy))
        extents = json.loads(await asyncio.to_thread(tool, "nbdinfo", "--map", "--json", uri(export)))
        data = [(e["offset"], e["length"]) for e in extents if not e["type"] & 2]
        assert data[-1] == (1 << 20, 3 << 20)
        assert all(offset + length <= 4096 for offset, length in data[:-1])  # QEMU writes a new raw file's first block

    run(work)


def test_what_is_written_through_it_is_in_the_image(run: Run, tmp_path: Path) -> None:
    image, raw = tmp_path / "new.qcow2", create(tmp_path / "data.raw", "raw")
    write(raw, "raw", 9, "5M", "64k")

    async def work(daemon: StorageDaemon) -> None:
        await create_qcow2(str(image), 32 << 20)
        export = await daemon.export("target", ImageSpec("qcow2", str(image)), writable=True)
        await asyncio.to_thread(tool, "nbdcopy", "--flush", "--destination-is-zero", str(raw), uri(export))
        await daemon.unexport("target")
        tool("qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(image), str(raw))  # closed: no lock is left

    run(work)
    assert os.stat(image).st_mode & 0o777 == 0o600


def test_a_chain_is_followed_by_the_formats_its_headers_record(run: Run, tmp_path: Path) -> None:
    base, middle, top = create(tmp_path / "base", "raw"), tmp_path / "middle", tmp_path / "top"
    write(base, "raw", 1, "0", "1M")
    # what a guest may write into a raw image: the header of an image with a backing file of its choice
    write(tmp_path / "base", "raw", 0, "2M", "64k")

    async def work(daemon: StorageDaemon) -> None:
        await create_overlay(str(middle), 32 << 20, str(base), "raw")
        write(middle, "qcow2", 2, "64k", "64k")
        await create_overlay(str(top), 32 << 20, str(middle), "qcow2")
        write(top, "qcow2", 3, "128k", "64k")
        assert [image.format for image in await image_chain(str(top), "qcow2")] == ["qcow2", "qcow2", "raw"]
        copy = await to_raw(await daemon.export("disk", ImageSpec("qcow2", str(top))), tmp_path / "copy.raw")
        for number, at in ((1, "0"), (2, "64k"), (3, "128k"), (1, "192k")):
            assert pattern(copy, "raw", number, at, "64k")

    run(work)


def test_a_guest_cannot_make_its_raw_image_something_else(run: Run, tmp_path: Path) -> None:
    """Everything in a raw image is the guest's: a qcow2 header in it names a file of the host, and is only bytes."""
    secret, image = create(tmp_path / "secret", "raw", "1M"), tmp_path / "image.raw"
    write(secret, "raw", 66, "0", "1M")
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", str(secret), "-F", "raw", str(image), "1M")
    header = image.read_bytes()

    async def work(daemon: StorageDaemon) -> None:
        copy = await to_raw(await daemon.export("disk", ImageSpec("raw", str(image))), tmp_path / "copy.raw")
        assert copy.read_bytes()[:len(header)] == header

    run(work)


def test_a_header_without_a_format_is_refused(run: Run, tmp_path: Path) -> None:
    base, top = create(tmp_path / "base"), tmp_path / "top"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", str(base), "-F", "qcow2", str(top), "32M")
    data = top.read_bytes()
    top.write_bytes(data.replace(b"\xe2\x79\x2a\xca", b"\x76\x6d\x62\x6b", 1))  # now a header extension nobody knows

    async def work(daemon: StorageDaemon) -> None:
        with pytest.raises(HypervisorError, match=r"top: its header names the backing file .*/base without a format"):
            await daemon.export("disk", ImageSpec("qcow2", str(top)))

    run(work)


@pytest.mark.parametrize("backing", ["nbd://127.0.0.1:1/x", "json:{\"driver\":\"null-co\"}"])
def test_a_backing_file_that_is_no_file_is_refused(run: Run, tmp_path: Path, backing: str) -> None:
    top = tmp_path / "top"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", str(top), "1M")

    async def work(daemon: StorageDaemon) -> None:
        with pytest.raises(HypervisorError, match="is not a local file"):
            await daemon.export("disk", ImageSpec("qcow2", str(top)))

    run(work)


def test_errors_name_the_image_and_leave_the_daemon_usable(run: Run, tmp_path: Path) -> None:
    image = create(tmp_path / "image", "raw")

    async def work(daemon: StorageDaemon) -> None:
        with pytest.raises(HypervisorError, match="nothing.*No such file"):
            await daemon.export("a", ImageSpec("qcow2", str(tmp_path / "nothing")))
        with pytest.raises(HypervisorError, match="nothing: No such file"):
            await daemon.export("a", ImageSpec("raw", str(tmp_path / "nothing")))
        with pytest.raises(HypervisorError, match="image.*not in qcow2 format"):
            await daemon.export("a", ImageSpec("qcow2", str(image)))
        spec = ImageSpec("qcow2", str(create(tmp_path / "real.qcow2")))
        await daemon.export("a", spec)
        with pytest.raises(InvalidArgument, match="an export named a already"):
            await daemon.export("a", spec)
        with pytest.raises(HypervisorError, match=r"real\.qcow2.*lock"):
            await daemon.export("b", spec, writable=True)
        await daemon.unexport("a")
        await daemon.unexport("a")
        await daemon.export("b", spec, writable=True)

    run(work)


def test_an_image_is_a_path_or_a_lun() -> None:
    with pytest.raises(InvalidArgument):
        ImageSpec("raw")


def test_new_images_never_replace_files(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(HypervisorError, match="there: File exists"):
        asyncio.run(create_qcow2(str(tmp_path / "there"), 1 << 20))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HypervisorError, match="File exists|symbolic"):
        asyncio.run(create_qcow2(str(tmp_path / "link"), 1 << 20))
    assert (tmp_path / "there").read_text() == "mine" and not (tmp_path / "elsewhere").exists()
    with pytest.raises(HypervisorError, match="cannot create the image"):
        asyncio.run(create_qcow2(str(tmp_path / "no/directory"), 1 << 20))


def test_a_failed_creation_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(HypervisorError):
        asyncio.run(create_qcow2(str(tmp_path / "huge"), 1 << 63))
    assert os.listdir(tmp_path) == []


def test_locks_tell_who_writes(run: Run, tmp_path: Path) -> None:
    image = create(tmp_path / "image")

    async def work(daemon: StorageDaemon) -> None:
        assert not await qcow2_in_use(str(image))
        await daemon.export("r", ImageSpec("qcow2", str(image)))
        assert not await qcow2_in_use(str(image))
        await daemon.unexport("r")
        await daemon.export("w", ImageSpec("qcow2", str(image)), writable=True)
        assert await qcow2_in_use(str(image))
        assert (await image_info(str(image), "qcow2")).size == 32 << 20  # what is in use can be asked about

    run(work)


def test_a_base_is_read_while_a_running_vm_has_it_as_backing(two_disks: Machine) -> None:
    two_disks.write("virtio-disk0", 1, "0", "1M")

    async def work(hv: object) -> None:
        from vmbackupd.hypervisor.libvirt import LibvirtHypervisor

        assert isinstance(hv, LibvirtHypervisor)
        overlays = {"vda": f"{two_disks.dir}/a.j1", "sda": f"{two_disks.dir}/b.j1"}
        await hv.snapshot(two_disks.uuid, overlays)
        await asyncio.to_thread(two_disks.write, "virtio-disk0", 2, "0", "1M")
        async with StorageDaemon(two_disks.dir / "run") as daemon:
            base = ImageSpec("qcow2", f"{two_disks.dir}/a.qcow2")
            copy = await to_raw(await daemon.export("vda", base), two_disks.dir / "copy.raw")
            await daemon.export("sda", ImageSpec("raw", f"{two_disks.dir}/b.raw"))
        assert pattern(copy, "raw", 1, "0", "1M")
        await hv.drop_overlay(two_disks.uuid, overlays["vda"])

    two_disks.with_hypervisor(work)


def test_a_daemon_that_dies_is_an_error_with_its_name(tmp_path: Path) -> None:
    image = create(tmp_path / "image")

    async def main() -> None:
        async with StorageDaemon(tmp_path / "run") as daemon:
            pid = int(next((tmp_path / "run").glob("*.pid")).read_text())
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(HypervisorError, match="qemu-storage-daemon: .*it is gone"):
                await daemon.export("a", ImageSpec("qcow2", str(image)))

    asyncio.run(main())
    assert os.listdir(tmp_path / "run") == []


def test_a_daemon_that_hangs_is_killed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmbackupd.hypervisor.storage_daemon.QUIT", 0.3)

    async def main() -> int:
        async with StorageDaemon(tmp_path / "run"):
            pid = int(next((tmp_path / "run").glob("*.pid")).read_text())
            os.kill(pid, signal.SIGSTOP)
        return pid

    assert not Path(f"/proc/{asyncio.run(main())}").exists()
    assert os.listdir(tmp_path / "run") == []


def test_a_runtime_directory_that_is_too_deep_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="too long for a unix socket"):
        StorageDaemon(tmp_path / ("x" * 100))


def test_no_qemu_storage_daemon_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HypervisorError, match="qemu-storage-daemon did not start"):
        asyncio.run(StorageDaemon(tmp_path / "run").open())


OWNER = """
import asyncio, sys
from vmbackupd.hypervisor.storage_daemon import StorageDaemon

async def main():
    async with StorageDaemon(sys.argv[1]):
        print("open", flush=True)
        await asyncio.sleep(300)

asyncio.run(main())
"""


def test_a_killed_owner_leaves_no_daemon_and_its_files_can_be_removed(tmp_path: Path) -> None:
    runtime = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", OWNER, str(runtime)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "open\n"
        pid = int(next(runtime.glob("*.pid")).read_text())
        assert end_leftovers(runtime) == [] and list(runtime.glob("*.nbd"))  # its owner lives
        owner.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < end:
        try:
            os.readlink(f"/proc/{pid}/exe")
        except OSError:
            break  # a zombie
        time.sleep(0.02)
    assert end_leftovers(runtime) == []
    assert os.listdir(runtime) == []


@pytest.fixture
def iscsi_target(tmp_path: Path) -> object:
    """A LUN of a real iSCSI target: (portal, iqn, lun, backing file)."""
    import socket

    program = shutil.which("tgtd", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        pytest.skip("tgtd is not here")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    control, backing = 7000 + os.getpid() % 1000, create(tmp_path / "lun.raw", "raw")
    target = subprocess.Popen([program, "-f", "-C", str(control), "--iscsi", f"portal=127.0.0.1:{port}"],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def admin(*words: str) -> None:
        tool(program.removesuffix("tgtd") + "tgtadm", "-C", str(control), "--lld", "iscsi", *words)

    try:
        end = time.monotonic() + 10
        while True:
            try:
                admin("--op", "new", "--mode", "target", "--tid", "1", "-T", "iqn.2025-01.org.vmbackupd:t")
                break
            except subprocess.CalledProcessError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
        admin("--op", "new", "--mode", "logicalunit", "--tid", "1", "--lun", "3", "-b", str(backing))
        admin("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "3", "--params", "thin_provisioning=1")
        admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")
        yield f"127.0.0.1:{port}", "iqn.2025-01.org.vmbackupd:t", 3, backing
    finally:
        target.kill()
        target.wait()


def test_a_live_image_is_read_past_the_cache_while_somebody_writes_to_it(run: Run, tmp_path: Path) -> None:
    image = create(tmp_path / "image.raw", "raw")

    async def work(daemon: StorageDaemon) -> None:
        async with StorageDaemon(tmp_path / "run") as theirs:
            write_to = await theirs.export("w", ImageSpec("raw", str(image)), writable=True)
            export = await daemon.export("r", ImageSpec("raw", str(image), live=True))
            assert opened_directly(image) == [False, True]
            with connect(write_to) as writer, connect(export) as reader:
                for number in (1, 2):
                    writer.pwrite(4096, bytes([number]) * 4096)
                    assert reader.pread(4096, 4096) == bytes([number]) * 4096

    run(work)


def opened_directly(image: Path) -> list[bool]:
    """Of every descriptor that a storage daemon has of this file: whether it goes past the page cache; sorted."""
    found = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(link) == str(image):
                flags = (link.parent.parent / "fdinfo" / link.name).read_text().split("flags:")[1].split()[0]
                found.append(bool(int(flags, 8) & os.O_DIRECT))
        except OSError:
            continue  # closed meanwhile
    return sorted(found)


def connect(export: NbdExport) -> NbdConnection:
    return NbdConnection(unix=export.socket, export=export.name)


def test_a_live_lun_is_read_as_another_initiator_writes_it(
    run: Run, tmp_path: Path, iscsi_target: tuple[str, str, int, Path]
) -> None:
    portal, iqn, lun, _ = iscsi_target
    spec = IscsiLun(portal, iqn, lun)

    async def work(daemon: StorageDaemon) -> None:
        async with StorageDaemon(tmp_path / "run") as theirs:
            write_to = await theirs.export("w", ImageSpec("raw", iscsi=spec), writable=True)
            export = await daemon.export("r", ImageSpec("raw", iscsi=spec, live=True))
            with connect(write_to) as writer, connect(export) as reader:
                assert reader.read_only and list(NbdSource(reader).data_runs()) == [(0, 1)]  # qemu-img wrote it
                writer.pwrite(1 << 20, b"x" * 65536)
                assert reader.pread(1 << 20, 65536) == b"x" * 65536
                assert list(NbdSource(reader).data_runs()) == [(0, 1), (16, 1)]

    run(work)


def test_an_iscsi_lun_is_read_and_written(run: Run, tmp_path: Path, iscsi_target: tuple[str, str, int, Path]) -> None:
    portal, iqn, lun, backing = iscsi_target
    data = create(tmp_path / "data.raw", "raw")
    write(data, "raw", 4, "3M", "128k")
    spec = ImageSpec("raw", iscsi=IscsiLun(portal, iqn, lun))
    assert str(spec) == f"iscsi://{portal}/{iqn}/3"

    async def work(daemon: StorageDaemon) -> None:
        export = await daemon.export("target", spec, writable=True)
        await asyncio.to_thread(tool, "nbdcopy", "--flush", str(data), uri(export))
        await daemon.unexport("target")
        copy = await to_raw(await daemon.export("target", spec), tmp_path / "copy.raw")
        tool("qemu-img", "compare", "-f", "raw", "-F", "raw", str(copy), str(data))
        with pytest.raises(HypervisorError, match=rf"iscsi://{portal}/{iqn}/9"):
            await daemon.export("other", ImageSpec("raw", iscsi=IscsiLun(portal, iqn, 9)))

    run(work)
    assert pattern(backing, "raw", 4, "3M", "128k")
