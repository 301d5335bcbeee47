"""What is offered beside a disk: hashes, exceptions, captured chunks, each against the same done in one line."""

from __future__ import annotations

import hashlib
import random
import struct
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.engine.stores import make_store, room_for
from vmbackupd.guest_helper import capture as capture_module
from vmbackupd.guest_helper.bitmaps import CHUNK, Run, chunks_of, length, mark, runs
from vmbackupd.guest_helper.blocks import BLOCK, Blocks, Export, Table
from vmbackupd.guest_helper.capture import Capture
from vmbackupd.guest_helper.exceptions import Exceptions, Store
from vmbackupd.guest_helper.failures import HelperError
from vmbackupd.guest_helper.hashes import Hashes
from vmbackupd.guest_helper.image import PIECE, Device, Image, Source
from vmbackupd.guest_helper.stack import Piece
from vmbackupd.guest_helper.tracker import Trackers

KEY = bytes(range(32))


class Memory(Source):
    """Bytes in memory as a disk, which notes what is read of it."""

    def __init__(self, content: bytes) -> None:
        self.content, self.size = content, len(content)
        self.reads: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        assert 0 < length <= PIECE and offset + length <= self.size
        self.reads.append((offset, length))
        return self.content[offset : offset + length]


def whole(export: Export, offset: int = 0, size: int | None = None) -> bytes:
    found = b""
    for block in export.read(offset, export.size - offset if size is None else size):
        assert block.offset == offset + len(found) and 0 < block.length <= BLOCK
        found += bytes(block.length) if block.data is None else block.data
        assert len(found) == block.offset + block.length - offset
    return found


def patchwork(dice: random.Random, size: int) -> bytes:
    """Random and zero chunks in turn."""
    return b"".join(
        dice.randbytes(min(CHUNK, size - at)) if dice.random() < 0.6 else bytes(min(CHUNK, size - at))
        for at in range(0, size, CHUNK)
    )


@pytest.mark.parametrize("seed", range(30))
def test_bitmaps(seed: int) -> None:
    dice = random.Random(seed)
    chunks = dice.randrange(1, 400)
    bits = [False] * chunks
    bitmap = bytearray(length(chunks))
    for _ in range(dice.randrange(8)):
        first = dice.randrange(chunks)
        end = min(chunks, first + dice.choice([0, 1, 7, 8, 9, 100]))
        mark(bitmap, first, end)
        bits[first:end] = [True] * (end - first)
    assert [bool(bitmap[i // 8] >> i % 8 & 1) for i in range(chunks)] == bits
    shown = [False] * chunks
    last = -1
    for first, end in runs(bitmap, chunks):
        assert last < first < end <= chunks  # apart, in order
        shown[first:end] = [True] * (end - first)
        last = end
    assert shown == bits


def test_runs_end_with_the_disk() -> None:
    assert list(runs(b"\xff\xff", 11)) == [(0, 11)]
    assert list(runs(b"\x00\xf8", 11)) == []


@pytest.mark.parametrize("seed", range(4))
def test_hashes(seed: int) -> None:
    dice = random.Random(seed)
    disk = patchwork(dice, 40 * CHUNK + 5000)
    expected = b"".join(
        hashlib.blake2b(disk[at : at + CHUNK], digest_size=16, key=KEY).digest()
        if disk[at : at + CHUNK].strip(b"\0")
        else bytes(16)
        for at in range(0, len(disk), CHUNK)
    )
    hashes = Hashes(Blocks(Memory(disk), still=False), KEY)
    assert hashes.size == 41 * 16 and whole(hashes) == expected
    for _ in range(50):
        start = dice.randrange(hashes.size)
        size = dice.randrange(1, hashes.size - start + 1)
        assert whole(hashes, start, size) == expected[start : start + size]


def test_hashes_read_what_is_asked_for() -> None:
    memory = Memory(bytes(100 * CHUNK))
    hashes = Hashes(Blocks(memory, still=False), KEY)
    assert hashes.extents(0, 1600) == [(1600, False)] and memory.reads == []
    whole(hashes, 16 * 7 + 3, 16)  # two names, in part
    assert memory.reads == [(7 * CHUNK, 2 * CHUNK)]


def test_nothing_is_kept_of_a_live_disk() -> None:
    """A client that asks for block status before a write, and reads after it, sees the write."""
    memory = Memory(bytes(4 * CHUNK))
    live, still = Blocks(memory, still=False), Blocks(memory)
    assert live.extents(0, 4 * CHUNK) == [(4 * CHUNK, False)]
    assert still.extents(0, 4 * CHUNK) == [(4 * CHUNK, True)]
    memory.content = b"w" * memory.size
    assert whole(live) == memory.content
    assert whole(still) == bytes(memory.size)


def test_table_shows_what_is_there_now() -> None:
    memory = bytearray(3 * BLOCK + 5)
    table = Table(memory)
    assert [block.data for block in table.read(0, table.size)] == [None] * 4
    memory[2 * BLOCK + 7] = 9
    assert whole(table, 2 * BLOCK, 10) == b"\0" * 7 + b"\x09\0\0"


# exceptions


def pieces_of(dice: random.Random, size: int) -> list[Piece]:
    """A volume in pieces here and there on two disks, sectors apart from the borders of chunks."""
    found, at, place = [], 0, {"8:0": 512 * dice.randrange(300), "8:16": 0}
    while at < size:
        disk = dice.choice(["8:0", "8:0", "8:16"])
        part = min(size - at, 512 * dice.choice([1, 100, 128, 1000, 5000]))
        found.append(Piece(at, disk, place[disk], part))
        place[disk] += part + 512 * dice.choice([0, 0, 1, 500])
        at += part
    return found


def chunks_touched(old: int, chunk: int, pieces: list[Piece], size: int) -> set[int]:
    """The slow way, sector by sector."""
    found = set()
    for byte in range(old * chunk, min((old + 1) * chunk, size), 512):
        piece = next(piece for piece in pieces if piece.offset <= byte < piece.offset + piece.length)
        if piece.disk == "8:0":
            found.add((piece.disk_offset + byte - piece.offset) // CHUNK)
    return found


@pytest.mark.parametrize("seed", range(10))
def test_exceptions(tmp_path: Path, seed: int) -> None:
    """Opened again and again while the kernel adds entries."""
    dice = random.Random(seed)
    chunk = dice.choice([4096, 65536])
    size = 512 * dice.randrange(500, 40000)
    pieces = pieces_of(dice, size)
    disk_size = max(piece.disk_offset + piece.length for piece in pieces if piece.disk == "8:0")
    olds = dice.sample(range(-(-size // chunk)), min(700, -(-size // chunk)))
    room = room_for(len(olds), chunk) + dice.choice([0, 512, chunk])
    path = tmp_path / "cow"
    path.write_bytes(make_store([], chunk, room, dice)[0])
    export = Exceptions("8:0", disk_size, [(Store(Device(str(path)), size), pieces)])
    for count in sorted({*dice.sample(range(len(olds)), 4), min(256, len(olds)), len(olds)}):
        path.write_bytes(make_store(olds[:count], chunk, room, dice)[0])
        export.open()
        expected = bytearray(export.size)
        for old in olds[:count]:
            for number in chunks_touched(old, chunk, pieces, size):
                mark(expected, number, number + 1)
        assert whole(export) == expected


def opened(tmp_path: Path, store: bytes, size: int) -> bytes:
    (tmp_path / "cow").write_bytes(store)
    disk = Exceptions("8:0", size, [(Store(Device(str(tmp_path / "cow")), size), [Piece(0, "8:0", 0, size)])])
    disk.open()
    return whole(disk)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\0\0\0\0"),  # no store
        (4, b"\0\0\0\0"),  # the kernel gave it up
        (8, b"\2\0\0\0"),
        (12, b"\0\0\0\0"),
        (12, b"\7\0\0\0"),
        (12, b"\0\0\0\x80"),
        (65536, struct.pack("<Q", 100)),  # a chunk beyond the volume
        (65536 + 8, struct.pack("<Q", 77)),  # not the place that comes next
        (65536, b"\xff" * 65536),
    ],
)
def test_a_store_that_cannot_be_told_from_is_an_error(tmp_path: Path, at: int, value: bytes) -> None:
    store, _ = make_store([3, 50], CHUNK, room_for(2, CHUNK), random.Random(1))
    assert list(runs(opened(tmp_path, store, 100 * CHUNK), 100)) == [(3, 4), (50, 51)]
    with pytest.raises(HelperError) as caught:
        opened(tmp_path, store[:at] + value + store[at + len(value) :], 100 * CHUNK)
    assert caught.value.code == "StoreInvalid"


def test_an_entry_that_is_half_written_is_read_again(tmp_path: Path) -> None:
    """What was seen of the last area is looked at once more, full or not."""
    dice = random.Random(5)
    olds = dice.sample(range(600), 257)
    room = room_for(600, 4096)
    good, _ = make_store(olds[:256], 4096, room, dice)
    torn = bytearray(good)
    struct.pack_into("<Q", torn, 4096 + 255 * 16, 599)  # its first half is still to come
    (tmp_path / "cow").write_bytes(torn)
    store = Store(Device(str(tmp_path / "cow")), 600 * 4096)
    store.ranges()
    (tmp_path / "cow").write_bytes(make_store(olds, 4096, room, dice)[0])
    found = store.ranges()
    for old in olds[255:]:
        assert any(start <= old * 4096 < end for start, end in found)
    assert store.ranges() == [(olds[256] * 4096, (olds[256] + 1) * 4096)]


# capture


class Marks(Trackers):
    """Stands in for what the kernel marks: the answers of each pass, and what happens before it."""

    def __init__(self, *passes: dict[str, list[Run]], meanwhile: Callable[[int], None] = lambda number: None) -> None:
        super().__init__()
        self.passes, self.asked, self.meanwhile = passes, 0, meanwhile
        self.marked_again: dict[str, list[Run]] = {}

    def marked(self, devices: Iterable[str]) -> dict[str, list[Run]]:
        self.meanwhile(self.asked)
        found = self.passes[min(self.asked, len(self.passes) - 1)]
        self.asked += 1
        return {device: found.get(device, []) for device in devices}

    def again(self, device: str, runs: Iterable[Run]) -> None:
        self.marked_again[device] = list(runs)


def write(path: Path, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


def soon() -> float:
    return time.monotonic() + 60


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(2).randbytes(60 * CHUNK + 1024))
    return path


def test_capture(disk: Path, tmp_path: Path) -> None:
    """Chunks written between two passes are read again; what is written later is not seen."""
    other = tmp_path / "other"
    other.write_bytes(b"o" * 5 * CHUNK)
    before = disk.read_bytes()

    def meanwhile(number: int) -> None:
        if number == 1:
            write(disk, 4 * CHUNK, b"second pass")

    marks = Marks({"8:0": [(3, 5), (20, 45), (60, 61)], "8:16": [(0, 2)]}, {"8:0": [(4, 6)]}, {}, meanwhile=meanwhile)
    lanes = {"8:0": [Image(Device(str(disk))) for _ in range(3)], "8:16": [Image(Device(str(other))) for _ in range(3)]}
    capture = Capture(lanes, 32 * CHUNK)
    answer = capture.take(marks, soon())
    assert abs(answer.pop("t1") - time.time()) < 60
    assert answer == {
        "passes": 3,
        "disks": [
            {"device": "8:0", "chunks": 29, "bytes": 29 * CHUNK},
            {"device": "8:16", "chunks": 2, "bytes": 2 * CHUNK},
        ],
    }
    t1 = disk.read_bytes()
    assert t1 != before
    disk.write_bytes(b"l" * len(t1))
    expected = bytearray(b"l" * len(t1))
    for first, end in [(3, 6), (20, 45), (60, 61)]:
        expected[first * CHUNK : end * CHUNK] = t1[first * CHUNK : end * CHUNK]
    captured = capture.disks["8:0"]
    assert whole(Blocks(captured, still=False)) == expected
    dice = random.Random(3)
    for _ in range(50):
        start = dice.randrange(len(t1))
        size = min(dice.choice([1, 4096, CHUNK, PIECE]), len(t1) - start)
        assert captured.read(start, size) == expected[start : start + size]
    assert list(runs(captured.rest, chunks_of(len(t1)))) == [(3, 6), (20, 45), (60, 61)]
    assert marks.marked_again == {}
    capture.close()


def test_chunks_in_a_snapshot_need_no_memory(disk: Path, tmp_path: Path) -> None:
    """Chunks 10 to 39 and a half are a volume's: the snapshot has them, also after the capture."""
    snap = tmp_path / "snap"
    snap.write_bytes(b"s" * 59 * (CHUNK // 2))
    overlays = [(Device(str(snap)), [Piece(0, "8:0", 10 * CHUNK, 59 * (CHUNK // 2))])]
    t1 = disk.read_bytes()
    capture = Capture({"8:0": [Image(Device(str(disk)), overlays, "8:0")]}, 5 * CHUNK)
    marks = Marks({"8:0": [(8, 42)]}, {"8:0": [(9, 12)]}, {"8:0": [(10, 39)]})
    answer = capture.take(marks, soon())
    assert answer["disks"] == [{"device": "8:0", "chunks": 34, "bytes": 5 * CHUNK}]
    assert answer["passes"] == 3, "marks in the volume alone are no reason for another"
    assert marks.marked_again == {"8:0": [(9, 12), (10, 39)]}, "the volume's T1 was before"
    disk.write_bytes(bytes(len(t1)))
    expected = t1[8 * CHUNK : 10 * CHUNK] + b"s" * 59 * (CHUNK // 2) + t1[79 * (CHUNK // 2) : 42 * CHUNK]
    assert whole(Blocks(capture.disks["8:0"], still=False), 8 * CHUNK, 34 * CHUNK) == expected
    capture.close()


@pytest.mark.parametrize("slots", [4, 5])
def test_too_much(disk: Path, slots: int) -> None:
    capture = Capture({"8:0": [Image(Device(str(disk)))]}, slots * CHUNK)
    marks = Marks({"8:0": [(0, 3)]}, {"8:0": [(1, 5)]}, {})
    if slots == 5:
        assert capture.take(marks, soon())["disks"] == [{"device": "8:0", "chunks": 5, "bytes": 5 * CHUNK}]
    else:
        with pytest.raises(HelperError, match="262144 bytes are still to be taken, with memory for 262144"):
            capture.take(marks, soon())
        assert not capture.taken
    capture.close()


def test_never_at_rest(disk: Path) -> None:
    capture = Capture({"8:0": [Image(Device(str(disk)))]}, 8 * CHUNK)
    with pytest.raises(HelperError) as caught:
        capture.take(Marks({"8:0": [(3, 4)]}), time.monotonic() + 0.2)
    assert caught.value.code == "NotStill" and not capture.taken
    capture.close()


def test_a_disk_that_cannot_be_read(disk: Path) -> None:
    capture = Capture({"8:0": [Image(Device(str(disk)))]}, 8 * CHUNK)
    disk.write_bytes(b"")
    with pytest.raises(HelperError) as caught:
        capture.take(Marks({"8:0": [(0, 1)]}), soon())
    assert caught.value.code == "ReadFailed"
    capture.close()


def test_a_guest_keeps_half_of_its_spare_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_module.memory, "available", lambda: 100)
    assert (capture_module.grant(40), capture_module.grant(60)) == (40, 50)
