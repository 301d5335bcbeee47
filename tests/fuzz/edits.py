"""Sound JSON with the fuzzer's changes: bytes turned at random rarely are JSON at all."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from tests.fuzz.sealed import Cut

VALUES: Sequence[Any] = (
    None, True, False, 0, 1, -1, 255, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("nan"), "",
    "x", "8:0", "253:0", "ab" * 32, "AB" * 16, "../x", "\0", "\ud800", "é" * 70, "y" * 5000, [], {}, [[]], [{}], [None],
)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside of ``value``."""
    found: list[tuple[Any, Any]] = []
    queue = [value]
    while queue:
        here = queue.pop(0)
        inside = here.items() if isinstance(here, dict) else enumerate(here) if isinstance(here, list) else ()
        for key, child in inside:
            found.append((here, key))
            queue.append(child)
    return found


def edited(base: Any, data: bytes) -> Any:
    """A copy of ``base`` with up to eight edits: a place, what to do there, and with which value."""
    value = copy.deepcopy(base)
    cut = Cut(data)
    for _ in range(8):
        found = places(value)
        if cut.empty or not found:
            break
        container, key = found[cut.number(1) % len(found)]
        what, argument = cut.number(1) % 6, cut.number(1)
        if what == 0:
            del container[key]
        elif what == 1:
            container[key] = copy.deepcopy(VALUES[argument % len(VALUES)])
        elif what == 2:
            container[key] = int.from_bytes(cut.piece(argument % 9), "little", signed=True)
        elif what == 3:
            container[key] = cut.piece(argument % 40).decode("latin-1")
        elif what == 4 and isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            other, name = found[argument % len(found)]
            container[key] = copy.deepcopy(other[name])
    return value
