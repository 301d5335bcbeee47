"""What a thin pool's metadata tells of changes, against the same told of dictionaries."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.unit.guest.thinpools import BLOCK, PoolImage, Thin
from vmbackupd.guest_helper import thin
from vmbackupd.guest_helper.bitmaps import chunks_of, clear, length, mark, runs
from vmbackupd.guest_helper.dm import Info
from vmbackupd.guest_helper.failures import HelperError
from vmbackupd.guest_helper.image import Device
from vmbackupd.guest_helper.stack import Piece
from vmbackupd.guest_helper.thinmeta import Metadata

DATA = 65536 * 2
"""Bytes of a pool's block."""
COUNT = 3000


def metadata(tmp_path: Path, image: bytes, *, held: bool = False) -> Metadata:
    (tmp_path / "tmeta").write_bytes(image)
    return Metadata(Device(str(tmp_path / "tmeta")), held)


def random_thins(dice: random.Random) -> dict[int, Thin]:
    """Devices that share blocks, as snapshots do."""
    places = dice.sample(range(COUNT), dice.randrange(COUNT))
    times = {place: dice.randrange(20) for place in places}
    thins = {}
    for ident in dice.sample(range(1 << 24), dice.randrange(1, 6)):
        mine = dice.sample(places, dice.randrange(len(places) + 1))
        blocks = {dice.randrange(1 << 40): (place, times[place]) for place in mine}
        thins[ident] = Thin(dice.randrange(20), blocks)
    return thins


@pytest.mark.parametrize("seed", range(12))
def test_metadata(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    thins = random_thins(dice)
    image = PoolImage(width=dice.choice([2, 3, 50, 252])).finish(thins, 25, DATA)
    state = metadata(tmp_path, image)
    assert (state.superblock.time, state.superblock.block) == (25, DATA)
    assert {ident: item.snapped for ident, item in state.devices().items()} == {
        ident: item.snapped for ident, item in thins.items()
    }
    for floor in (0, 7, 30):
        expected = {place for item in thins.values() for place, since in item.blocks.values() if since < floor}
        found = state.older(floor, COUNT)
        assert {chunk for first, end in runs(found, COUNT) for chunk in range(first, end)} == expected


def test_pool_without_devices(tmp_path: Path) -> None:
    state = metadata(tmp_path, PoolImage().finish({}, 3, DATA))
    assert (state.devices(), list(runs(state.older(9, COUNT), COUNT))) == ({}, [])


def test_held_state(tmp_path: Path) -> None:
    """A superblock that is kept stands in another block, with its number."""
    pool = PoolImage()
    before = pool.finish({1: Thin(1, {0: (5, 0)})}, 1, DATA)[:BLOCK]
    number = len(pool.nodes)
    pool.nodes.append(before[:8] + struct.pack("<Q", number) + before[16:])
    image = pool.finish({2: Thin(2, {})}, 2, DATA, held=number)
    assert metadata(tmp_path, image).devices().keys() == {2}
    assert metadata(tmp_path, image, held=True).devices().keys() == {1}


@pytest.mark.parametrize("seed", range(300))
def test_damage_is_an_error_or_bounded(tmp_path: Path, seed: int) -> None:
    """Nothing that stands in there makes the reader do anything but end, soon."""
    dice = random.Random(seed)
    image = bytearray(PoolImage(width=3).finish({1: Thin(9, {at: (at, 3) for at in range(40)})}, 9, DATA))
    for _ in range(dice.choice([1, 1, 5])):
        at = dice.randrange(len(image) // 8) * 8
        image[at : at + 8] = struct.pack("<Q", dice.choice([0, 1, 2, 3, 2**64 - 1, dice.getrandbits(64), at // BLOCK]))
    try:
        state = metadata(tmp_path, bytes(image))
        state.devices()
        assert len(state.older(5, 40)) == length(40)
    except (HelperError, OSError):
        pass


def test_a_block_beyond_the_data_device(tmp_path: Path) -> None:
    state = metadata(tmp_path, PoolImage().finish({1: Thin(9, {0: (40, 3)})}, 9, DATA))
    with pytest.raises(HelperError, match="block 40 of 40"):
        state.older(5, 40)


@pytest.mark.parametrize("seed", range(20))
def test_changed_chunks(seed: int) -> None:
    dice = random.Random(seed)
    size = 512 * dice.randrange(1, 5000)
    same, sectors = [], set()
    for _ in range(dice.randrange(12)):
        start = dice.randrange(size // 512)
        end = min(size // 512, start + dice.choice([1, 128, 256, 300, 2000]))
        if not sectors & set(range(start, end)):
            sectors |= set(range(start, end))
            same.append(Piece(0, "8:0", 512 * start, 512 * (end - start)))
    same.append(Piece(0, "8:16", 0, 1 << 30))
    bitmap = thin.changed_chunks("8:0", size, same)
    for chunk in range(chunks_of(size)):
        whole = set(range(chunk * 128, min((chunk + 1) * 128, size // 512))) <= sectors
        assert bool(bitmap[chunk // 8] >> chunk % 8 & 1) != whole, chunk


def test_unchanged_blocks_have_their_places(tmp_path: Path) -> None:
    """Blocks 2 to 4 of the pool, older than the floor, on the borders of two pieces."""
    image = PoolImage().finish({1: Thin(9, {7: (2, 3), 8: (3, 3), 9: (4, 1), 10: (5, 6)})}, 9, DATA)
    (tmp_path / "tmeta").write_bytes(image)
    pieces = [Piece(0, "8:0", 512, 3 * DATA + 1024), Piece(3 * DATA + 1024, "8:16", 0, 20 * DATA)]
    data = thin.Half(23 * DATA + 1024, pieces, Device(str(tmp_path / "tmeta")))
    assert thin.unchanged(data, Metadata(data.snap), 5) == [
        Piece(2 * DATA, "8:0", 512 + 2 * DATA, DATA + 1024),
        Piece(3 * DATA + 1024, "8:16", 0, 2 * DATA - 1024),
    ]


def test_moment(tmp_path: Path) -> None:
    """The floor is that of real devices; the newest mark counts; another place or size is another pool."""
    first = 1 << 23
    thins = {1: Thin(9, {}), 2: Thin(7, {}), first + 5: Thin(3, {}), first + 1: Thin(2, {})}
    thins[first + 5].created, thins[first + 1].created = 3, 8
    state = metadata(tmp_path, PoolImage().finish(thins, 12, DATA))
    info = Info("pool", "LVM-x", 0, 0, 0)
    pool = thin.Pool(info, "253:0", "253:1", {})
    here = thin.Half(9, [Piece(0, "8:0", 0, 9)], Device(str(tmp_path / "tmeta")))
    moment = thin.moment(pool, here, state)
    assert (moment.floor, moment.mark) == (7, first + 1)
    elsewhere = here._replace(pieces=[Piece(0, "8:0", 512, 9)])
    assert thin.moment(pool, elsewhere, state).identity != moment.identity
    assert thin.moment(pool._replace(info=info._replace(uuid="LVM-y")), here, state).identity != moment.identity
    unmarked = metadata(tmp_path, PoolImage().finish({}, 12, DATA))
    assert thin.moment(pool, here, unmarked)[1:] == (12, 0)


def test_moments_as_text() -> None:
    moment = thin.Moment("0123456789abcdef", 12, 345)
    assert thin.parse(moment.text) == moment
    for text in ("", "a.b.c", "a.1", "a.1.2.3", "a.-1.2", "a.1." + "9" * 17, "x" * 17 + ".1.1"):
        assert thin.parse(text) is None


@pytest.mark.parametrize("seed", range(30))
def test_clear(seed: int) -> None:
    dice = random.Random(seed)
    ones, zeros = bytearray(b"\xff" * 20), bytearray(20)
    first = dice.randrange(161)
    end = dice.randrange(161)
    clear(ones, first, end)
    mark(zeros, first, end)
    assert bytes(a ^ b for a, b in zip(ones, zeros, strict=True)) == b"\xff" * 20
