"""The life of a job."""

from __future__ import annotations

import pytest

from vmbackupd.job.states import FOLLOWING, InvalidTransition, advance
from vmbackupd.model import JobState


@pytest.mark.parametrize("old", JobState)
@pytest.mark.parametrize("new", JobState)
def test_a_transition_is_in_the_table_or_refused_by_both_names(old: JobState, new: JobState) -> None:
    if new in FOLLOWING[old]:
        assert advance("j1", old, new) is new
    else:
        with pytest.raises(InvalidTransition, match=f"j1 cannot go from {old.value} to {new.value}"):
            advance("j1", old, new)


def test_nothing_follows_a_final_state_and_every_other_leads_to_one() -> None:
    for state in JobState:
        assert bool(FOLLOWING[state]) != state.final
