"""Parsers under the fuzzer: the saved inputs on the normal engine, and a short run on the one built for it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from tests.conftest import require
from tests.fuzz.__main__ import CORPUS, fuzz, tree
from tests.fuzz.targets import TARGETS

SECONDS = 4


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_that_were_saved(name: str) -> None:
    target = TARGETS[name]
    saved = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert saved, f"nothing in {CORPUS / name}: ./dev fuzz --keep"
    for data in [*target.seeds(), *saved]:
        target.run(data)


@pytest.fixture(scope="module")
def built() -> Path:
    require("clang", shutil.which("clang") is not None)
    require("atheris", importlib.util.find_spec("atheris") is not None)
    return tree()


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_short_run(built: Path, tmp_path: Path, name: str) -> None:
    result = fuzz(built, name, SECONDS, corpus=tmp_path)
    assert not result.failure, result.failure
    assert result.executions > 0
    # the C code is what is guided: without its counters an input could find nothing there
    assert result.counters > 1000
