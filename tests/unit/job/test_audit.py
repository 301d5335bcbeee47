"""The audit's sample: only what is said to be unchanged, each chunk with the probability asked for."""

from __future__ import annotations

import random

import pytest

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.job import audit


def bits(bitmap: Bitmap) -> set[int]:
    return {first + number for first, count in bitmap.runs() for number in range(count)}


def some(length: int, chance: random.Random) -> Bitmap:
    bitmap = Bitmap(length)
    for index in range(length):
        if chance.random() < 0.3:
            bitmap.set(index)
    return bitmap


@pytest.mark.parametrize("seed", range(20))
def test_it_never_holds_what_changed(seed: int) -> None:
    chance = random.Random(seed)
    changed = some(chance.randrange(1, 500), chance)
    taken = audit.sample(changed, chance.random(), chance)
    assert not bits(taken) & bits(changed)


def test_a_share_of_one_is_everything_unchanged_and_of_none_is_nothing() -> None:
    changed = some(1000, random.Random(1))
    everything = audit.whole(1000)
    assert bits(audit.sample(changed, 1.0)) == bits(everything) - bits(changed)
    assert not audit.sample(changed, 0.0).count()


def test_it_is_never_empty_while_anything_is_unchanged() -> None:
    changed = audit.whole(10)
    assert not audit.sample(changed, 0.01).count()
    changed.clear(7)
    assert bits(audit.sample(changed, 0.01)) == {7}
    assert not audit.sample(Bitmap(0), 0.5).count()


def test_a_chunk_that_changed_unseen_is_found_with_the_computed_probability() -> None:
    """50 of 1000 chunks changed unseen; 1 % finds one of them with probability 1 - 0.99 ** 50 = 0.395."""
    chance, found, rounds = random.Random(7), 0, 2000
    for _ in range(rounds):
        found += any(index < 50 for index in bits(audit.sample(Bitmap(1000), 0.01, chance)))
    expected = 1 - 0.99**50
    assert abs(found / rounds - expected) < 4 * (expected * (1 - expected) / rounds) ** 0.5
