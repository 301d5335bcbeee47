"""Reading a disk into its image: chunks that have to be, a sample of the others, and all if the sample says so."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass, replace

from vmbackupd.engine.audit import AuditSink
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.copyloop import Progress, copy_in
from vmbackupd.engine.image import ImageSink
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.job import audit, fleecing
from vmbackupd.job.bases import Base
from vmbackupd.job.context import BackupContext, Captured
from vmbackupd.job.coverage import DiskPlan
from vmbackupd.job.hashes import CHUNK
from vmbackupd.job.snapshots import require_valid
from vmbackupd.model import Change, ChangeRecord


@dataclass
class Reading:
    """A disk that is being read into ``sink``. ``changed`` are the chunks read because they had to be (all, without a
    base); ``suspect`` those that an audit found different though they were said to be unchanged."""

    plan: DiskPlan
    sink: ImageSink
    base: Base | None
    changed: Bitmap
    record: ChangeRecord
    suspect: Bitmap
    bytes_read: int = 0

    @property
    def chunks(self) -> int:
        return self.changed.length

    def captured(self, tree: str) -> Captured:
        """What the manifest will say of the disk, whose image is ``tree``."""
        change = replace(self.record, chunks=self.changed.count())
        return Captured(
            self.plan, tree=tree, bytes_read=self.bytes_read, bytes_stored=self.sink.bytes_stored, change=change
        )


def start(
    ctx: BackupContext, plan: DiskPlan, base: Base | None, changed: Bitmap | None, record: ChangeRecord
) -> Reading:
    """The reading of a disk of which ``changed`` may differ from ``base``; without a base everything is read."""
    assert ctx.writer is not None
    chunks = -(-plan.size // CHUNK)
    if base is None or changed is None:
        changed, sink = audit.whole(chunks), ctx.writer.image(plan.size)
    else:
        sink = ctx.writer.update(base.tree)
    unchanged = max(0, plan.size - changed.count() * CHUNK)
    ctx.observer.expect(max(ctx.observer.bytes_done, ctx.observer.bytes_total - unchanged))
    return Reading(plan, sink, base, changed, record, Bitmap(chunks))


async def read(ctx: BackupContext, reading: Reading, source: NbdConnection, only: Bitmap) -> None:
    """Read these chunks of the disk into its image."""
    await check(ctx)
    progress = Progress()
    work = functools.partial(copy_in, source, reading.sink, progress, only=only)
    await ctx.engine(progress, work, beside=functools.partial(check, ctx))
    reading.bytes_read += progress.bytes_read


async def inspect_unchanged(ctx: BackupContext, reading: Reading, source: NbdConnection) -> None:
    """Audit: read a sample of what is said to be unchanged; what differs is noted as suspect."""
    assert ctx.writer is not None
    sample = audit.sample(reading.changed, ctx.config.changes.audit)
    if reading.base is None or not sample.count():
        return
    sink, progress = AuditSink(ctx.writer.source(reading.base.tree)), Progress()
    await ctx.engine(progress, functools.partial(copy_in, source, sink, progress, only=sample))
    reading.bytes_read += progress.bytes_read
    reading.suspect = sink.missed
    reading.record = replace(reading.record, audited=sample.count())


async def distrust(ctx: BackupContext, reading: Reading, source: NbdConnection) -> None:
    """Where the audit found a difference: say so, and read everything that was not read yet."""
    missed = reading.suspect.count()
    if not missed:
        return
    assert reading.base is not None
    plan, record = reading.plan, reading.record
    why = (
        f"{missed} of {record.audited} chunks that {record.method} changes since {reading.base.backup} left out had "
        "changed: the record of changes is not to be trusted, and everything was read"
    )
    ctx.observer.warning(f"{plan.id}: {why}")
    rest = audit.whole(reading.chunks)
    rest.subtract(reading.changed)
    await read(ctx, reading, source, rest)
    reading.changed = audit.whole(reading.chunks)
    reading.record = replace(record, method=Change.FULL, reason=why, missed=missed)


async def check(ctx: BackupContext) -> None:
    """What has to hold while a disk is read: the guest's snapshots, from T1 until they are released, and room for what
    QEMU copies away while it serves disks."""
    if ctx.t1 and "snapshots" in ctx.entries:
        require_valid(ctx, await ctx.helper.status())
    if ctx.fleece:
        await asyncio.to_thread(fleecing.require_room, ctx)
