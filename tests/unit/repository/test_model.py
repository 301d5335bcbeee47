"""Any number of hosts at work on one repository, in any order of their storage operations.

The real code runs against a storage that lets operations through one at a time, in an order that hypothesis chooses:
writers (full, and built on a base), readers, forgetting, and several garbage collectors at once; killed at any
operation, before or after its effect, or with a put still on its way; taken for dead while they go on; with operations
that fail, and indexes that are lost. After every step all that existing backups refer to is in the packs; at the end
no garbage is.

``VMBACKUP_MODEL_EXAMPLES`` and ``VMBACKUP_MODEL_STEPS`` make the search longer.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.unit.repository import mutations, scenarios
from tests.unit.repository.actors import Actor
from tests.unit.repository.model import ALPHABET, Model, deterministic
from vmbackupd.errors import StorageError

EXAMPLES = int(os.environ.get("VMBACKUP_MODEL_EXAMPLES", "80"))
STEPS = int(os.environ.get("VMBACKUP_MODEL_STEPS", "40"))
SEARCH = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
    print_blob=False,
)

ALL = 10_000
images = st.lists(st.integers(-1, len(ALPHABET) - 1), min_size=1, max_size=5)
counts = st.one_of(st.just(ALL), st.integers(1, 60), st.integers(1, 12))
whom = st.integers(0, 7)


class Machine(RuleBasedStateMachine):
    """The search for an order in which something is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Model | None = None

    @initialize(certain=st.booleans(), seed=st.integers(0, 2**32 - 1))
    def begin(self, certain: bool, seed: int) -> None:
        self.patch = pytest.MonkeyPatch()
        made = deterministic(seed)
        self.patch.setattr(secrets, "token_bytes", made)
        self.patch.setattr(secrets, "token_hex", lambda size=32: made(size).hex())
        self.model = Model(certain=certain)

    def alive(self) -> list[Actor]:
        assert self.model is not None
        return [actor for actor in self.model.actors if not actor.done]

    def pick(self, number: int) -> Actor | None:
        alive = self.alive()
        return alive[number % len(alive)] if alive else None

    @property
    def busy(self) -> bool:
        return len(self.alive()) >= 5

    def some_backup(self, number: int) -> str | None:
        assert self.model is not None
        found = sorted(self.model.backups())
        return found[number % len(found)] if found else None

    @precondition(lambda self: not self.busy)
    @rule(image=images, ahead=counts)
    def full_backup(self, image: list[int], ahead: int) -> None:
        assert self.model is not None
        self.model.writer(image).step(ahead)

    @precondition(lambda self: not self.busy)
    @rule(image=images, base=whom, ahead=counts)
    def backup_on_a_base(self, image: list[int], base: int, ahead: int) -> None:
        assert self.model is not None
        backup = self.some_backup(base)
        if backup is not None:
            self.model.writer(image, base=backup).step(ahead)

    @precondition(lambda self: not self.busy)
    @rule(backup=whom, ahead=counts)
    def read(self, backup: int, ahead: int) -> None:
        assert self.model is not None
        found = self.some_backup(backup)
        if found is not None:
            self.model.reader(found).step(ahead)

    @precondition(lambda self: not self.busy)
    @rule(backup=whom, ahead=counts)
    def forget(self, backup: int, ahead: int) -> None:
        assert self.model is not None
        found = self.some_backup(backup)
        if found is not None:
            self.model.forgetter(found).step(ahead)

    @precondition(lambda self: not self.busy)
    @rule(ahead=counts)
    def collect(self, ahead: int) -> None:
        assert self.model is not None
        self.model.collector().step(ahead)

    @rule(number=whom, count=counts)
    def step(self, number: int, count: int) -> None:
        actor = self.pick(number)
        if actor is not None:
            actor.step(count)

    @rule(number=whom)
    def finish(self, number: int) -> None:
        self.step(number, ALL)

    @precondition(lambda self: not self.busy)
    @rule(backup=whom)
    def forget_at_once(self, backup: int) -> None:
        self.forget(backup, ALL)

    @precondition(lambda self: not self.busy)
    @rule()
    def collect_at_once(self) -> None:
        self.collect(ALL)

    @precondition(lambda self: not self.busy)
    @rule(image=images)
    def make_garbage(self, image: list[int]) -> None:
        assert self.model is not None
        writer = self.model.writer(image)
        writer.finish()
        self.model.forgetter(writer.name.replace("writer", "backup")).finish()

    @precondition(lambda self: not self.busy)
    @rule(image=images)
    def back_up_at_once(self, image: list[int]) -> None:
        self.full_backup(image, ALL)

    @rule(number=whom, after_effect=st.booleans(), delayed=st.booleans())
    def kill(self, number: int, after_effect: bool, delayed: bool) -> None:
        assert self.model is not None
        actor = self.pick(number)
        if actor is not None:
            actor.kill(after_effect=after_effect, delayed=delayed and not self.model.shared.certain_ends)

    @rule(number=whom)
    def take_for_dead(self, number: int) -> None:
        """It goes on all the same. Where ends are certain, nobody is taken for dead who is not."""
        assert self.model is not None
        actor = self.pick(number)
        if actor is not None:
            names = {name for name, owner in self.model.shared.owners.items() if owner is actor}
            self.model.shared.suspected |= names

    @rule(number=whom, late=st.booleans())
    def fail(self, number: int, late: bool) -> None:
        actor = self.pick(number)
        if actor is not None:
            actor.fault = (StorageError("injected"), late)
            actor.step()

    @rule(which=st.integers(0, 100))
    def lose_an_index(self, which: int) -> None:
        assert self.model is not None
        found = sorted(name for name in self.model.shared.objects if name.startswith("indexes/"))
        if found:
            self.model.shared.delete(found[which % len(found)])

    @rule(which=st.integers(0, 100))
    def a_late_put_arrives(self, which: int) -> None:
        assert self.model is not None
        limbo = self.model.shared.limbo
        if limbo:
            name, data = limbo.pop(which % len(limbo))
            self.model.shared.put_if_absent(name, [data])

    @invariant()
    def nothing_is_lost(self) -> None:
        if self.model is not None:
            self.model.check()

    def teardown(self) -> None:
        if self.model is None:
            return
        try:
            self.model.finish()
        finally:
            self.model.end()
            self.patch.undo()


def test_no_order_of_operations_loses_anything() -> None:
    run_state_machine_as_test(Machine, settings=SEARCH)


CASES = [
    (True, scenarios.a_writer_finds_garbage_that_is_then_collected, mutations.wait_for_nobody),
    (True, scenarios.a_base_is_forgotten_while_somebody_builds_on_it, mutations.forget_at_once),
    (True, scenarios.a_base_is_forgotten_while_somebody_builds_on_it, mutations.remove_without_a_verdict),
    (True, scenarios.a_forgotten_base_is_asked_for, mutations.build_on_anything),
    (True, scenarios.a_writer_publishes_between_a_look_and_the_removal, mutations.sweep_without_a_new_look),
    (True, scenarios.garbage_goes_between_a_writers_beginning_and_its_claim, mutations.look_before_the_claim),
    (True, scenarios.a_writer_begins_after_the_verdict, mutations.rely_on_what_is_condemned),
    (True, scenarios.an_index_comes_back, mutations.believe_stale_indexes),
    (False, scenarios.a_writer_is_taken_for_dead, mutations.fence_nobody),
    (False, scenarios.packs_of_one_taken_for_dead_are_in_use, mutations.trust_a_suspicion),
    (True, scenarios.packs_of_a_killed_writer_are_in_use, mutations.no_mark_before_the_index),
    (True, scenarios.a_writer_ends_while_somebody_looks_whether_it_is_dead, mutations.believe_a_missing_mark),
    (True, scenarios.packs_of_a_failing_writer_are_in_use, mutations.remove_own_packs_always),
]


@pytest.mark.parametrize(("certain", "scenario", "mutation"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_each_rule_is_needed(
    certain: bool, scenario: Callable[[Model], None], mutation: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """With the rules nothing is lost in these orders of operations; without one of them something is."""
    model = Model(certain=certain)
    try:
        scenario(model)
        model.finish()
    finally:
        model.end()
    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        model = Model(certain=certain)
        try:
            with pytest.raises(AssertionError, match="are gone|is not whole"):
                scenario(model)
        finally:
            model.end()


def test_every_mutation_is_tried() -> None:
    assert {mutation for _, _, mutation in CASES} == set(mutations.MUTATIONS)
