"""Garbage collection: what no backup needs is condemned, and removed when nobody is left who could rely on it.

Any number of collectors, writers and readers may be at work at once, on any hosts. Why that is safe is argued in
docs/format.md, "Order of writing, and who may remove what"; the order of the steps here is that argument's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmbackupd.engine.index import IndexSet
from vmbackupd.errors import ObjectLocked, RepositoryCorrupt, RepositoryFull
from vmbackupd.repository import sessions
from vmbackupd.repository.catalog import pack_name
from vmbackupd.repository.condemned import manifests_in
from vmbackupd.repository.copier import Copier
from vmbackupd.repository.forget import remove_manifests
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.keys import KEYS
from vmbackupd.repository.live import View, look
from vmbackupd.repository.sessions import SESSION_ID
from vmbackupd.repository.settle import MANIFESTS

if TYPE_CHECKING:
    from vmbackupd.engine.liveset import Record
    from vmbackupd.repository.repository import Repository

log = logging.getLogger(__name__)

THRESHOLD = 0.5
SLACK = 0.1
BATCH = 500  # packs that are removed at once
DEAD = "nothing in them is needed"
SPARSE = "little in them is needed"

Progress = Callable[[str, int, int], None]


@dataclass
class GcResult:
    """What was done, or with ``dry_run`` would be; sizes in bytes.

    ``condemned_packs``: found unneeded, or little needed, now; ``reasons``: the same by reason; ``removed_packs`` and
    ``freed_bytes``: packs that are gone now, and their bytes; ``repacked_bytes``: what was written again of them;
    ``waiting_packs``: condemned packs that stay for now, because of the sessions ``waiting_for``; ``damaged_packs``:
    ids of those that stay because something that is needed of them cannot be read; ``locked_packs``: those that the
    store does not let go before ``locked_until`` (seconds since 1970), when a ``gc`` removes them; ``locks_renewed``:
    objects of backups that stay whose object lock lasts anew.
    """

    condemned_packs: int = 0
    removed_packs: int = 0
    freed_bytes: int = 0
    repacked_bytes: int = 0
    waiting_packs: int = 0
    waiting_for: list[str] = field(default_factory=list)
    damaged_packs: list[str] = field(default_factory=list)
    locked_packs: int = 0
    locked_until: float | None = None
    locks_renewed: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    dry_run: bool = False


class Collector:
    """One collection."""

    def __init__(
        self, repository: Repository, *, threshold: float, slack: float, progress: Progress | None = None
    ) -> None:
        """Use ``Repository.gc``."""
        self._repository = repository
        self._storage = repository.storage
        self._catalog = repository.catalog
        self._verdicts = repository.verdicts
        self._threshold = threshold
        self._slack = slack
        self._progress = progress or (lambda step, done, total: None)
        self._full: RepositoryFull | None = None
        self.result = GcResult()

    def run(self, *, dry_run: bool) -> GcResult:
        """Collect. RepositoryFull only after everything was removed that needs no room."""
        self.result.dry_run = dry_run
        if not dry_run:
            self._progress("settle", 0, 0)
            self.result.freed_bytes += self._repository.clean_up()
            self._verdicts.remove_orphans()
            for verdict in self._verdicts.listed():
                if verdict.manifests:
                    try:
                        remove_manifests(self._repository, verdict)
                    except ObjectLocked as reason:
                        self._locked(reason)
        self._repository.rebuild_index()
        at_work = sessions.listed(self._storage, self._repository.header, details=False).keys()
        view = look(self._repository, self._progress)
        dead, sparse, used = self._choose(view, at_work)
        if dry_run:
            self._foretell(view, dead, sparse)
            return self.result
        self._condemn(dead, DEAD)
        view = self._sweep(view)
        if sparse and self._full is None:
            index = self._repository.reliable_index(without=sparse)
            self._copy(view, sparse, view.present, index)
            if self._full is None:
                self._condemn(sparse, SPARSE)
                self._sweep(view)
        self._drop_gone()
        self._renew_locks(view, used)
        self._tell_waiting()
        if self._full is not None:
            raise self._full
        return self.result

    # ---- choosing

    def _choose(self, view: View, at_work: Collection[bytes]) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Packs of which nothing is needed, packs that are worth repacking, and those that stay. A wrong choice costs
        work, no data."""
        # What a session is about to publish looks unneeded until then.
        usable = {pack for pack in view.sound - view.condemned if pack[:SESSION_ID] not in at_work}
        usage = view.live.pack_usage(usable)
        dead = sorted(pack for pack, (live, _, _, _) in usage.items() if not live)
        used = {pack: (live, size) for pack, (count, _, live, size) in usage.items() if count}
        wasted = sum(size - live for live, size in used.values())
        stored = sum(size for _, size in used.values())
        sparse = []
        for pack, (live, size) in sorted(used.items(), key=lambda item: (item[1][0] / item[1][1], item[0])):
            share = 1 - live / size
            if share <= self._threshold and (wasted <= self._slack * stored or not share):
                break
            sparse.append(pack)
            wasted -= size - live
            stored -= size - live
        return dead, sparse, sorted(used.keys() - set(sparse))

    def _foretell(self, view: View, dead: Sequence[bytes], sparse: Sequence[bytes]) -> None:
        usage = view.live.pack_usage([*dead, *sparse])
        self._count(dead, DEAD)
        self._count(sparse, SPARSE)
        self.result.removed_packs = len(dead) + len(sparse)
        self.result.repacked_bytes = sum(usage[pack][2] for pack in sparse)
        self.result.freed_bytes = sum(view.present[pack] for pack in (*dead, *sparse))
        self._tell_waiting()

    def _condemn(self, packs: Sequence[bytes], reason: str) -> None:
        if packs:
            self._repository.condemn(packs, reason=reason)
            self._count(packs, reason)

    def _count(self, packs: Sequence[bytes], reason: str) -> None:
        self.result.condemned_packs += len(packs)
        if packs:
            self.result.reasons[reason] = self.result.reasons.get(reason, 0) + len(packs)

    # ---- removing

    def _sweep(self, view: View) -> View:
        """Carry out the verdicts for which nobody has to be waited for any more."""
        standing = [verdict for verdict in self._verdicts.listed() if verdict.packs]
        ready = [verdict for verdict in standing if not self._verdicts.outlived(verdict)]
        if not ready:
            return view
        # The manifests are listed after the sessions that had to end were found gone: what these published is seen.
        view = look(self._repository, self._progress, view)
        # Verdicts, packs and indexes are listed after ours stand: another collector that relies on our packs sees that
        # they are condemned, or we see that its are.
        index = self._repository.reliable_index()
        here = self._catalog.list_packs()
        packs = sorted({pack for verdict in ready for pack in verdict.packs if pack in here})
        free: list[bytes] = []
        rest: list[bytes] = []
        for number, pack in enumerate(packs):
            self._progress("look into packs", number, len(packs))
            (free if self._needed(view, pack, here[pack], index) == [] else rest).append(pack)
        removed = self._remove(free, here)
        removed |= self._remove(self._copy(view, rest, here, index), here)
        for verdict in ready:
            if verdict.packs & here.keys() <= removed:
                self._verdicts.carried_out(verdict)
        return view

    def _needed(self, view: View, pack: bytes, size: int, index: IndexSet) -> list[Record] | None:
        """What a pack holds that is live and that ``index`` finds nowhere else; None if nobody knows what it holds."""
        try:
            live: Iterable[Record] = view.live.live_among(self._catalog.own_entries(pack, size)[0])
        except FileNotFoundError:
            return []
        except RepositoryCorrupt:
            if pack not in view.sound:
                return None
            live = view.live.live_entries(pack)  # the index remembers what the pack itself does not tell any more
        return [record for record in live if index.lookup(record[0]) is None]

    def _copy(self, view: View, packs: Sequence[bytes], sizes: Mapping[bytes, int], index: IndexSet) -> list[bytes]:
        """Copy what is live in these packs and in none that ``index`` finds to new ones; the packs that are not needed
        any more. None where there is no room for the copies."""
        done: list[bytes] = []
        with Copier(self._repository, view.reader) as copier:
            try:
                for number, pack in enumerate(packs):
                    self._progress("copy", number, len(packs))
                    # one that is gone since it was chosen was somebody else's choice, too
                    needed = self._needed(view, pack, sizes[pack], index) if pack in sizes else []
                    if needed is not None and all(copier.copy(name, kind) for name, kind, _, _, _ in needed):
                        done.append(pack)
                    elif pack.hex() not in self.result.damaged_packs:
                        self.result.damaged_packs.append(pack.hex())
                copier.finish()
            except RepositoryFull as reason:
                self._full = reason
                return []
        self.result.repacked_bytes += copier.bytes_copied
        return done

    def _remove(self, packs: Sequence[bytes], here: dict[bytes, int]) -> set[bytes]:
        """Remove packs; those that are gone now. The verdict on one that the store has locked goes on to stand."""
        gone: set[bytes] = set()
        for first in range(0, len(packs), BATCH):
            self._progress("remove", first, len(packs))
            gone |= self._remove_batch(packs[first : first + BATCH])
        self.result.removed_packs += len(gone)
        self.result.freed_bytes += sum(here[pack] for pack in gone)
        return gone

    def _drop_gone(self) -> None:
        """Also what a collector that was killed, or a merge that began before packs were removed, left in indexes."""
        try:
            self._catalog.drop_gone()
        except RepositoryFull as reason:  # entries of packs that are gone hurt nobody
            log.warning("%s: the indexes are not made smaller: %s", self._storage.place, reason)

    def _renew_locks(self, view: View, packs: Iterable[bytes]) -> None:
        """A backup can rely on packs much older than itself: their object locks must not end before its own."""
        objects = [HEADER_NAME, *(info.name for info in self._storage.list(f"{KEYS}/"))]
        forgotten = manifests_in(self._verdicts.listed())
        objects += [f"{MANIFESTS}/{name}" for name in sorted(view.names - forgotten)]
        objects += [pack_name(pack) for pack in packs]
        self._progress("renew locks", 0, len(objects))
        self.result.locks_renewed = self._storage.renew(objects)

    def _remove_batch(self, packs: Sequence[bytes]) -> set[bytes]:
        try:
            self._storage.delete_many([pack_name(pack) for pack in packs])
            return set(packs)
        except ObjectLocked:
            pass  # some of them: which ones is told one by one
        gone: set[bytes] = set()
        for pack in packs:
            try:
                self._storage.delete(pack_name(pack))
                gone.add(pack)
            except ObjectLocked as reason:
                self._locked(reason)
                self.result.locked_packs += 1
        return gone

    def _locked(self, reason: ObjectLocked) -> None:
        log.debug("%s", reason)
        if reason.until is not None:
            self.result.locked_until = max(reason.until, self.result.locked_until or 0.0)

    def _tell_waiting(self) -> None:
        """Whom the verdicts that still stand wait for."""
        present = self._catalog.pack_ids()
        waiting: set[bytes] = set()
        holders: set[str] = set()
        for verdict in self._verdicts.listed():
            names = self._verdicts.holders(verdict)
            if names:
                waiting |= verdict.packs & present
                holders.update(names)
        self.result.waiting_packs = len(waiting)
        self.result.waiting_for = sorted(holders)
