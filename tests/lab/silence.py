"""Guests that do not answer any more, and what is still to be learned from them."""

from __future__ import annotations

from collections.abc import Iterable

from tests.lab.guest import Guest
from tests.lab.services import LabError

SILENT: dict[str, str] = {}
"""The fixture's name of each such guest → the error."""


def words_of(guest: Guest) -> str:
    """The end of the kernel's log, or how its guest came to be silent: for reports, so it raises nothing of its own."""
    try:
        return guest.kernel_log(40)
    except LabError as error:
        SILENT[f"{guest.name}_guest"] = str(error)
    try:
        return f"(it does not answer)\n{guest.last_words()}"
    except LabError as error:
        return f"({error})"


def silent_among(fixtures: Iterable[str]) -> str | None:
    """Of a test's ``fixtures``: which is a guest that fell silent, and with what error."""
    for name in SILENT.keys() & set(fixtures):
        return f"the guest of {name} has not answered since an earlier test: {SILENT[name]}"
    return None
