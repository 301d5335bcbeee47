"""Extent lists against sets of numbers."""

from __future__ import annotations

import random

import pytest

from vmbackupd.engine import reference
from vmbackupd.engine.extents import ExtentList


def random_runs(rng: random.Random) -> list[tuple[int, int]]:
    return [(rng.randrange(200), rng.choice([0, 1, rng.randrange(40)])) for _ in range(rng.randrange(12))]


def test_against_the_reference(rng: random.Random) -> None:
    for _ in range(500):
        runs, others = random_runs(rng), random_runs(rng)
        items, other_items = reference.items_of(runs), reference.items_of(others)
        fast, other = ExtentList(runs), ExtentList(others)
        assert list(fast) == reference.runs_of(items)
        assert fast.total == len(items)
        assert len(fast) == len(list(fast))
        assert list(fast.union(other)) == reference.runs_of(items | other_items)
        assert list(fast.intersect(other)) == reference.runs_of(items & other_items)
        assert list(fast.subtract(other)) == reference.runs_of(items - other_items)
        chunk = rng.choice([1, 2, 7, 16])
        assert reference.items_of(fast.chunks(chunk)) == reference.items_of(reference.chunks_of(runs, chunk))


def test_numbers_near_the_end_of_64_bits() -> None:
    top = 2**64
    extents = ExtentList([(top - 10, 9), (0, 1)])
    assert list(extents) == [(0, 1), (top - 10, 9)]
    assert list(extents.subtract(ExtentList([(top - 5, 2)]))) == [(0, 1), (top - 10, 5), (top - 3, 2)]
    with pytest.raises(ValueError, match="2\\^64"):
        extents.add(top - 10, 11)
    with pytest.raises(ValueError):
        extents.add(-1, 1)
    with pytest.raises(OverflowError):
        extents.add(top, 1)
    with pytest.raises(ValueError, match="chunk size 0"):
        list(extents.chunks(0))
