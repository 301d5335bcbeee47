"""Ways to break the rules of docs/format.md, one at a time: the model must notice each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vmbackupd.repository import forget, gc, settle, writer
from vmbackupd.repository.catalog import Catalog
from vmbackupd.repository.condemned import Verdicts
from vmbackupd.repository.output import Output
from vmbackupd.repository.repository import Repository
from vmbackupd.repository.sessions import Session

Patch = pytest.MonkeyPatch


def wait_for_nobody(patch: Patch) -> None:
    """A verdict on packs is carried out though sessions from before it are at work."""
    patch.setattr(Verdicts, "outlived", lambda self, verdict: frozenset())


def forget_at_once(patch: Patch) -> None:
    """A forgotten manifest goes though somebody may build on it."""
    outlived = Verdicts.outlived
    patch.setattr(
        Verdicts, "outlived", lambda self, verdict: frozenset() if verdict.manifests else outlived(self, verdict)
    )


def remove_without_a_verdict(patch: Patch) -> None:
    """A forgotten manifest is just deleted."""

    def deleted(repository: Repository, backup_ids: Any) -> Any:
        for backup_id in backup_ids:
            repository.storage.delete(settle.manifest_object(repository.header, backup_id))

    patch.setattr(forget, "forget", deleted)
    patch.setattr("vmbackupd.repository.repository.forget", deleted)


def sweep_without_a_new_look(patch: Patch) -> None:
    """What became live since the verdict is not seen."""
    look = gc.look
    patch.setattr(gc, "look", lambda repository, progress, before=None: before or look(repository, progress, None))


def look_before_the_claim(patch: Patch) -> None:
    """A writer relies on what it saw before its session stood."""
    look, clean_up = Repository.reliable_index, Repository.clean_up

    def early(self: Repository) -> int:
        freed = clean_up(self)
        self.early = look(self)  # type: ignore[attr-defined]
        return freed

    patch.setattr(Repository, "clean_up", early)
    patch.setattr(Repository, "reliable_index", lambda self, without=(): look(self, without) if without else self.early)


def rely_on_what_is_condemned(patch: Patch) -> None:
    """Writers and collectors alike."""
    patch.setattr("vmbackupd.repository.repository.packs_in", lambda verdicts: set())


def believe_stale_indexes(patch: Patch) -> None:
    """Entries of packs that do not exist count."""
    for_writer = Catalog.for_writer

    def believing(self: Catalog, present: Any, condemned: Any) -> Any:
        told = dict.fromkeys(self.refresh().files[0].pack_ids()) if self.refresh().files else {}
        for file in self.refresh().files:
            told.update(dict.fromkeys(file.pack_ids()))
        return for_writer(self, {**told, **dict.fromkeys(present)}, condemned)

    patch.setattr(Catalog, "for_writer", believing)


def fence_nobody(patch: Patch) -> None:
    """A session that seems dead is removed, and its owner may still publish."""
    patch.setattr(settle, "fence", lambda storage, header, backup_id: True)


def trust_a_suspicion(patch: Patch) -> None:
    """The packs of whoever seems dead are removed as if it were certain."""

    def settled(storage: Any, header: Any, info: Any) -> int:
        if info.kind == "writer":
            settle.fence(storage, header, info.backup)
        freed = settle.remove_packs(storage, info.id)
        settle.sessions.forget_session(storage, info.id)
        return freed

    patch.setattr(settle, "_settle", settled)


def no_mark_before_the_index(patch: Patch) -> None:
    """A dead session's packs are removed though an index tells of them."""
    patch.setattr(Session, "cover", lambda self: None)


def believe_a_missing_mark(patch: Patch) -> None:
    """That a session has no mark is believed though the session itself may be gone by now."""
    patch.setattr(settle.sessions, "is_private", lambda storage, session: not is_covered(storage, session))


def is_covered(storage: Any, session: bytes) -> bool:
    return storage.stat(f"sessions/{session.hex()}.covered") is not None


def remove_own_packs_always(patch: Patch) -> None:
    """A session that gives up removes packs that others may have found."""

    def abort(self: Output) -> None:
        self.store.close()
        for pack in self._packs:
            self._storage.delete(gc.pack_name(pack))
        self.session.end()

    patch.setattr(Output, "abort", abort)


def build_on_anything(patch: Patch) -> None:
    """A base is used though it may be forgotten already."""
    patch.setattr(
        writer.RepositoryWriter,
        "base",
        lambda self, backup_id: remembered(self, self.repository.read_manifest(backup_id)),
    )


def remembered(own: Any, manifest: Any) -> Any:
    own._complete.update(manifest.trees())
    return manifest


MUTATIONS: list[Callable[[Patch], None]] = [
    wait_for_nobody,
    forget_at_once,
    remove_without_a_verdict,
    sweep_without_a_new_look,
    look_before_the_claim,
    rely_on_what_is_condemned,
    believe_stale_indexes,
    fence_nobody,
    trust_a_suspicion,
    no_mark_before_the_index,
    believe_a_missing_mark,
    remove_own_packs_always,
    build_on_anything,
]
