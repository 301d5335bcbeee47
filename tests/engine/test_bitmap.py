"""The bitmap against a set of numbers."""

from __future__ import annotations

import random

import pytest

from vmbackupd.engine import reference
from vmbackupd.engine.bitmap import Bitmap


def both(length: int, rng: random.Random, steps: int = 30) -> tuple[Bitmap, reference.Bitmap]:
    fast, slow = Bitmap(length), reference.Bitmap(length)
    for _ in range(steps):
        first = rng.randrange(length + 1)
        count = rng.choice([0, 1, rng.randrange(length - first + 1)])
        count = min(count, length - first)
        if rng.random() < 0.6:
            fast.set(first, count)
            slow.set(first, count)
        else:
            fast.clear(first, count)
            slow.clear(first, count)
    return fast, slow


def same(fast: Bitmap, slow: reference.Bitmap) -> None:
    assert list(fast.runs()) == slow.runs()
    assert fast.count() == len(slow.items)
    assert [fast[i] for i in range(len(fast))] == [i in slow.items for i in range(slow.length)]


def test_against_the_reference(rng: random.Random) -> None:
    for _ in range(300):
        fast, slow = both(rng.choice([0, 1, 63, 64, 65, 127, 128, rng.randrange(1000)]), rng)
        same(fast, slow)


def test_operations_of_two(rng: random.Random) -> None:
    for _ in range(200):
        length = rng.randrange(1, 400)
        fast, slow = both(length, rng)
        other_fast, other_slow = both(length, rng)
        for name, operation in [("merge", set.union), ("intersect", set.intersection), ("subtract", set.difference)]:
            result = fast.copy()
            getattr(result, name)(other_fast)
            expected = reference.Bitmap(length)
            expected.items = operation(slow.items, other_slow.items)
            same(result, expected)
        same(fast, slow)
        assert fast == fast.copy()


def test_as_bytes(rng: random.Random) -> None:
    for _ in range(300):
        fast, slow = both(rng.choice([0, 1, 7, 8, 9, 63, 64, 65, rng.randrange(1000)]), rng)
        data = fast.to_bytes()
        assert data == slow.to_bytes()
        again = Bitmap.from_bytes(data, fast.length)
        assert again == fast
        same(again, reference.Bitmap.from_bytes(data, fast.length))
    assert list(Bitmap.from_bytes(b"\x01\x80", 16).runs()) == [(0, 1), (15, 1)]


def test_bytes_that_are_no_such_bitmap() -> None:
    for data, length in [(b"", 1), (b"\0", 0), (b"\0", 9), (b"\0\0", 8), (bytes(9), 64)]:
        with pytest.raises(ValueError, match=f"no bitmap of {length} bits"):
            Bitmap.from_bytes(data, length)
    for data, length in [(b"\x80", 7), (b"\0\x02", 9), (bytes(8) + b"\x10", 68)]:
        with pytest.raises(ValueError, match=f"behind the last of {length}"):
            Bitmap.from_bytes(data, length)
    with pytest.raises(ValueError, match="no bitmap"):
        Bitmap.from_bytes(b"", -1)


def test_out_of_range_is_an_error() -> None:
    bitmap = Bitmap(10)
    for first, count in [(0, 11), (10, 1), (11, 0), (-1, 1), (5, -1), (5, 2**64 - 1)]:
        with pytest.raises((IndexError, OverflowError)):
            bitmap.set(first, count)
        with pytest.raises((IndexError, OverflowError)):
            bitmap.clear(first, count)
    for index in (-1, 10):
        with pytest.raises(IndexError):
            bitmap[index]
    assert bitmap.count() == 0
    with pytest.raises(ValueError, match="10 and 11"):
        bitmap.merge(Bitmap(11))
    for length in (-1, 1 << 40):
        with pytest.raises(ValueError, match="no bitmap"):
            Bitmap(length)
