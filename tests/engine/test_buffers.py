"""Aligned buffers."""

from __future__ import annotations

import pytest

from vmbackupd.engine.buffers import AlignedBuffer, BufferPool


@pytest.mark.parametrize("size", [1, 4095, 4096, 65536, 1 << 20])
def test_a_buffer_is_zeroed_and_writable(size: int) -> None:
    buffer = AlignedBuffer(size)
    view = memoryview(buffer)
    assert len(buffer) == len(view) == size and not view.readonly
    assert not any(bytes(view))
    view[-1] = 7
    assert bytes(buffer)[-1] == 7


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(MemoryError):
        AlignedBuffer(0)
    with pytest.raises(MemoryError):
        AlignedBuffer(1 << 60)
    for size, count in [(0, 1), (1, 0), (1 << 41, 1), (1, 1 << 21)]:
        with pytest.raises(ValueError, match="no pool"):
            BufferPool(size, count)


def test_a_pool_counts() -> None:
    pool = BufferPool(1000, 4)
    assert (pool.buffer_size, pool.count, pool.available) == (1000, 4, 4)
