"""Fixtures of tests on a private bus."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.api.support import BusDaemon


@pytest.fixture
def address() -> Iterator[str]:
    """The address of a bus of our own."""
    with BusDaemon() as bus:
        yield bus.address
