"""Random input with a seed that a failing test shows: ``SEED=123 pytest ...`` runs it again."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Iterator[random.Random]:
    seed = int(os.environ.get("SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"SEED={seed}  # of {request.node.nodeid}")
    yield random.Random(seed)
