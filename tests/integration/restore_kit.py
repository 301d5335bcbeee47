"""Backups made without a guest, for tests of restores: images with known content, and COW stores as the kernel writes
them."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vmbackupd.engine.copyloop import copy_in
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.progress import Progress
from vmbackupd.hypervisor.storage_daemon import ImageSpec, StorageDaemon
from vmbackupd.model import Consistency, Method, RevertMode, Segment, VolumeKind, VolumeMap, VolumeRecord
from vmbackupd.repository import LocalStorage, Repository, RepositoryWriter
from vmbackupd.repository.manifest import Manifest, StoreRecord, VmIdentity
from vmbackupd.units import KiB, MiB

LUN_ID = "iscsi:iqn.2024-01.org.example:data/1"
COW_CHUNK = 16 * KiB
STORE_OFFSET = 3 * MiB
VM_UUID = "6c5bbd4c-02b4-4d3c-9f52-2c8f5c9d7a10"

XML = f"""<domain type='test'>
  <name>web1</name><uuid>{VM_UUID}</uuid><memory unit='MiB'>64</memory><vcpu>1</vcpu>
  <os><type arch='i686'>hvm</type></os>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/gone/vda.qcow2'/>
      <target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/gone/vdb.raw'/>
      <target dev='vdb' bus='virtio'/></disk>
    <interface type='network'><mac address='52:54:00:aa:bb:cc'/><source network='default'/></interface>
  </devices>
</domain>"""


def write_image(path: Path, size: int, seed: int, pieces: int = 40) -> bytearray:
    """A sparse raw file with random data at random places; returns its content."""
    dice = random.Random(seed)
    content = bytearray(size)
    for _ in range(pieces):
        at, length = dice.randrange(size), dice.randrange(1, 128 * KiB)
        content[at:at + length] = dice.randbytes(length)[:size - at]
    save(path, content)
    return content


def save(path: Path, content: bytes | bytearray) -> None:
    """Write ``content`` as a sparse file."""
    with open(path, "wb") as file:
        for at in range(0, len(content), 4096):
            block = content[at:at + 4096]
            if block.count(0) != len(block):
                file.seek(at)
                file.write(block)
        file.truncate(len(content))


def build_store(chunks: dict[int, bytes], length: int) -> bytes:
    """A dm-snapshot persistent store: ``chunks`` maps the origin's chunk numbers to their old content, in the order in
    which they were overwritten. Layout: Linux drivers/md/dm-snap-persistent.c."""
    per_area = COW_CHUNK // 16
    store = bytearray(length)
    struct.pack_into("<IIII", store, 0, 0x70416e53, 1, 1, COW_CHUNK // 512)
    for number, (old, content) in enumerate(chunks.items()):
        area, entry = divmod(number, per_area)
        start = 1 + area * (per_area + 1)
        new = start + 1 + entry
        struct.pack_into("<QQ", store, start * COW_CHUNK + entry * 16, old, new)
        store[new * COW_CHUNK:new * COW_CHUNK + len(content)] = content
    return bytes(store)


@dataclass
class Kit:
    """A backup in a real repository, with the content each volume has to have after a restore."""

    directory: Path
    repository: Repository
    manifest: Manifest
    t1: dict[str, bytearray]
    touched: dict[str, set[int]] = field(default_factory=dict)

    def storage_daemon(self) -> StorageDaemon:
        return StorageDaemon(self.directory / "run")

    def expected(self, volume: str) -> Path:
        """The content of ``volume`` at T1 as a raw file."""
        path = self.directory / f"expected-{list(self.t1).index(volume)}.raw"
        save(path, self.t1[volume])
        return path


async def make_kit(directory: Path, mode: RevertMode = RevertMode.BACKUP, *, size: int = 24 * MiB + 1536,
                   change: Callable[[str], None] | None = None) -> Kit:
    """Back up ``vda`` (T2 differs from T1), ``vdb`` (one instant) and a LUN; a volume spans vda and the LUN."""
    storage = LocalStorage(directory / "repository")
    storage.create()
    repository = Repository.create(storage)
    t1 = {"vda": write_image(directory / "vda.t1", size, 1), "vdb": write_image(directory / "vdb.t1", 8 * MiB, 2),
          LUN_ID: write_image(directory / "lun.t1", 16 * MiB, 3)}
    spanning = VolumeMap("vg-span", 12 * MiB + 512, STORE_OFFSET, 20 * MiB, (
        Segment(0, "vda", 5 * MiB + 512, 8 * MiB - 1024), Segment(8 * MiB - 1024, LUN_ID, MiB, 4 * MiB + 1536)))
    t2, store = overwrite(t1, spanning)
    save(directory / "vda.t2", t2["vda"])
    scratch = bytearray(STORE_OFFSET) + store + bytes(MiB)
    save(directory / "scratch", scratch)
    backup_id = "web1-20260101T000000Z-01234567"
    with repository.writer(backup_id) as writer:
        async with StorageDaemon(directory / "run") as daemon:
            trees = {name: await put(writer, daemon, directory / name)
                     for name in ("vda.t1", "vda.t2", "vdb.t1", "lun.t1", "scratch")}
        volumes = (
            _record("vda", VolumeKind.VIRTUAL, size, trees["vda.t1"] if mode is not RevertMode.RESTORE else None,
                    trees["vda.t2"] if mode is not RevertMode.BACKUP else None),
            _record("vdb", VolumeKind.VIRTUAL, 8 * MiB, trees["vdb.t1"]),
            _record(LUN_ID, VolumeKind.PASS_THROUGH, 16 * MiB, trees["lun.t1"]))
        store_record = None if mode is RevertMode.BACKUP else StoreRecord(trees["scratch"], len(scratch))
        manifest = Manifest(
            id=backup_id, vm=VmIdentity("web1", VM_UUID), created=1.0, t1=1.0, t2=2.0,
            freeze_ms=3.0, revert=mode, volumes=volumes, store=store_record, volume_maps=(spanning,),
            config={"domain-inactive.xml": writer.blob(XML.encode())}, tool_version="test")
        writer.publish(manifest)
    return Kit(directory, repository, manifest, t1)


def overwrite(t1: dict[str, bytearray], volume: VolumeMap) -> tuple[dict[str, bytearray], bytes]:
    """What a guest does between T1 and T2: the images at T2, and the store that holds what was overwritten."""
    dice = random.Random(5)
    t2 = {disk: bytearray(content) for disk, content in t1.items()}
    chunks: dict[int, bytes] = {}
    for old in dice.sample(range(-(-volume.size // COW_CHUNK)), 300):
        start, end = old * COW_CHUNK, min((old + 1) * COW_CHUNK, volume.size)
        chunks[old] = read_volume(t1, volume, start, end - start)
        write_volume(t2, volume, start, dice.randbytes(end - start) if dice.random() < 0.8 else bytes(end - start))
    return t2, build_store(chunks, volume.store_length)


def read_volume(disks: dict[str, bytearray], volume: VolumeMap, start: int, length: int) -> bytes:
    out = bytearray()
    for disk, at, size in _pieces(volume, start, length):
        out += disks[disk][at:at + size]
    return bytes(out)


def write_volume(disks: dict[str, bytearray], volume: VolumeMap, start: int, data: bytes) -> None:
    done = 0
    for disk, at, size in _pieces(volume, start, len(data)):
        disks[disk][at:at + size] = data[done:done + size]
        done += size


def _pieces(volume: VolumeMap, start: int, length: int) -> Iterator[tuple[str, int, int]]:
    for segment in volume.segments:
        first, last = max(start, segment.volume_offset), min(start + length, segment.volume_offset + segment.length)
        if first < last:
            yield segment.disk, segment.disk_offset + first - segment.volume_offset, last - first


def _record(name: str, kind: VolumeKind, size: int, tree: str | None, t2_tree: str | None = None) -> VolumeRecord:
    details: dict[str, object] = {}
    if kind is VolumeKind.PASS_THROUGH:
        details = {"target": None,
                   "iscsi": {"iqn": "iqn.2024-01.org.example:data", "portal": "192.0.2.7:3260", "lun": 1}}
    return VolumeRecord(name, kind, Method.GUEST_SNAPSHOT, Consistency.FILESYSTEM, size, tree, t2_tree, details=details)


async def put(writer: RepositoryWriter, daemon: StorageDaemon, path: Path) -> str:
    """Store a raw file; returns its tree."""
    socket, export = await daemon.export(path.name, ImageSpec("raw", str(path)))
    with closing(NbdConnection(unix=socket, export=export)) as source:
        sink = writer.image(source.size)
        copy_in(source, sink, Progress())
        return sink.finish()


def same(one: Path | str, two: Path | str, formats: tuple[str, str] = ("raw", "raw")) -> bool:
    """``qemu-img compare``: what both hold; it passes over zeros by which one is longer, so sizes are compared too."""
    done = subprocess.run(["qemu-img", "compare", "-f", formats[0], "-F", formats[1], str(one), str(two)],
                          capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0 and virtual_size(one, formats[0]) == virtual_size(two, formats[1])


def virtual_size(path: Path | str, form: str) -> int:
    info = subprocess.run(["qemu-img", "info", "--output=json", "-f", form, str(path)], capture_output=True, check=True)
    return int(json.loads(info.stdout)["virtual-size"])


@contextmanager
def loop_device(path: Path) -> Iterator[str]:
    """A block device on a raw file."""
    device = subprocess.run(["losetup", "--find", "--show", str(path)], capture_output=True, text=True, check=True)
    try:
        yield device.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", device.stdout.strip()], check=True)


def snapshot_of(directory: Path) -> dict[str, tuple[int, int]]:
    """Every name below ``directory`` with size and time of change, for "nothing was touched"."""
    found = {}
    for root, directories, files in os.walk(directory):
        for name in directories + files:
            status = os.lstat(os.path.join(root, name))
            found[os.path.join(root, name)] = (status.st_size, status.st_mtime_ns)
    return found
