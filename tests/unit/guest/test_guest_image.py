"""A disk put together from itself and snapshots, against the same done with slices."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vmbackupd.guest_helper.blocks import BLOCK, KEPT, Blocks
from vmbackupd.guest_helper.image import PIECE, Device, Image
from vmbackupd.guest_helper.stack import Piece

SIZE = 2 * PIECE + 3 * 4096 + 512


@pytest.mark.parametrize("seed", range(8))
def test_overlays(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    live = dice.randbytes(SIZE)
    (tmp_path / "live").write_bytes(live)
    expected = bytearray(live)
    overlays = []
    at = dice.randrange(8) * 512
    for number in range(3):
        pieces, content = [], b""
        while at + 512 <= SIZE and len(pieces) < 5:
            length = min(dice.choice([512, 4096, 100 * 512, PIECE]), SIZE - at)
            data = dice.randbytes(length)
            pieces.append(Piece(len(content), "8:0", at, length))
            expected[at : at + length] = data
            content += data
            at += length + dice.choice([0, 0, 512, 70000 // 512 * 512])
        pieces.append(Piece(len(content), "8:16", 0, 4096))  # on another disk: not ours to show
        (tmp_path / f"snap{number}").write_bytes(content + bytes(4096))
        overlays.append((Device(str(tmp_path / f"snap{number}")), pieces))
    image = Image(Device(str(tmp_path / "live")), overlays, "8:0")
    assert image.size == SIZE
    for _ in range(100):
        start = dice.randrange(SIZE)
        length = min(dice.choice([1, 511, 4096, PIECE]), SIZE - start)
        assert image.read(start, length) == expected[start : start + length]
    assert b"".join(block.data or bytes(block.length) for block in Blocks(image).read(0, SIZE)) == expected


def test_volume_below_a_volume(tmp_path: Path) -> None:
    """Both snapshots show the same bytes where they overlap; each byte comes from one of them."""
    (tmp_path / "live").write_bytes(b"l" * 16384)
    (tmp_path / "low").write_bytes(b"s" * 8192)
    (tmp_path / "high").write_bytes(b"s" * 4096)
    low = (Device(str(tmp_path / "low")), [Piece(0, "8:0", 4096, 8192)])
    high = (Device(str(tmp_path / "high")), [Piece(0, "8:0", 8192, 4096)])
    for overlays in ([low, high], [high, low]):
        image = Image(Device(str(tmp_path / "live")), overlays, "8:0")
        assert image.read(0, 16384) == b"l" * 4096 + b"s" * 8192 + b"l" * 4096


def test_device_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "live").write_bytes(b"x" * 8192)
    device = Device(str(tmp_path / "live"))
    (tmp_path / "live").write_bytes(b"x" * 100)
    assert bytes(device.read(0, 100)) == b"x" * 100
    with pytest.raises(OSError, match="ends at byte 100"):
        device.read(0, 101)


def test_what_is_kept_is_bounded_and_given_away_once(tmp_path: Path) -> None:
    path = tmp_path / "live"
    with open(path, "wb") as file:
        for number in range(2 * KEPT):
            file.seek(number * BLOCK)
            file.write(b"x")
        file.truncate(2 * KEPT * BLOCK)
    blocks = Blocks(Image(Device(str(path))))
    at = 0
    while at < blocks.size:
        at += sum(length for length, _ in blocks.extents(at, blocks.size - at))
        assert len(blocks._kept) <= KEPT
    kept = len(blocks._kept)
    assert kept > KEPT // 2
    assert all(block.data == b"x" + bytes(BLOCK - 1) for block in blocks.read(0, blocks.size))
    assert len(blocks._kept) == 0
