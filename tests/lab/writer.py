"""The oracle's pen: writes numbered, checksummed records to several logs in turn, each durable before the next is
begun.

Runs in a guest with its Python's standard library alone (3.7 or later); the host imports ``check`` and ``check_churn``.
In round N, log by log: one 4 KiB block of ``LOG.churn`` is overwritten in place (work for a COW store), then record N
is appended to ``LOG`` and fsynced. So whenever all disks are cut at one instant, the logs end within one record of each
other, and each churn file holds exactly what its log says.

    writer.py [--rounds N] [--interval SECONDS] LOG...     write; until SIGTERM or for N rounds
    writer.py --check LOG...                               verify; prints {"LOG": {"last": N, "torn": false}, ...}
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import struct
import sys
import time
import zlib
from collections.abc import Mapping
from typing import NamedTuple

RECORD = 512
BLOCK = 4096
CHURN_BLOCKS = 1024
HEAD = struct.Struct("<8sIQd")
"""magic, index of the log (or of the churn block's log), number of the record, time.time()."""


class WriterError(Exception):
    """A log or churn file holds what the writer never wrote there."""


class Log(NamedTuple):
    """What a log tells: records 1 to ``last`` are whole; ``torn``: something that is no whole record follows; ``time``
    of the last, Unix seconds.
    """

    last: int
    torn: bool
    time: float


def sealed(magic: bytes, index: int, number: int, when: float, size: int) -> bytes:
    """A record or block of ``size`` bytes whose whole content follows from its head, with a CRC-32 at its end."""
    head = HEAD.pack(magic, index, number, when)
    seed = hashlib.sha256(b"%d %d" % (index, number)).digest()
    body = head + (seed * (size // 32 + 1))[: size - HEAD.size - 4]
    return body + struct.pack("<I", zlib.crc32(body))


def _whole(data: bytes, magic: bytes) -> tuple[int, int, float] | None:
    """``(index, number, time)`` of a record or block that is exactly as written, else None."""
    found, index, number, when = HEAD.unpack_from(data)
    if found != magic or data != sealed(magic, index, number, when, len(data)):
        return None
    return index, number, when


def record(index: int, number: int, when: float) -> bytes:
    """Record ``number`` of log ``index``."""
    return sealed(b"VMBKREC1", index, number, when, RECORD)


def block(index: int, number: int, when: float) -> bytes:
    """What round ``number`` writes into churn block ``churn_block(number)``."""
    return sealed(b"VMBKCHN1", index, number, when, BLOCK)


def churn_block(number: int) -> int:
    """Which block of the churn file round ``number`` overwrites: scattered, each in turn."""
    return number * 389 % CHURN_BLOCKS


def check(data: bytes, index: int | None = None) -> Log:
    """Verify a log's content. Only its very end may be torn. Raises WriterError for anything else that was not written
    so.
    """
    last, when = 0, 0.0
    for at in range(0, len(data), RECORD):
        piece = data[at : at + RECORD]
        found = _whole(piece, b"VMBKREC1") if len(piece) == RECORD else None
        if found is None:
            if at + RECORD < len(data):
                raise WriterError(
                    f"record {last + 1} at byte {at} is damaged, and {len(data) - at - RECORD} bytes follow it"
                )
            return Log(last, True, when)
        if found[1] != last + 1 or (index is not None and found[0] != index):
            raise WriterError(
                f"at byte {at}: record {found[1]} of log {found[0]}, not record {last + 1} of log {index}"
            )
        last, when = found[1], found[2]
    return Log(last, False, when)


def check_churn(data: bytes, last: int) -> None:
    """Verify a churn file against its log's last record: each block as of round ``last``, save one that may be of
    ``last + 1``.
    """
    if len(data) != CHURN_BLOCKS * BLOCK:
        raise WriterError(f"a churn file of {len(data)} bytes")
    newest: dict[int, int] = {
        churn_block(number): number for number in range(max(1, last - CHURN_BLOCKS + 1), last + 1)
    }
    for position in range(CHURN_BLOCKS):
        piece = data[position * BLOCK : (position + 1) * BLOCK]
        expected = newest.get(position, 0)
        found = _whole(piece, b"VMBKCHN1")
        if found is None and not any(piece):
            number = 0
        elif found is None:
            raise WriterError(f"churn block {position} is damaged")
        else:
            number = found[1]
        if number != expected and not (number == last + 1 and churn_block(number) == position):
            raise WriterError(
                f"churn block {position} is of round {number}, should be of {expected} (the log ends with {last})"
            )


def check_together(logs: Mapping[str, Log]) -> None:
    """Verify that logs, in the order in which they are written, were cut at one instant. Raises WriterError naming them
    all.
    """
    numbers = [log.last for log in logs.values()]
    if numbers != sorted(numbers, reverse=True) or (numbers and numbers[0] - numbers[-1] > 1):
        raise WriterError(f"the logs are of different instants: { ({name: log.last for name, log in logs.items()}) }")


def write(paths: list[str], rounds: int, interval: float) -> None:
    """Start new logs and write until SIGTERM, or for ``rounds`` rounds if that is not 0."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    files = []
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        churn = os.open(path + ".churn", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        for _ in range(CHURN_BLOCKS * BLOCK >> 20):
            os.write(churn, bytes(1 << 20))
        os.fsync(churn)
        files.append((os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644), churn))
    number = 0
    while not stop and (not rounds or number < rounds):
        number += 1
        for index, (log, churn) in enumerate(files):
            now = time.time()
            os.pwrite(churn, block(index, number, now), churn_block(number) * BLOCK)
            os.write(log, record(index, number, now))
            os.fsync(log)
        if interval:
            time.sleep(interval)


def main() -> int:
    """The command line described above; the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("logs", nargs="+")
    options = parser.parse_args()
    if not options.check:
        write(options.logs, options.rounds, options.interval)
        return 0
    result = {}
    for index, path in enumerate(options.logs):
        with open(path, "rb") as log, open(path + ".churn", "rb") as churn:
            found = check(log.read(), index)
            check_churn(churn.read(), found.last)
        result[path] = found
    check_together(result)
    print(json.dumps({path: log._asdict() for path, log in result.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
