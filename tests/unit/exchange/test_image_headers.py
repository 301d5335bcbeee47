"""Headers of image files that somebody wants to import, damaged at random."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from tests.engine.randoms import rng
from vmbackupd.errors import InvalidArgument
from vmbackupd.exchange.formats import FORMATS, MAGIC, check_header, find_format

__all__ = ["rng"]


@contextmanager
def in_memory(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("image")
    try:
        os.pwrite(fd, data, 0)
        yield fd
    finally:
        os.close(fd)


def check_one(data: bytes) -> None:
    """An image: what is taken for a format begins like one, and what QEMU gets to see leads to no other file."""
    with in_memory(data) as fd:
        for path in ("disk.raw", "disk.qcow2", "disk.vmdk", "disk"):
            for stated in (None, *FORMATS):
                try:
                    format = find_format(path, fd, stated)
                    check_header(path, fd, format, backing=False)
                except InvalidArgument:
                    continue
                if format == "raw":
                    assert stated == "raw" or not any(data[at:].startswith(magic) for at, magic in MAGIC.values())
                    continue
                offset, magic = MAGIC[format]
                assert data[offset:].startswith(magic)
                assert stated == format or path.endswith(f".{format}")
                if format == "qcow2":
                    version, backing = struct.unpack_from(">IQ", data, 4)
                    assert version in (2, 3) and not backing


def whole_headers() -> list[bytes]:
    qcow2 = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, 1 << 20, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 4, 104)
    overlay = qcow2[:8] + struct.pack(">QI", 104, 8) + qcow2[20:] + b"/etc/pwd"
    external = qcow2[:72] + struct.pack(">Q", 4) + qcow2[80:]
    vmdk = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 2048, 128, 1, 1).ljust(512, b"\0") + b"CID=1\nparentCID=ffffffff\n"
    return [
        b"",
        qcow2,
        overlay,
        external,
        vmdk,
        vmdk.replace(b"ffffffff", b"12345678"),
        bytes(64) + MAGIC["vdi"][1],
        b"vhdxfile",
        b"# Disk DescriptorFile\n",
        bytes(4096),
    ]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """A copy with some bytes or numbers changed, cut off, or filled up."""
    changed = bytearray(data.ljust(rng.choice([len(data), 104, 200, 1024]), b"\0"))
    for _ in range(rng.randrange(4)):
        if len(changed) > 8:
            at = rng.randrange(len(changed) - 8)
            number = rng.choice([0, 1, 2, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, rng.getrandbits(64)])
            width = rng.choice([1, 4, 8])
            order = rng.choice(["little", "big"])
            changed[at : at + width] = (number % 256**width).to_bytes(width, order)  # type: ignore[arg-type]
    return bytes(changed[: rng.choice([len(changed), rng.randrange(len(changed) + 1)])])


def test_no_header_makes_us_fail_or_lets_an_image_through_that_leads_elsewhere(rng: random.Random) -> None:
    for whole in whole_headers():
        check_one(whole)
        for _ in range(300):
            check_one(damaged(rng, whole))
