"""Looking at what a target holds."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbackupd.restore.existing import HEAD, PIECE, TAIL, describe_data, first_data, first_file_data, probe_ranges
from vmbackupd.units import GiB, KiB, MiB, TiB


@given(st.one_of(st.integers(0, 64 * MiB), st.integers(0, 16 * TiB)))
def test_probes_are_sorted_disjoint_and_inside(size: int) -> None:
    at = 0
    for offset, length in probe_ranges(size):
        assert offset >= at and length > 0
        at = offset + length
    assert at == size  # the end is always looked at
    assert sum(length for _, length in probe_ranges(size)) <= HEAD + TAIL + 64 * PIECE


def test_a_small_target_is_read_whole() -> None:
    assert list(probe_ranges(5 * MiB)) == [(0, 5 * MiB)]


def sparse(path: Path, size: int, *pieces: tuple[int, bytes]) -> int:
    with open(path, "wb") as file:
        file.truncate(size)
        for offset, data in pieces:
            file.seek(offset)
            file.write(data)
    return os.open(path, os.O_RDONLY)


def test_one_byte_anywhere_in_a_file_is_found(tmp_path: Path) -> None:
    dice = random.Random(7)
    for _ in range(20):
        at = dice.randrange(GiB)
        fd = sparse(tmp_path / "x", GiB, (at, b"!"))
        try:
            # allocation comes in blocks of the filesystem, and only the first piece of an extent is read
            assert first_file_data(fd, GiB) is not None
        finally:
            os.close(fd)


def test_zeros_are_no_data_allocated_or_not(tmp_path: Path) -> None:
    fd = sparse(tmp_path / "x", GiB, (100 * MiB, bytes(MiB)))
    try:
        assert first_file_data(fd, GiB) is None
    finally:
        os.close(fd)


def test_the_edges_of_a_device_are_looked_at() -> None:
    size = 8 * GiB
    for offset in (0, HEAD - 1, size - TAIL, size - 1):
        def read(start: int, length: int, at: int = offset) -> bytes:
            data = bytearray(length)
            if start <= at < start + length:
                data[at - start] = 1
            return bytes(data)

        assert first_data(read, size) is not None


@pytest.mark.parametrize(("offset", "magic", "words"), [
    (0, b"QFI\xfb", "qcow2"), (0x438, b"\x53\xef", "ext"), (512, b"LABELONE", "LVM"), (512, b"EFI PART", "GPT"),
    (510, b"\x55\xaa", "boot sector"), (100, b"?", "data"),
])
def test_what_is_there_is_named(offset: int, magic: bytes, words: str) -> None:
    head = bytearray(256 * KiB)
    head[offset:offset + len(magic)] = magic
    assert words in describe_data(bytes(head))
