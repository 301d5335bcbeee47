"""Which state of a job may follow which."""

from __future__ import annotations

from vmbackupd.model import JobState

# A cancellation may come too late (the work succeeds), may fail (what was done could not be undone), and the work may
# be cancelled from inside without a request.
FOLLOWING: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset({JobState.CANCELLING, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}),
    JobState.CANCELLING: frozenset({JobState.CANCELLED, JobState.SUCCEEDED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELLED: frozenset(),
}


class InvalidTransition(RuntimeError):
    """A job was to take a state that cannot follow its present one: a bug in the caller."""

    def __init__(self, job: str, old: JobState, new: JobState) -> None:
        super().__init__(f"job {job} cannot go from {old} to {new}")
        self.old = old
        self.new = new


def advance(job: str, old: JobState, new: JobState) -> JobState:
    """``new``, if it may follow ``old``; raises :class:`InvalidTransition` naming both otherwise."""
    if new not in FOLLOWING[old]:
        raise InvalidTransition(job, old, new)
    return new
