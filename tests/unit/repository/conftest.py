"""Fixtures for the repository's tests."""

from tests.unit.repository.repository_support import both_sorts

__all__ = ["both_sorts"]
