"""Processes of fixtures that outlive a test; each fixture ends its own."""

PIDS: set[int] = set()
