"""Memory does not grow with the number of chunks: a large index, every work in a process of its own.

The same with 16 million chunks: ``python -m tests.engine.scale DIRECTORY 16000000``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.scale import WORKS, measure, tree_of

CHUNKS = 600_000
MIB = 2**20
PYTHON = 48 * MIB  # the interpreter with the engine, and what a little work leaves behind
CACHE = 32 * MIB  # blocks of the index
INDEX = CHUNKS  # bytes: directory 40/85 and liveness 1/8 of a byte for each chunk, tables of packs
LIMITS = {
    "open": PYTHON + INDEX,
    "list_packs": PYTHON + INDEX,
    "writer": PYTHON + INDEX + 64 * MIB,  # three packs and the table of new chunks, as far as they are touched
    "lookup": PYTHON + INDEX + CACHE + 40 * MIB,  # the names that are asked for
    "liveset": PYTHON + INDEX + CACHE + 36 * MIB,  # the names that wait
    "gc": PYTHON + INDEX + CACHE + 36 * MIB,
    "merge": PYTHON + INDEX,
}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("scale") / "repository"
    return path, tree_of(path, CHUNKS)


def test_every_work_has_a_limit() -> None:
    assert LIMITS.keys() == WORKS.keys()


@pytest.mark.parametrize("work", LIMITS)
def test_memory_is_bounded(scaled: tuple[Path, str], work: str) -> None:
    assert measure(*scaled, work) <= LIMITS[work]
