"""What comes out of a guest: the COW store on its scratch disk, the helper's messages, NBD replies."""

from __future__ import annotations

import json
import random
import socket
import struct
import threading
from typing import Any

from tests.engine.stores import make_store, room_for
from tests.fuzz.objects import as_json
from tests.unit.guest.test_guest_report import sample as report_sample
from vmbackupd.engine.copyloop import Progress, copy_in
from vmbackupd.engine.cowstore import CowStore
from vmbackupd.engine.memory import MemorySink
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.errors import GuestHelperUnavailable, GuestProtocolError, SourceError, StoreCorrupt
from vmbackupd.guest import replies, report
from vmbackupd.guest.hello import Hello
from vmbackupd.typed import parse_object


def run_cowstore(data: bytes) -> None:
    """A store: what is accepted breaks no rule that the revert relies on."""
    if len(data) < 2:
        return
    origin, data = int.from_bytes(data[:2], "little") * 4096, data[2:]
    try:
        store = CowStore(lambda offset, length: data[offset : offset + length], len(data), origin)
        pairs = list(store.exceptions())
    except StoreCorrupt:
        return
    assert len(pairs) == store.count
    assert len({old for old, _ in pairs}) == len(pairs)
    for old, new in pairs:
        assert old * store.chunk_size < origin and (new + 1) * store.chunk_size <= len(data)


def seeds_cowstore() -> list[bytes]:
    rng = random.Random(1)
    found = []
    for count, chunk in ((0, 512), (3, 512), (40, 512), (5, 4096)):
        olds = rng.sample(range(100), count)
        store, _ = make_store(olds, chunk, room_for(count, chunk), rng)
        found.append(b"\xff\xff" + store)
    return found


def run_helper(data: bytes) -> None:
    """A message of the helper, as an answer to each method, and as the answer to a hello."""
    data = as_json(data, SAMPLES_HELPER)
    hello = Hello()
    hello._nonce = b"nonce"
    try:
        hello.look(data)
    except (GuestProtocolError, GuestHelperUnavailable):
        pass
    try:
        message = parse_object(data, what="message", max_length=1 << 20, error=GuestProtocolError)
    except (GuestProtocolError, GuestHelperUnavailable):
        return
    for parse in (
        replies.parse_identity,
        lambda message: replies.parse_prepared(message, {"253:0": 4096}),
        replies.parse_snap,
        replies.parse_status,
        lambda message: replies.parse_tracked(message, ["8:0"]),
        replies.parse_collected,
        report.parse_report,
    ):
        try:
            parse(message)
        except (GuestProtocolError, GuestHelperUnavailable):
            pass


def samples_helper() -> list[dict[str, Any]]:
    """What a helper answers to each method."""
    table = [[0, 2048, "linear", "8:0 0"]]
    prepared = {
        "device": "253:0", "name": "root", "size": 1 << 20, "store_offset": 0, "store_length": 4096, "table": table,
    }  # fmt: skip
    status = {"device": "253:0", "valid": True, "allocated": 1, "total": 8, "metadata": 1, "table_ok": True}
    return [
        report_sample(),
        {"helper": "1", "boot_id": "x", "kernel": "6.1", "python": "3.11", "pid": 1},
        {"volumes": [prepared]},
        {"t1": 1.5, "suspend_ms": 1.0, "resume_ms": 1.0},
        {"boot_id": "x", "volumes": [status]},
        {"disks": [{"device": "8:0", "tracking": True, "generation": "x", "reason": ""}]},
        {"chunks": 1, "seconds": 1.5, "reason": ""},
    ]


SAMPLES_HELPER = samples_helper()


def seeds_helper() -> list[bytes]:
    texts = [json.dumps(message).encode() for message in SAMPLES_HELPER]
    edits = [b"E" + bytes([sample, place, 1, 7 * place]) for sample in range(7) for place in range(12)]
    return [*texts, *edits, b"VMBK1 nonce 1\n"]


def run_nbd(data: bytes) -> None:
    """A server that says what the fuzzer wants; all of it lies in the socket before we ask anything. It hangs up soon,
    but not at once: libnbd would notice that before we had looked at the answers."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.setblocking(False)
        try:
            theirs.send(data[: 1 << 18])
        except BlockingIOError:
            return
        hang_up = threading.Timer(0.03, theirs.shutdown, [socket.SHUT_WR])
        hang_up.start()
        try:
            with NbdConnection(fd=ours.fileno(), timeout=1, stall_timeout=1) as connection:
                size = min(connection.size, 1 << 20)
                if size:
                    copy_in(connection, MemorySink(size, 4096), Progress(), in_flight=4, request=65536)
        except SourceError:
            pass
        finally:
            hang_up.cancel()
            hang_up.join()


def seeds_nbd() -> list[bytes]:
    magic = struct.pack(">Q", 0x3E889045565A9)

    def option(number: int, kind: int, data: bytes = b"") -> bytes:
        return magic + struct.pack(">III", number, kind, len(data)) + data

    greeting = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
    structured = option(8, 1)
    export = struct.pack(">HQH", 0, 16384, 0x8001 | 1)
    context = option(10, 4, struct.pack(">I", 1) + b"base:allocation") + option(10, 1)
    go = option(7, 3, export) + option(7, 3, struct.pack(">HIII", 3, 1, 4096, 65536)) + option(7, 1)

    def chunk(flags: int, kind: int, cookie: int, data: bytes) -> bytes:
        return struct.pack(">IHHQI", 0x668E33EF, flags, kind, cookie, len(data)) + data

    status = chunk(1, 5, 1, struct.pack(">IIIII", 1, 4096, 0, 12288, 3))
    read = chunk(1, 1, 2, struct.pack(">Q", 0) + b"d" * 4096)
    hole = chunk(1, 2, 2, struct.pack(">QI", 0, 4096))
    trouble = chunk(1, 32769, 2, struct.pack(">IH", 5, 3) + b"bad")
    simple = struct.pack(">IIQ", 0x67446698, 0, 1) + b"d" * 16384
    start = greeting + structured + context + go
    return [
        start + status + read,
        start + status + hole,
        start + status + trouble,
        start,
        greeting + option(8, 0x80000001) + go + simple,
        greeting,
    ]
