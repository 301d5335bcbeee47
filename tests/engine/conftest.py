"""Fixtures of the engine's tests."""

from tests.engine.randoms import rng

__all__ = ["rng"]
