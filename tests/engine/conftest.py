"""Fixtures of the engine's tests."""

from tests.engine.randoms import rng
from tests.unit.repository.repository_support import both_sorts

__all__ = ["both_sorts", "rng"]
