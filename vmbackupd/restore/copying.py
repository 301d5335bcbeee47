"""All volumes' bytes, a few volumes at a time, each in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vmbackupd.engine.progress import Progress
from vmbackupd.errors import (
    BackupError,
    RepositoryCorrupt,
    SourceError,
    StorageError,
    StoreCorrupt,
    TargetError,
)
from vmbackupd.repository import Repository
from vmbackupd.repository.manifest import Manifest
from vmbackupd.restore.targets import OpenTarget
from vmbackupd.restore.volume import Written, write_volume

INTERVAL = 0.2  # seconds between looks at the engine's counters
PARALLEL = 3  # volumes; each has requests in flight of its own, and decompression is what keeps a core busy

_NAMED = (SourceError, TargetError, RepositoryCorrupt, StorageError, StoreCorrupt)


async def write_volumes(repository: Repository, manifest: Manifest, targets: Sequence[OpenTarget], vm: str,
                        report: Callable[[int, int], None]) -> dict[str, Written]:
    """Write every volume; returns what was written by volume id.

    ``report(done, total)`` in bytes. An error or a cancellation stops all copies and waits for their threads.
    """
    counters = {target: Progress(target.plan.size) for target in targets}
    total = sum(target.plan.size for target in targets)
    free = asyncio.Semaphore(PARALLEL)

    async def write(target: OpenTarget) -> Written:
        async with free:
            return await asyncio.to_thread(_named, repository, manifest, target, counters[target], vm)

    tasks = {target.plan.record.id: asyncio.create_task(write(target)) for target in targets}
    pending = set(tasks.values())
    try:
        while pending:
            done, pending = await asyncio.wait(pending, timeout=INTERVAL, return_when=asyncio.FIRST_EXCEPTION)
            report(sum(min(counter.bytes_done, target.plan.size) for target, counter in counters.items()), total)
            for task in done:
                task.result()
    except BaseException:
        for counter in counters.values():
            counter.cancel()
        await _settle(pending)
        raise
    return {volume: task.result() for volume, task in tasks.items()}


def _named(repository: Repository, manifest: Manifest, target: OpenTarget, progress: Progress, vm: str) -> Written:
    """Write one volume; an error of the engine or the repository gets the names a person knows."""
    try:
        return write_volume(repository, manifest, target.plan, target, progress)
    except _NAMED as error:
        kind: type[BackupError] = type(error)
        plan = target.plan
        raise kind(f"VM {vm}: volume {plan.record.id} was not restored to {plan.target}: {error}") from error


async def _settle(tasks: set[asyncio.Task[Written]]) -> None:
    """Wait for the threads, however often this task is cancelled meanwhile: they still write to the targets."""
    while tasks:
        try:
            done, tasks = await asyncio.wait(tasks)
        except asyncio.CancelledError:
            continue
        for task in done:
            if not task.cancelled():
                task.exception()  # retrieved; the first error is the one that counts
