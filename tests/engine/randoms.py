"""Random input with a seed that a failing test shows: ``SEED=123 pytest ...`` runs it again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from vmbackupd.engine.bitmap import Bitmap


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Iterator[random.Random]:
    seed = int(os.environ.get("SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"SEED={seed}  # of {request.node.nodeid}")
    yield random.Random(seed)


def some_chunks(rng: random.Random, count: int) -> Bitmap:
    """Single chunks and long runs of them."""
    chosen = Bitmap(count)
    for _ in range(rng.randrange(12)):
        first = rng.randrange(count)
        chosen.set(first, min(rng.choice([1, 1, 3, 200]), count - first))
    return chosen
