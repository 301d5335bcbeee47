"""Recovery: undo what the jobs of a dead daemon, or undos that failed, left on guests and host.

A thaw that could not be confirmed is tried until it is: a freeze that we gave up goes on in the guest agent. It may be
waiting for a hook of the administrator's, and takes effect when that ends.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vmbackupd.errors import BackupError, NotFound, NotRunning
from vmbackupd.hypervisor.base import Hypervisor
from vmbackupd.job import undo
from vmbackupd.job.context import to_the_end
from vmbackupd.job.journal import Journal, JournalCorrupt, look

log = logging.getLogger("job.recovery")

THAW_PAUSES = (1.0, 2.0, 5.0)  # seconds between two tries, the last one from then on


def pending_journals(directory: Path, running: Collection[str] = ()) -> list[Path]:
    """Journals of jobs that are not ``running``, oldest first."""
    if not directory.is_dir():
        return []
    paths = [path for path in directory.glob("*.jsonl") if path.stem not in running]
    return sorted(paths, key=lambda path: path.stat().st_mtime)


@dataclass(frozen=True, slots=True)
class FailedUndo:
    """An undo that could not be made, and why. It stays in its journal for the next try."""

    undo: str
    error: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the recovery of one job did."""

    job: str
    vm: str
    undone: tuple[str, ...]
    failed: tuple[FailedUndo, ...]

    def to_dict(self) -> dict[str, object]:
        return {
            "job": self.job,
            "vm": self.vm,
            "undone": list(self.undone),
            "failed": [{"undo": item.undo, "error": item.error} for item in self.failed],
        }


async def recover(hypervisor: Hypervisor, path: Path) -> Recovered:
    """Undo what one journal holds."""
    try:
        journal = Journal.load(path)
    except (JournalCorrupt, OSError) as error:
        log.error("%s", error)
        return Recovered(path.stem, "", (), (FailedUndo("journal", str(error)),))
    header = journal.header
    ctx = undo.UndoContext(hypervisor, header.job, header.vm, header.uuid)
    try:
        task, cancelled = await to_the_end(undo.unwind(ctx, journal))
        unwound = task.result()
    finally:
        journal.close()
    log.info(
        "VM %s: recovered job %s: %d undone, %d failed", header.vm, header.job, len(unwound.undone), len(unwound.failed)
    )
    if cancelled:
        raise asyncio.CancelledError
    failed = tuple(FailedUndo(name, str(error)) for name, error in unwound.failed)
    return Recovered(header.job, header.vm, tuple(unwound.undone), failed)


async def recover_all(hypervisor: Hypervisor, directory: Path, running: Collection[str] = ()) -> list[Recovered]:
    """Recover every journal of a job that is not running."""
    return [await recover(hypervisor, path) for path in pending_journals(directory, running)]


def unthawed(directory: Path, running: Collection[str] = ()) -> dict[str, str]:
    """VMs that a job which is not ``running`` froze and nobody has seen thawed since: uuid → name."""
    found = {}
    for path in pending_journals(directory, running):
        with suppress(JournalCorrupt, OSError):  # whoever recovers it says so
            header, pending = look(path)
            if any(entry.undo == "thaw" for entry in pending):
                found[header.uuid] = header.vm
    return found


async def thaw(ctx: undo.UndoContext) -> None:
    """Thaw a guest as soon as its agent answers, however long that takes. One that is off is not frozen."""
    for number in itertools.count():
        try:
            await undo.thaw(ctx, {})
            return
        except (NotRunning, NotFound):
            return
        except (BackupError, OSError, TimeoutError) as error:
            if number == 0:
                log.warning("VM %s: it is not known to be thawed (%s): tried until the agent answers", ctx.vm, error)
        await asyncio.sleep(THAW_PAUSES[min(number, len(THAW_PAUSES) - 1)])


def journals_of(directory: Path, uuid: str, running: Collection[str] = ()) -> list[Path]:
    """Journals left on the VM ``uuid``. One that cannot be read may be anybody's, and is counted in."""
    found = []
    for path in pending_journals(directory, running):
        try:
            header, _ = look(path)
        except (JournalCorrupt, OSError):
            found.append(path)
            continue
        if header.uuid == uuid:
            found.append(path)
    return found
