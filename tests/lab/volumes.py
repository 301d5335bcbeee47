"""Reads logical volumes and their files out of raw disk images on the host: no mount, no kernel, nothing of the
project's code.

This is the oracle that restored images are held against, so it stays independent of what it judges.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512


class VolumeError(Exception):
    """An image does not hold what it should: no LVM metadata, an unknown volume, a filesystem that fails its check."""


@dataclass(frozen=True)
class Piece:
    """``length`` bytes of a logical volume from ``offset``, lying in the image ``path`` from ``at``. All in bytes."""

    offset: int
    path: Path
    at: int
    length: int


@dataclass(frozen=True)
class LogicalVolume:
    """A linear or striped volume: ``pieces`` are sorted, adjacent and cover ``size`` bytes."""

    name: str
    size: int
    pieces: tuple[Piece, ...]

    def extract(self, to: Path) -> Path:
        """Write the volume's content into the sparse raw file ``to`` and return it."""
        with open(to, "wb") as out:
            for piece in self.pieces:
                with open(piece.path, "rb") as source:
                    copy_sparse(source.fileno(), piece.at, out.fileno(), piece.offset, piece.length)
            out.truncate(self.size)
        return to

    def insert(self, content: Path) -> None:
        """Write the raw file ``content`` into the images where the volume lies. Holes are left alone."""
        with open(content, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            if size > self.size:
                raise VolumeError(f"{content} has {size} bytes, {self.name} only {self.size}")
            for piece in self.pieces:
                length = min(piece.length, size - piece.offset)
                if length > 0:
                    with open(piece.path, "r+b") as out:
                        copy_sparse(source.fileno(), piece.offset, out.fileno(), piece.at, length)


def copy_sparse(source: int, source_at: int, target: int, target_at: int, length: int) -> None:
    """Copy ``length`` bytes between two open files, skipping the holes of the source."""
    end, at = source_at + length, source_at
    while at < end:
        try:
            data = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            return  # ENXIO: only holes from here
        if data >= end:
            return
        stop = min(end, os.lseek(source, data, os.SEEK_HOLE))
        at = data
        while at < stop:
            chunk = os.pread(source, min(1 << 20, stop - at), at)
            if not chunk:
                return
            os.pwrite(target, chunk, target_at + at - source_at)
            at += len(chunk)


def crc(data: bytes) -> int:
    """LVM's CRC-32: initial value 0xf597a6cf, no final inversion."""
    return zlib.crc32(data, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def physical_volume(path: Path) -> tuple[str, str] | None:
    """``(PV id, metadata text)`` of the LVM label in a raw image; None where there is none."""
    with open(path, "rb") as image:
        head = image.read(4 * SECTOR)
        for sector in range(4):
            label = head[sector * SECTOR : (sector + 1) * SECTOR]
            if label[:8] == b"LABELONE" and label[24:32] == b"LVM2 001":
                break
        else:
            return None
        if struct.unpack_from("<I", label, 16)[0] != crc(label[20:]):
            raise VolumeError(f"{path}: wrong checksum of the LVM label")
        at = struct.unpack_from("<I", label, 20)[0]
        identity = label[at : at + 32].decode()
        at += 40
        areas: list[list[tuple[int, int]]] = [[], []]
        for kind in areas:
            while True:
                where = struct.unpack_from("<QQ", label, at)
                at += 16
                if where == (0, 0):
                    break
                kind.append(where)
        for start, _ in areas[1]:
            image.seek(start)
            header = image.read(SECTOR)
            if header[4:20] != b" LVM2 x[5A%r0N*>" or struct.unpack_from("<I", header)[0] != crc(header[4:]):
                raise VolumeError(f"{path}: damaged LVM metadata header at {start}")
            size = struct.unpack_from("<Q", header, 32)[0]
            offset, length, check, flags = struct.unpack_from("<QQII", header, 40)
            if not length or flags & 1:
                continue
            first = min(length, size - offset)
            image.seek(start + offset)
            text = image.read(first)
            if first < length:  # the area is a ring
                image.seek(start + SECTOR)
                text += image.read(length - first)
            if crc(text) != check:
                raise VolumeError(f"{path}: wrong checksum of the LVM metadata text")
            return identity, text.rstrip(b"\0").decode()
    return identity, ""


Value = str | int | list["Value"] | dict[str, "Value"]


def parse(text: str) -> dict[str, Value]:
    """LVM's configuration text as nested dictionaries."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|#[^\n]*|[{}\[\]=,]|[^\s{}\[\]=,#"]+', text)
    tokens = [token for token in tokens if not token.startswith("#")]
    at = 0

    def value() -> Value:
        nonlocal at
        token = tokens[at]
        at += 1
        if token == "[":
            items: list[Value] = []
            while tokens[at] != "]":
                if tokens[at] == ",":
                    at += 1
                    continue
                items.append(value())
            at += 1
            return items
        if token.startswith('"'):
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        return int(token) if re.fullmatch(r"-?\d+", token) else token

    def section() -> dict[str, Value]:
        nonlocal at
        result: dict[str, Value] = {}
        while at < len(tokens) and tokens[at] != "}":
            name = tokens[at]
            at += 2
            if tokens[at - 1] == "{":
                result[name] = section()
                at += 1
            else:
                result[name] = value()
        return result

    return section()


def logical_volumes(images: Iterable[Path]) -> dict[str, LogicalVolume]:
    """Every linear or striped volume on the given raw images, by ``vg/lv``. Volumes with a missing PV or of other types
    are left out.
    """
    newest: dict[str, tuple[int, dict[str, Value]]] = {}
    where: dict[str, Path] = {}
    for path in images:
        found = physical_volume(Path(path))
        if found is None:
            continue
        where[found[0]] = Path(path)
        for name, group in parse(found[1]).items():
            if isinstance(group, dict) and "physical_volumes" in group:
                sequence = group["seqno"]
                assert isinstance(sequence, int)
                if name not in newest or newest[name][0] < sequence:
                    newest[name] = (sequence, group)
    volumes: dict[str, LogicalVolume] = {}
    for name, (_, group) in newest.items():
        for volume, pieces in _volumes(group, where):
            pieces.sort(key=lambda piece: piece.offset)
            size = pieces[-1].offset + pieces[-1].length
            volumes[f"{name}/{volume}"] = LogicalVolume(f"{name}/{volume}", size, tuple(pieces))
    return volumes


def _volumes(group: dict, where: dict[str, Path]):  # type: ignore[type-arg, no-untyped-def]
    extent = group["extent_size"] * SECTOR
    starts = {
        name: (where.get(pv["id"].replace("-", "")), pv["pe_start"] * SECTOR)
        for name, pv in group["physical_volumes"].items()
    }
    for volume, description in group.get("logical_volumes", {}).items():
        segments = [part for name, part in description.items() if re.fullmatch(r"segment\d+", name)]
        if any(part["type"] != "striped" for part in segments):
            continue
        pieces = [piece for part in segments for piece in _pieces(part, extent, starts)]
        if pieces and all(piece.path for piece in pieces):
            yield volume, pieces


def _pieces(part: dict, extent: int, starts: dict):  # type: ignore[type-arg, no-untyped-def]
    offset, length = part["start_extent"] * extent, part["extent_count"] * extent
    stripes = [
        (*starts[part["stripes"][i]], part["stripes"][i + 1] * extent) for i in range(0, len(part["stripes"]), 2)
    ]
    if len(stripes) == 1:
        path, start, first = stripes[0]
        yield Piece(offset, path, start + first, length)
        return
    width = part["stripe_size"] * SECTOR
    for number in range(length // width):
        path, start, first = stripes[number % len(stripes)]
        yield Piece(offset + number * width, path, start + first + number // len(stripes) * width, width)


def to_raw(image: Path, raw: Path) -> Path:
    """Convert any image that QEMU opens into a sparse raw file and return that."""
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(raw)], check=True, capture_output=True)
    return raw


def check_filesystem(image: Path, *, replay: bool = False) -> None:
    """``e2fsck -fn`` of a raw ext4 image; with ``replay`` the journal is replayed in a scratch copy first.

    Raises VolumeError with e2fsck's own words when anything had to be mended beyond the journal.
    """
    scratch = None
    try:
        if replay:
            scratch = image.with_name(image.name + ".replayed")
            subprocess.run(["cp", "--sparse=always", str(image), str(scratch)], check=True)
            done = subprocess.run(
                check=False, args=["e2fsck", "-E", "journal_only", "-y", str(scratch)], capture_output=True, text=True
            )
            if done.returncode not in (0, 1):
                raise VolumeError(f"{image}: the journal does not replay\n{done.stdout}{done.stderr}")
        done = subprocess.run(
            check=False, args=["e2fsck", "-fn", str(scratch or image)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise VolumeError(f"{image}: e2fsck -fn ended with {done.returncode}\n{done.stdout}{done.stderr}")
    finally:
        if scratch is not None:
            scratch.unlink(missing_ok=True)


def needs_recovery(image: Path) -> bool:
    """Whether an ext4 image's journal holds transactions that a mount would replay."""
    with open(image, "rb") as file:
        file.seek(1024)
        block = file.read(1024)
    if block[0x38:0x3A] != b"\x53\xef":
        raise VolumeError(f"{image}: no ext4 filesystem")
    return bool(struct.unpack_from("<I", block, 0x60)[0] & 0x4)


def read_file(image: Path, name: str) -> bytes:
    """The content of file ``name`` (absolute within the filesystem) of a raw ext4 image."""
    done = subprocess.run(check=False, args=["debugfs", "-R", f"cat {name}", str(image)], capture_output=True)
    if b"File not found" in done.stderr or (done.returncode != 0):
        raise VolumeError(f"{image}: cannot read {name}: {done.stderr.decode(errors='replace')}")
    return done.stdout


def copy_file(source: Path, target: Path) -> None:
    """Copy an image, keeping its holes, sharing its blocks where the host's filesystem can."""
    if shutil.which("cp") is None:
        raise VolumeError("no cp on this machine")
    subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(source), str(target)], check=True)


def partition_table(size: int) -> bytes:
    """The first sector of a disk of ``size`` bytes with one Linux partition from its second MiB to its end (MBR)."""
    table = bytearray(512)
    struct.pack_into("<IxxB3sB3sII", table, 440, 0x11223344, 0, b"", 0x83, b"", 2048, size // 512 - 2048)
    table[510:] = b"\x55\xaa"
    return bytes(table)
