"""Tests of the whole on real guests."""
