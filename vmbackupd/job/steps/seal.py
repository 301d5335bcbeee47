"""Seal: the manifest is published last, atomically: a backup exists whole or not at all."""

from __future__ import annotations

import asyncio
import secrets
import time

import vmbackupd
from vmbackupd.job.context import BackupContext, Captured
from vmbackupd.model import Consistency, RevertMode, VolumeRecord
from vmbackupd.repository.manifest import Manifest


async def run(ctx: BackupContext) -> None:
    """Publish the manifest; ``ctx.manifest`` is what was published."""
    assert ctx.writer is not None
    ctx.manifest = manifest(ctx)
    writer, ctx.writer = ctx.writer, None
    try:
        await asyncio.to_thread(writer.publish, ctx.manifest)
    except BaseException:
        await asyncio.to_thread(writer.abort)
        raise


def manifest(ctx: BackupContext) -> Manifest:
    """The evidence of this backup: what was captured, when, how, and what was not."""
    raise NotImplementedError
