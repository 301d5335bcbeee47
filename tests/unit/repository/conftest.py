"""Fixtures for the repository's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.repository import repository_support


@pytest.fixture(scope="module", params=["plain", "encrypted"])
def both_sorts(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test that uses it runs twice: ``make`` makes plain repositories, then encrypted ones."""
    repository_support.SORT["encrypted"] = request.param == "encrypted"
    yield request.param
    repository_support.SORT["encrypted"] = False
