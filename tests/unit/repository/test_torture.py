"""A short run of ``./dev torture``, and one on a disk that is full again and again."""

from __future__ import annotations

import os
from pathlib import Path

from tests.conftest import require
from tests.torture import torture

KILLS = 20


def test_killed_at_random_instants(tmp_path: Path) -> None:
    done = torture(tmp_path, KILLS, seed=1, tell=print)
    assert done.kills >= KILLS
    assert done.published
    assert done.read


def test_killed_on_a_full_disk(tmp_path: Path) -> None:
    require("root's rights", os.geteuid() == 0)
    done = torture(tmp_path, KILLS // 2, seed=2, full_disk=True, tell=print)
    assert done.fulls
    assert done.read
