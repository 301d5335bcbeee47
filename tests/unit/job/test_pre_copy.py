"""When the rounds of a pre-copy end: with little enough left for the freeze, or never."""

from __future__ import annotations

import pytest

from vmbackupd.job.steps.pre_copy import Pace
from vmbackupd.units import MiB


def pace(*left: int, copied: int = 100 * MiB, seconds: float = 10.0, last: float = 2.0, room: int = 64 * MiB) -> Pace:
    return Pace(list(left), room=room, copied=copied, seconds=seconds, last=last)


@pytest.mark.parametrize(("left", "stuck"), [
    ((), False),
    ((900, 800, 790), False),  # too early to tell
    ((900, 450, 220, 110), False),
    ((900, 890, 880, 870), True),
    ((100, 500, 490, 480, 470), True),  # the last three rounds count
    ((900, 890, 880, 300), False),
    ((0, 0, 0, 0), False),  # nothing left is no reason to give up
])  # fmt: skip
def test_rounds_that_do_not_get_shorter_are_noticed(left: tuple[int, ...], stuck: bool) -> None:
    assert pace(*left).stuck is stuck


def test_the_rates_are_those_of_what_was_seen() -> None:
    seen = pace(30 * MiB, 8 * MiB)
    assert seen.copy_rate == 10 * MiB
    assert seen.write_rate == 4 * MiB  # what the last round of two seconds left behind


def test_what_fits_into_the_freeze_is_bounded_by_time_and_by_the_guests_memory() -> None:
    assert pace(1, copied=100 * MiB, seconds=1.0).capturable(budget=5.0) == 64 * MiB
    assert pace(1, copied=100 * MiB, seconds=1.0).capturable(budget=1.0) == 40 * MiB
    assert pace(1, copied=0, seconds=0.0).capturable(budget=5.0) == 16 * MiB  # nothing was copied yet to judge by
    assert pace(1, copied=100 * MiB, seconds=1.0, room=MiB).capturable(budget=5.0) == MiB
