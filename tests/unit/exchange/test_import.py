"""Imports: the backup holds what the image holds, and no image makes us read a file nobody named."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import struct
import threading
from pathlib import Path

import pytest

from tests.unit.exchange.exchange_support import CHUNK, Watcher, daemons, disk_image, run, sparse_file, tool
from tests.unit.repository.repository_support import make, objects
from vmbackupd.errors import BackupError, Cancelled, InvalidArgument, NotFound, SourceError
from vmbackupd.exchange.formats import FORMATS, check_header, find_format
from vmbackupd.exchange.import_image import ImageFile, import_images
from vmbackupd.hypervisor.storage_daemon import ImageSpec
from vmbackupd.model import Method, VolumeKind
from vmbackupd.repository import Manifest, Repository

SIZE = 16 << 20


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    with make(tmp_path / "repository", chunk_size=CHUNK) as repository:
        yield repository


def imported(
    tmp_path: Path, repository: Repository, *images: ImageFile, name: str = "old", allow_backing: bool = False
) -> Manifest:
    watcher = Watcher()
    manifest = run(
        import_images(
            repository,
            "old-1",
            name,
            images,
            storage_daemon=daemons(tmp_path),
            observer=watcher,
            allow_backing=allow_backing,
        )
    )
    assert watcher.steps == ["open-images", "read-images", "seal"] and watcher.done == watcher.total
    return manifest


def refused(tmp_path: Path, repository: Repository, image: ImageFile, match: str, kind: type = InvalidArgument) -> None:
    """The import is refused, and nothing is left of it."""
    before = objects(tmp_path / "repository")
    with pytest.raises(kind, match=match):
        imported(tmp_path, repository, image)
    assert objects(tmp_path / "repository") == before


def convert(raw: Path, path: Path, format: str, *options: str) -> Path:
    tool("qemu-img", "convert", "-f", "raw", "-O", format, *options, raw, path)
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_a_backup_holds_what_the_image_holds(tmp_path: Path, repository: Repository, format: str) -> None:
    data = disk_image(random.Random(format), SIZE)
    raw = sparse_file(tmp_path / "disk.raw", data)
    path = convert(raw, tmp_path / f"disk.{format}", format) if format != "raw" else raw
    manifest = imported(tmp_path, repository, ImageFile(str(path)))
    assert manifest == dataclasses.replace(repository.manifest("old-1"), writer="")
    (record,) = manifest.volumes
    image = repository.image(record.tree or "")
    assert image.read(0, image.size)[:SIZE] == data
    assert (record.id, record.kind, record.method) == ("vda", VolumeKind.VIRTUAL, Method.IMPORT)
    assert record.details == {"imported": {"path": str(path), "format": format}}
    assert record.size == image.size == SIZE and record.bytes_stored > 0
    if format in ("raw", "qcow2"):  # the others know holes of 1 MiB and more only
        assert record.bytes_read < SIZE * 3 // 4
    assert manifest.vm.name == "old" and manifest.config == {} and manifest.guest["imported"] is True


def test_a_compressed_image_and_one_of_odd_size(tmp_path: Path, repository: Repository) -> None:
    data = disk_image(random.Random(1), 1_000_001)
    raw = sparse_file(tmp_path / "odd.raw", data)
    packed = convert(raw, tmp_path / "packed.qcow2", "qcow2", "-c")
    manifest = imported(tmp_path, repository, ImageFile(str(raw), "vda"), ImageFile(str(packed), "vdb"))
    first, second = (repository.image(record.tree or "") for record in manifest.volumes)
    assert first.read(0, first.size) == data
    assert second.read(0, second.size) == data + bytes(-len(data) % 512)


def test_imports_under_one_name_are_backups_of_one_vm_and_share_what_they_can(
    tmp_path: Path, repository: Repository
) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(random.Random(2).randbytes(4 << 20))
    first = imported(tmp_path, repository, ImageFile(str(raw)))
    second = run(
        import_images(
            repository,
            "old-2",
            "old",
            [ImageFile(str(raw))],
            storage_daemon=daemons(tmp_path),
            observer=Watcher(),
        )
    )
    assert first.vm == second.vm and first.volumes[0].tree == second.volumes[0].tree
    assert first.volumes[0].bytes_stored > 4 << 20 and second.volumes[0].bytes_stored == 0
    other = imported_as(tmp_path, repository, raw, "other")
    assert other.vm.uuid != first.vm.uuid


def imported_as(tmp_path: Path, repository: Repository, raw: Path, name: str) -> Manifest:
    return run(
        import_images(
            repository,
            f"{name}-3",
            name,
            [ImageFile(str(raw))],
            storage_daemon=daemons(tmp_path),
            observer=Watcher(),
        )
    )


# ---- formats


def found(path: Path, stated: str | None = None, *, backing: bool = False) -> str:
    fd = os.open(path, os.O_RDONLY)
    try:
        format = find_format(str(path), fd, stated)
        check_header(str(path), fd, format, backing=backing)
        return format
    finally:
        os.close(fd)


@pytest.mark.parametrize("format", FORMATS)
def test_name_and_content_together_tell_the_format(tmp_path: Path, format: str) -> None:
    path = tmp_path / f"disk.{format}"
    tool("qemu-img", "create", "-f", format, path, "8M")
    assert found(path) == found(path, format) == format
    for other in FORMATS:
        if other not in ("raw", format):
            with pytest.raises(InvalidArgument, match=f"is no {other} image"):
                found(path, other)
    if format == "raw":
        for name in ("disk", "disk.img", "disk.bin"):
            assert found(path.rename(tmp_path / name)) == "raw"
            path = tmp_path / name
        return
    assert found(path, "raw") == "raw"  # stated: somebody wants these very bytes
    for name in ("disk.raw", "disk.img", "disk", f"disk.{'vdi' if format != 'vdi' else 'qcow2'}"):
        path = path.rename(tmp_path / name)
        with pytest.raises(InvalidArgument, match=f"begins like a {format} image.*state its format"):
            found(path)
        assert found(path, format) == format


def test_a_name_that_promises_a_format_the_content_has_not(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(b"\0" * 4096)
    with pytest.raises(InvalidArgument, match="does not begin like an image"):
        found(path)


@pytest.mark.parametrize("format", ["vpc", "qed", "luks", "parallels"])
def test_formats_that_are_not_imported_are_not_taken_for_raw(tmp_path: Path, format: str) -> None:
    path = tmp_path / "disk.img"
    if format == "luks":
        path.write_bytes(b"LUKS\xba\xbe" + bytes(4096))
    else:
        tool("qemu-img", "create", "-f", format, path, "8M")
    with pytest.raises(InvalidArgument, match="looks like a .* image, which cannot be imported"):
        found(path)
    assert found(path, "raw") == "raw"


def test_a_raw_disk_on_which_a_guest_wrote_a_header_stays_raw(tmp_path: Path, repository: Repository) -> None:
    """The attack: a guest writes an image header with a backing file of the host to its own raw disk."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"the host's secret".ljust(SIZE, b"!"))
    evil = tmp_path / "guest.raw"
    tool("qemu-img", "create", "-f", "qcow2", "-b", secret, "-F", "raw", evil, str(SIZE))
    os.truncate(evil, SIZE)
    refused(tmp_path, repository, ImageFile(str(evil)), "begins like a qcow2 image")
    manifest = imported(tmp_path, repository, ImageFile(str(evil), format="raw"))
    image = repository.image(manifest.volumes[0].tree or "")
    assert image.read(0, SIZE) == evil.read_bytes()


def test_overlays_are_refused_unless_that_is_allowed(tmp_path: Path, repository: Repository) -> None:
    data = disk_image(random.Random(3), SIZE)
    base = sparse_file(tmp_path / "base.raw", data)
    path = tmp_path / "top.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", path)
    tool("qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 64k", path)
    for format in (None, "qcow2"):
        refused(tmp_path, repository, ImageFile(str(path), format=format), "is an overlay of '.*base.raw'")
    manifest = imported(tmp_path, repository, ImageFile(str(path)), allow_backing=True)
    image = repository.image(manifest.volumes[0].tree or "")
    assert image.read(0, SIZE) == data[:CHUNK] + b"\7" * CHUNK + data[2 * CHUNK :]


def test_a_backing_file_without_a_format_is_never_probed(tmp_path: Path, repository: Repository) -> None:
    base = sparse_file(tmp_path / "base.raw", disk_image(random.Random(4), SIZE))
    path = tmp_path / "top.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", "-b", base, "-F", "raw", path)
    data = bytearray(path.read_bytes())
    at = data.find(struct.pack(">II", 0xE2792ACA, 3))  # the header extension that holds the backing file's format
    data[at : at + 4] = struct.pack(">I", 0x12345678)  # one nobody knows
    path.write_bytes(data)
    before = objects(tmp_path / "repository")
    with pytest.raises(BackupError, match="without a format"):
        imported(tmp_path, repository, ImageFile(str(path)), allow_backing=True)
    assert objects(tmp_path / "repository") == before


def test_images_that_lead_elsewhere_are_refused(tmp_path: Path, repository: Repository) -> None:
    external = tmp_path / "external.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", external, "8M")
    refused(tmp_path, repository, ImageFile(str(external)), "keeps its data in another file")
    encrypted = tmp_path / "encrypted.qcow2"
    tool("qemu-img", "create", "-f", "qcow2", encrypted, "8M")
    with encrypted.open("r+b") as file:
        file.seek(32)
        file.write(struct.pack(">I", 2))  # LUKS
    refused(tmp_path, repository, ImageFile(str(encrypted)), "is encrypted")
    based = tmp_path / "based.vmdk"
    tool("qemu-img", "create", "-f", "vmdk", tmp_path / "base.vmdk", "8M")
    tool("qemu-img", "create", "-f", "vmdk", "-b", tmp_path / "base.vmdk", "-F", "vmdk", based)
    refused(tmp_path, repository, ImageFile(str(based)), "is based on another VMDK image")
    named = tmp_path / "named.vmdk"
    tool("qemu-img", "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", named, "8M")
    refused(tmp_path, repository, ImageFile(str(named)), "looks like a VMDK descriptor image")
    hollow = tmp_path / "hollow.vmdk"
    hollow.write_bytes((tmp_path / "base.vmdk").read_bytes()[:12] + bytes(8) + bytes(4096))
    refused(tmp_path, repository, ImageFile(str(hollow)), "only names other files")
    old = tmp_path / "old.qcow2"
    old.write_bytes(struct.pack(">4sI", b"QFI\xfb", 1) + bytes(4096))
    refused(tmp_path, repository, ImageFile(str(old)), "version 1, expected 2 or 3")
    far = tmp_path / "far.qcow2"
    far.write_bytes(struct.pack(">4sIQIIQI", b"QFI\xfb", 3, 2**64 - 1, 2**32 - 1, 16, 1 << 20, 0) + bytes(4096))
    refused(tmp_path, repository, ImageFile(str(far)), "is an overlay of ''")
    for name, head in (("short.qcow2", b"QFI\xfb"), ("short.vmdk", b"KDMV")):
        (tmp_path / name).write_bytes(head)
        refused(tmp_path, repository, ImageFile(str(tmp_path / name)), "no whole")


# ---- sources


def test_what_is_no_image_is_refused(tmp_path: Path, repository: Repository) -> None:
    os.mkfifo(tmp_path / "fifo.raw")
    (tmp_path / "empty.raw").touch()
    refused(tmp_path, repository, ImageFile(str(tmp_path / "fifo.raw")), "neither a regular file nor a block device")
    refused(tmp_path, repository, ImageFile(str(tmp_path)), "neither a regular file nor a block device")
    refused(tmp_path, repository, ImageFile("/dev/null"), "neither a regular file nor a block device")
    refused(tmp_path, repository, ImageFile(str(tmp_path / "none.raw")), "No such file")
    refused(tmp_path, repository, ImageFile(str(tmp_path / "empty.raw")), "0 bytes cannot be imported")
    with pytest.raises(InvalidArgument, match="no image"):
        imported(tmp_path, repository)
    (tmp_path / "x.raw").write_bytes(b"x")
    image = ImageFile(str(tmp_path / "x.raw"))
    with pytest.raises(InvalidArgument, match="an id of its own"):
        imported(tmp_path, repository, image, image)
    for name in ("", "a/b", ".hidden", "new\nline", "x" * 300):
        with pytest.raises(InvalidArgument, match="cannot be the name of a VM"):
            imported(tmp_path, repository, image, name=name)
    for wrong in ({"path": "relative"}, {"path": "/x", "volume": ""}, {"path": "/x", "volume": "a/b"}):
        with pytest.raises(InvalidArgument):
            ImageFile(**wrong)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_image_a_vm_writes_to_is_refused(tmp_path: Path, repository: Repository, format: str) -> None:
    path = tmp_path / f"disk.{format}"
    tool("qemu-img", "create", "-f", format, path, "8M")

    async def work() -> None:
        async with daemons(tmp_path)() as vm:
            await vm.export("disk", ImageSpec(format, str(path)), writable=True)
            await import_images(
                repository,
                "old-1",
                "old",
                [ImageFile(str(path))],
                storage_daemon=daemons(tmp_path),
                observer=Watcher(),
            )

    with pytest.raises(InvalidArgument, match="a QEMU process writes to it"):
        run(work())


def test_a_cancelled_import_leaves_nothing(tmp_path: Path, repository: Repository) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(5).randbytes(64 << 20))
    before, threads = objects(tmp_path / "repository"), threading.active_count()
    watcher = Watcher()

    async def work() -> None:
        task = asyncio.create_task(
            import_images(
                repository,
                "old-1",
                "old",
                [ImageFile(str(path))],
                storage_daemon=daemons(tmp_path),
                observer=watcher,
            )
        )
        watcher.on_progress = lambda done: None if task.done() else (task.cancel(), None)[1]
        await task

    with pytest.raises((asyncio.CancelledError, Cancelled)):
        run(work())
    assert objects(tmp_path / "repository") == before and threading.active_count() <= threads
    with pytest.raises(NotFound):
        repository.manifest("old-1")


def test_an_image_that_shrinks_meanwhile_is_not_published(tmp_path: Path, repository: Repository) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(6).randbytes(8 << 20))
    watcher = Watcher()
    step = watcher.step

    def shrink(name: str) -> None:
        step(name)
        if name == "read-images":
            os.truncate(path, 1 << 20)

    watcher.step = shrink  # type: ignore[method-assign]
    with pytest.raises(SourceError, match="disk.raw was not imported"):
        run(
            import_images(
                repository,
                "old-1",
                "old",
                [ImageFile(str(path))],
                storage_daemon=daemons(tmp_path),
                observer=watcher,
            )
        )
    assert repository.backups() == []
