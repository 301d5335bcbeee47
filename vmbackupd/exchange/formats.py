"""What format an image file has, and whether it is safe to let QEMU open it.

The bytes of a raw image are a guest's: one that writes a qcow2 header to the start of its disk, with a backing file of
the host in it, must not have that file read for it. So a format is stated, or found by two witnesses that agree: the
file's name, which no guest chooses, and its first bytes. QEMU is never asked to guess. Headers are read here before
QEMU sees them, since it follows the names of other files in them.
"""

from __future__ import annotations

import os
import re
import struct

from vmbackupd.errors import InvalidArgument

HEAD = 64 * 1024  # bytes that are looked at
DESCRIPTOR_LIMIT = 1024 * 1024  # bytes of a VMDK descriptor, which is a page of text
FAR = 1 << 62  # bytes; beyond the end of any file, and the kernel can still be asked
NAME_LIMIT = 1023  # bytes of a backing file's name, as QEMU has it

#: format -> where its magic lies, and what that is: the format descriptions and QEMU's block/*.c
MAGIC: dict[str, tuple[int, bytes]] = {
    "qcow2": (0, b"QFI\xfb"),
    "vmdk": (0, b"KDMV"),
    "vdi": (0x40, b"\x7f\x10\xda\xbe"),
    "vhdx": (0, b"vhdxfile"),
}
#: formats that are known, so that they are not taken for raw, and not imported
FOREIGN: dict[str, tuple[int, bytes]] = {
    "VMDK descriptor": (0, b"# Disk DescriptorFile"),
    "VMware ESX sparse": (0, b"COWD"),
    "VHD": (0, b"conectix"),
    "QED": (0, b"QED\0"),
    "LUKS": (0, b"LUKS\xba\xbe"),
    "Parallels": (0, b"WithoutFreeSpace"),
    "Parallels extended": (0, b"WithouFreSpacExt"),
    "Proxmox VMA": (0, b"VMA\0"),
}
FORMATS = ("raw", *MAGIC)
SUFFIXES = {".raw": "raw", ".img": "raw", "": "raw", **{f".{name}": name for name in MAGIC}}

# big-endian: magic, version, backing file's offset and length, cluster bits, size, encryption; QEMU's
# docs/interop/qcow2.txt
_QCOW2 = struct.Struct(">4sIQIIQI")
_QCOW2_INCOMPATIBLE = (72, struct.Struct(">Q"))
_QCOW2_EXTERNAL_DATA = 1 << 2
# little-endian: magic, version, flags, capacity, grain size, descriptor's offset and length in sectors
_VMDK = struct.Struct("<4sIIQQQQ")
_VMDK_PARENT = re.compile(
    rb"^\s*(?:parentCID\s*=\s*(?!ffffffff\b)|parentFileNameHint\s*=)", re.MULTILINE | re.IGNORECASE
)


def find_format(path: str, fd: int, stated: str | None) -> str:
    """The format of the image ``path``, open as ``fd``: ``stated``, or what name and content agree upon.

    Raises ``InvalidArgument`` where they do not agree, or where the content is not of the stated format.
    """
    if stated is not None and stated not in FORMATS:
        raise InvalidArgument(f"format {stated!r} cannot be imported: expected one of {', '.join(FORMATS)}")
    if stated == "raw":
        return "raw"
    head = os.pread(fd, HEAD, 0)
    seen = _matching(head, MAGIC)
    if stated is not None:
        if seen != stated:
            raise InvalidArgument(f"{path} is no {stated} image: it does not begin like one; state its format")
        return stated
    if (other := _matching(head, FOREIGN)) is not None:
        raise InvalidArgument(
            f"{path} looks like a {other} image, which cannot be imported: convert it with qemu-img,"
            " or, if it is a raw disk that only begins like one, state the format raw"
        )
    named = SUFFIXES.get(os.path.splitext(path)[1].lower())
    if seen is None and named in (None, "raw"):
        return "raw"
    if seen is None or seen != named:
        begins = f"begins like a {seen} image" if seen else "does not begin like an image of any format known here"
        raise InvalidArgument(
            f"{path} {begins}, and its name does not say the same: state its format ({seen or named}"
            " or raw). A guest chooses the first bytes of its raw disk, so they alone are not"
            " believed"
        )
    return seen


def check_header(path: str, fd: int, format: str, *, backing: bool) -> None:
    """Refuse an image that leads to other files: encrypted ones, external data files, and backing files unless
    ``backing``. Raises ``InvalidArgument``."""
    if format == "qcow2":
        _check_qcow2(path, fd, backing)
    elif format == "vmdk":
        _check_vmdk(path, fd)


def _matching(head: bytes, table: dict[str, tuple[int, bytes]]) -> str | None:
    for name, (offset, magic) in table.items():
        if head[offset : offset + len(magic)] == magic:
            return name
    return None


def _check_qcow2(path: str, fd: int, backing: bool) -> None:
    head = os.pread(fd, HEAD, 0)
    if len(head) < 104:
        raise InvalidArgument(f"{path} is no whole qcow2 image: it has {len(head)} bytes")
    _, version, offset, length, _, _, crypt = _QCOW2.unpack_from(head)
    if version not in (2, 3):
        raise InvalidArgument(f"{path} is a qcow image of version {version}, expected 2 or 3: convert it with qemu-img")
    if crypt:
        raise InvalidArgument(f"{path} is encrypted: convert it to an image that is not, with qemu-img")
    at, field = _QCOW2_INCOMPATIBLE
    if version == 3 and field.unpack_from(head, at)[0] & _QCOW2_EXTERNAL_DATA:
        raise InvalidArgument(f"{path} keeps its data in another file: import a copy made with qemu-img convert")
    if offset and not backing:
        name = os.pread(fd, min(length, NAME_LIMIT), min(offset, FAR)).decode(errors="replace")
        raise InvalidArgument(
            f"{path} is an overlay of {name!r}: import a copy made with qemu-img convert, or allow"
            " backing files if that file, and what it may be based on, is what you expect"
        )


def _check_vmdk(path: str, fd: int) -> None:
    head = os.pread(fd, _VMDK.size, 0)
    if len(head) < _VMDK.size:
        raise InvalidArgument(f"{path} is no whole VMDK image: it has {len(head)} bytes")
    _, _, _, capacity, _, offset, length = _VMDK.unpack(head)
    if capacity == 0:
        raise InvalidArgument(f"{path} is a VMDK image that only names other files: import those")
    if offset:
        text = os.pread(fd, min(length * 512, DESCRIPTOR_LIMIT), min(offset * 512, FAR))
        if _VMDK_PARENT.search(text):
            raise InvalidArgument(f"{path} is based on another VMDK image: import a copy made with qemu-img convert")
