"""Orders of operations in which a rule of docs/format.md matters: each loses a backup where the rule is broken."""

from __future__ import annotations

from tests.unit.repository.actors import Actor
from tests.unit.repository.model import Model
from vmbackupd.errors import StorageError

IMAGE = [0, 1, 2, 3]


def looked(writer: Actor) -> Actor:
    """Let a writer claim its session and look around."""
    writer.step_until("claim")
    writer.step_until("list packs/ on")
    writer.step_until("list indexes/ on")
    return writer


def garbage(model: Model) -> None:
    """A backup that was forgotten; its packs are still there."""
    model.writer(IMAGE).finish()
    model.forgetter("backup-1").finish()
    assert model.backups() == set()


def a_writer_finds_garbage_that_is_then_collected(model: Model) -> None:
    garbage(model)
    writer = looked(model.writer(IMAGE))
    model.collector().finish()
    writer.finish()
    model.check()


def a_base_is_forgotten_while_somebody_builds_on_it(model: Model) -> None:
    """And its packs were condemned before, while it was being written."""
    condemned_under_its_writer(model)
    writer = model.writer([4, 1, 2, 3], base="backup-1")
    writer.step_until("put packs/")  # it has read what it needs of the base's nodes
    model.forgetter("backup-1").finish()
    model.collector().finish()
    writer.finish()
    model.check()


def a_forgotten_base_is_asked_for(model: Model) -> None:
    condemned_under_its_writer(model)
    reader = model.reader("backup-1")
    reader.step_until("get manifests/")
    model.forgetter("backup-1").finish()
    writer = model.writer([4, 1, 2, 3], base="backup-1")
    writer.step_until("put packs/")  # it has read what it needs of the base's nodes
    reader.finish()
    model.collector().finish()
    writer.finish()
    model.check()


def condemned_under_its_writer(model: Model) -> None:
    writer = model.writer(IMAGE)
    writer.step_until("put indexes/")
    model.repository.condemn(model.repository.catalog.list_packs(), reason="damaged")
    model.collector().finish()
    writer.finish()
    assert model.backups() == {"backup-1"}


def a_writer_publishes_between_a_look_and_the_removal(model: Model) -> None:
    garbage(model)
    writer = looked(model.writer(IMAGE))
    model.collector().finish()
    second = model.collector()
    second.step_until("list manifests/ on")
    second.step_until("list condemned/ on")
    second.step_until("list condemned/ on")
    writer.finish()
    second.finish()
    model.check()


def garbage_goes_between_a_writers_beginning_and_its_claim(model: Model) -> None:
    garbage(model)
    writer = model.writer(IMAGE)
    writer.step_until("stat manifests/")
    model.collector().finish()
    writer.finish()
    model.check()


def a_writer_begins_after_the_verdict(model: Model) -> None:
    garbage(model)
    other = looked(model.writer([5]))
    model.collector().finish()
    writer = looked(model.writer(IMAGE))
    other.finish()
    model.collector().finish()
    writer.finish()
    model.check()


def a_writer_is_taken_for_dead(model: Model) -> None:
    garbage(model)
    writer = looked(model.writer(IMAGE))
    suspect(model, writer)
    model.collector().finish()
    writer.finish()
    model.check()


def packs_of_one_taken_for_dead_are_in_use(model: Model) -> None:
    first = model.writer(IMAGE)
    first.step_until("put indexes/")
    second = looked(model.writer(IMAGE))
    suspect(model, first)
    model.collector().finish()
    second.finish()
    model.check()


def packs_of_a_killed_writer_are_in_use(model: Model) -> None:
    first = model.writer(IMAGE)
    first.step_until("put indexes/")
    second = looked(model.writer(IMAGE))
    first.kill()
    model.collector().finish()
    second.finish()
    model.check()


def packs_of_a_failing_writer_are_in_use(model: Model) -> None:
    first = model.writer(IMAGE)
    first.step_until("put indexes/")
    second = looked(model.writer(IMAGE))
    first.fault = (StorageError("disk on fire"), False)
    first.finish()
    second.finish()
    model.check()


def a_writer_ends_while_somebody_looks_whether_it_is_dead(model: Model) -> None:
    writer = model.writer(IMAGE)
    writer.step_until("put indexes/")
    cleaner = model.collector()
    cleaner.step_until("abandoned")
    writer.finish()
    cleaner.finish()
    model.check()


def an_index_comes_back(model: Model) -> None:
    """A slow merger put it, after the packs it tells of were collected."""
    garbage(model)
    old = {name: data for name, data in model.shared.objects.items() if name.startswith("indexes/")}
    model.collector().finish()
    model.shared.objects.update(old)
    model.writer(IMAGE).finish()
    model.check()


def suspect(model: Model, actor: Actor) -> None:
    model.shared.suspected |= {name for name, owner in model.shared.owners.items() if owner is actor}
