"""What all the backups of a repository refer to, at one look."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmbackupd.engine.chunkreader import ChunkReader
from vmbackupd.engine.liveset import LiveSet
from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.repository.condemned import manifests_in, packs_in

if TYPE_CHECKING:
    from vmbackupd.repository.manifest import Manifest
    from vmbackupd.repository.repository import Repository

log = logging.getLogger(__name__)

LOOKS = 5


@dataclass(frozen=True)
class View:
    """``names``: the manifests, by the last part of their names; ``present``: sizes of packs by id; ``condemned``: ids
    of packs; ``sound``: packs of which the indexes tell everything; ``live``: the records these manifests refer to, in
    any pack that is present; ``reader``: reads any of them."""

    names: frozenset[str]
    present: dict[bytes, int]
    condemned: frozenset[bytes]
    sound: frozenset[bytes]
    live: LiveSet
    reader: ChunkReader


def look(repository: Repository, progress: Callable[[str, int, int], None], before: View | None = None) -> View:
    """Everything the backups of now refer to; ``before``, if that knows them all.

    RepositoryCorrupt naming a backup if something it refers to is not to be found, StorageError.
    """
    names = repository.manifest_names()
    if before is not None and names <= before.names:
        return before
    attempt = 1
    while True:
        try:
            return _look(repository, names, progress)
        except RepositoryCorrupt as reason:
            # Packs and indexes move while we look, and an index may have been found damaged: look again, and in the
            # packs themselves.
            log.info("%s: look %d: %s", repository.storage.place, attempt, reason)
            repository.rebuild_index()
            known, names = names, repository.manifest_names()
            if names >= known:  # else perhaps it was one that was forgotten meanwhile: that is no reason to give up
                attempt += 1
            if attempt == LOOKS:
                raise


def _look(repository: Repository, names: set[str], progress: Callable[[str, int, int], None]) -> View:
    verdicts = repository.verdicts.listed()
    forgotten = manifests_in(verdicts)
    present = repository.catalog.list_packs()
    index = repository.catalog.for_writer(present, ())
    reader = repository.reader(repository.catalog.current)
    lost: set[str] = set()  # forgotten backups that are damaged: nobody can use them
    while True:
        live = LiveSet(index)
        backups: dict[bytes, str] = {}
        for number, name in enumerate(sorted(names - forgotten)):
            progress("mark", number, len(names))
            manifest = _read(repository, name)
            if manifest is not None:
                _add(live, reader, manifest, backups)
        _refuse_missing(live, backups)
        try:
            # Forgotten ones still count: somebody who looked before may be at work with them.
            for name in sorted((names & forgotten) - lost):
                damaged = name
                manifest = _read(repository, name)
                if manifest is not None:
                    _add(live, reader, manifest, backups)
        except RepositoryCorrupt as reason:
            log.warning("%s: a forgotten backup is damaged: %s", repository.storage.place, reason)
            lost.add(damaged)
            continue
        live.finish()
        sound = frozenset(repository.catalog.covered(damaged=False) & present.keys())
        return View(frozenset(names), present, frozenset(packs_in(verdicts)), sound, live, reader)


def _read(repository: Repository, name: str) -> Manifest | None:
    try:
        return repository.read_manifest(name)
    except FileNotFoundError:
        return None  # it was forgotten, and is gone since the listing


def _add(live: LiveSet, reader: ChunkReader, manifest: Manifest, backups: dict[bytes, str]) -> None:
    for tree in manifest.trees():
        root = bytes.fromhex(tree)
        backups.setdefault(root, manifest.id)
        try:
            live.add_tree(reader, root)
        except RepositoryCorrupt as reason:
            raise RepositoryCorrupt(f"backup {manifest.id}: {reason}; nothing was removed") from reason


def _refuse_missing(live: LiveSet, backups: dict[bytes, str]) -> None:
    live.finish()
    if not live.missing_count:
        return
    name, _, root = live.missing[0]
    affected = sorted({backups[found] for _, _, found in live.missing})
    raise RepositoryCorrupt(
        f"{live.missing_count} chunks of {_some(affected)} are in no pack, among them {name.hex()} of tree "
        f"{root.hex()}; nothing was removed. `vmbackupctl verify` tells what is damaged; forget those backups if they "
        "cannot be mended"
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more backups" if len(names) > 5 else "")
