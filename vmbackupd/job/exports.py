"""What the guest helper serves on the job's data port, one connection after the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import GuestProtocolError
from vmbackupd.guest.client import open_data_channel
from vmbackupd.job.context import BackupContext
from vmbackupd.units import MiB

CONNECT_DEADLINE = 120.0
"""Seconds: a guest whose storage stalls (a path that fails over takes half a minute) does nothing else meanwhile."""


@asynccontextmanager
async def export(ctx: BackupContext, name: str, size: int) -> AsyncIterator[NbdConnection]:
    """A connection to the export ``name``, which has to have ``size`` bytes.

    Raises ``GuestHelperUnavailable``, ``SourceError``, ``GuestProtocolError``.
    """
    channel = await open_data_channel(ctx.data_socket, timeout=CONNECT_DEADLINE)
    with channel:  # the connection has its own duplicate
        source = await asyncio.to_thread(NbdConnection, fd=channel.fileno(), export=name, timeout=CONNECT_DEADLINE)
    try:
        if source.size != size:
            raise GuestProtocolError(f"VM {ctx.vm}: the helper serves {name} with {source.size} bytes, not {size}")
        yield source
    finally:
        await asyncio.to_thread(source.close)


async def bitmap(ctx: BackupContext, name: str, chunks: int) -> Bitmap:
    """The bitmap that the export ``name`` holds, one bit for each of ``chunks``."""
    async with export(ctx, name, -(-chunks // 8)) as source:
        return await asyncio.to_thread(_read, source, chunks)


def _read(source: NbdConnection, chunks: int) -> Bitmap:
    parts = [source.pread(at, min(MiB, source.size - at)) for at in range(0, source.size, MiB)]
    return Bitmap.from_bytes(b"".join(parts), chunks)
