"""The helper's NBD server, asked by NBD's own tools and by hand, over files in place of disks."""

from __future__ import annotations

import asyncio
import hashlib
import json
import queue
import random
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.support import Relay, Start, listen
from vmbackupd.errors import GuestHelperError
from vmbackupd.guest.client import GuestHelper, open_data_channel
from vmbackupd.units import KiB, MiB

SIZE = 40 * MiB + 3 * KiB  # no multiple of a block
BLOCK = 64 * KiB


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Data, zeros and holes in runs of all lengths."""
    path = tmp_path / "disk.img"
    dice = random.Random(4)
    with open(path, "wb") as file:
        at = 0
        while at < SIZE:
            length = min(dice.choice([512, 4096, BLOCK, 3 * BLOCK, MiB, 5 * MiB]), SIZE - at)
            file.seek(at)
            file.write(dice.randbytes(length) if dice.random() < 0.4 else bytes(length))
            at += length
        file.truncate(SIZE)
    return path


@pytest.fixture
def data(tmp_path: Path, disk: Path, start_helper: Start) -> Iterator[str]:
    """The path of a data port on which ``disk`` is served as ``disk`` and ``/dev/full``'s end as ``short``."""
    short = tmp_path / "short.img"
    short.write_bytes(b"x" * MiB)
    path = tmp_path / "data"
    with listen(path) as sock:
        start_helper(keep=(sock.fileno(),))
        number = sock.fileno()

        async def serve() -> None:
            helper = await GuestHelper.reconnect(str(tmp_path / "control"), vm="vm", job="j01234567")
            await helper.serve(f"fd:{number}", {"disk": f"file:{disk}", "short": f"file:{short}"})
            await helper.close()

        asyncio.run(serve())
    short.write_bytes(b"x" * 300 * KiB)  # its end is gone: reads there fail
    yield str(path)


def connect(path: str) -> socket.socket:
    sock = asyncio.run(open_data_channel(path, timeout=20))
    sock.settimeout(20)
    return sock


@pytest.fixture
def relay(tmp_path: Path, data: str) -> Iterator[Relay]:
    with Relay(tmp_path / "nbd", lambda: connect(data)) as opened:
        yield opened


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_relay_carries_on_after_a_client_that_left_without_reading(tmp_path: Path) -> None:
    ends: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()

    def pair() -> socket.socket:
        ours, theirs = socket.socketpair()
        ends.put(ours)
        return theirs

    with Relay(tmp_path / "relay", pair) as relay:
        for _ in range(2):
            client = socket.socket(socket.AF_UNIX)
            client.connect(str(relay.path))
            with ends.get(timeout=20) as server:
                server.settimeout(20)
                server.sendall(b"x" * 1000)
                assert client.recv(1) == b"x"
                client.close()  # with 999 bytes unread: the other side gets a reset instead of an end
                assert server.recv(1) == b""


def test_nbdinfo(relay: Relay) -> None:
    info = json.loads(tool("nbdinfo", "--json", relay.uri % "disk"))
    export = info["exports"][0]
    assert export["export-size"] == SIZE
    assert (export["is_read_only"], export["can_df"]) == (True, True)
    assert "base:allocation" in export["contexts"]
    assert info["structured"] is True
    assert {
        item["export-name"] for item in json.loads(tool("nbdinfo", "--json", "--list", relay.uri % ""))["exports"]
    } == {"disk", "short"}


def test_map_is_exact(relay: Relay, disk: Path) -> None:
    content = disk.read_bytes()
    expected: list[list[int]] = []
    for at in range(0, SIZE, BLOCK):
        block = content[at : at + BLOCK]
        kind = 0 if block.strip(b"\0") else 3
        if expected and expected[-1][2] == kind:
            expected[-1][1] += len(block)
        else:
            expected.append([at, len(block), kind])
    found: list[list[int]] = []
    for item in json.loads(tool("nbdinfo", "--json", "--map", relay.uri % "disk")):
        if found and found[-1][2] == item["type"]:
            found[-1][1] += item["length"]
        else:
            found.append([item["offset"], item["length"], item["type"]])
    assert found == expected


@pytest.mark.parametrize(
    "options", [[], ["--no-extents"], ["--request-size=33554432", "--requests=8"], ["--synchronous"]]
)
def test_nbdcopy(relay: Relay, disk: Path, tmp_path: Path, options: list[str]) -> None:
    copy = tmp_path / "copy.img"
    tool("nbdcopy", *options, relay.uri % "disk", str(copy))
    assert copy.read_bytes() == disk.read_bytes()


def test_qemu_img(relay: Relay, disk: Path) -> None:
    tool("qemu-img", "compare", "-f", "raw", "-F", "raw", relay.uri % "disk", str(disk))


class Client:
    """Speaks NBD by hand."""

    def __init__(
        self, sock: socket.socket, *, structured: bool = True, context: bool = True, name: str = "disk"
    ) -> None:
        self.sock = sock
        assert self.take(18) == b"NBDMAGICIHAVEOPT" + b"\0\3"
        sock.sendall(struct.pack(">I", 3))
        if structured:
            assert self.option(8, b"") == [(1, b"")]
        if context:
            query = struct.pack(">I", len(name)) + name.encode() + struct.pack(">II", 1, 15) + b"base:allocation"
            assert self.option(10, query)[-1] == (1, b"")
        answers = self.option(7, struct.pack(">I", len(name)) + name.encode() + b"\0\0")
        assert answers[-1] == (1, b"")

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            assert piece, "the server hung up"
            data += piece
        return data

    def option(self, number: int, data: bytes) -> list[tuple[int, bytes]]:
        self.sock.sendall(b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data)
        answers = []
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self.take(20))
            assert (magic, option) == (0x3E889045565A9, number)
            answers.append((kind, self.take(length)))
            if kind == 1 or kind & 2**31:
                return answers

    def send(self, kind: int, offset: int, length: int, flags: int = 0, cookie: int = 5) -> None:
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, flags, kind, cookie, offset, length))

    def chunks(self) -> list[tuple[int, bytes]]:
        found = []
        while True:
            magic, flags, kind, _, length = struct.unpack(">IHHQI", self.take(20))
            assert magic == 0x668E33EF
            found.append((kind, self.take(length)))
            if flags & 1:
                return found

    def simple(self, length: int) -> tuple[int, bytes]:
        magic, error, _ = struct.unpack(">IIQ", self.take(16))
        assert magic == 0x67446698
        return error, b"" if error else self.take(length)

    def error(self) -> int:
        kind, data = self.chunks()[-1]
        assert kind in (32769, 32770)
        return int(struct.unpack_from(">I", data)[0])


def assembled(chunks: list[tuple[int, bytes]], offset: int, length: int) -> bytes:
    content = bytearray(b"?" * length)
    for kind, data in chunks:
        at = struct.unpack_from(">Q", data)[0] - offset if kind in (1, 2) else 0
        if kind == 1:
            content[at : at + len(data) - 8] = data[8:]
        elif kind == 2:
            size = struct.unpack_from(">I", data, 8)[0]
            content[at : at + size] = bytes(size)
    return bytes(content)


def test_random_reads_and_status(data: str, disk: Path) -> None:
    content = disk.read_bytes()
    dice = random.Random(7)
    with connect(data) as sock:
        client = Client(sock)
        for _ in range(150):
            offset = dice.randrange(SIZE)
            length = min(dice.choice([1, 511, 4096, BLOCK, BLOCK + 1, 3 * MiB, 32 * MiB]), SIZE - offset)
            wanted = content[offset : offset + length]
            action = dice.randrange(4)
            if action == 0:
                client.send(7, offset, length, flags=dice.choice([0, 8]))
                kind, reply = client.chunks()[0]
                assert kind == 5
                at = 0
                for size, flags in struct.iter_unpack(">II", reply[4:]):
                    assert flags == 0 or not wanted[at : at + size].strip(b"\0")
                    at += size
                assert 0 < at <= length
            elif action == 1:
                client.send(0, offset, length, flags=4)
                chunks = client.chunks()
                assert [kind for kind, _ in chunks] == [1, 0]
                assert assembled(chunks, offset, length) == wanted
            else:
                client.send(0, offset, length)
                assert assembled(client.chunks(), offset, length) == wanted


def test_many_requests_on_the_way(data: str, disk: Path) -> None:
    content = disk.read_bytes()
    with connect(data) as sock:
        client = Client(sock)
        offsets = range(0, 32 * MiB, MiB)
        for offset in offsets:
            client.send(0, offset, MiB, cookie=offset)
        for offset in offsets:
            assert assembled(client.chunks(), offset, MiB) == content[offset : offset + MiB]


def test_simple_replies(data: str, disk: Path) -> None:
    with connect(data) as sock:
        client = Client(sock, structured=False, context=False)
        client.send(0, 100, 5 * MiB)
        assert client.simple(5 * MiB) == (0, disk.read_bytes()[100 : 100 + 5 * MiB])
        client.send(7, 0, 4096)
        assert client.simple(0)[0] == 22


@pytest.mark.parametrize(
    ("kind", "offset", "length", "error"),
    [
        (0, SIZE, 1, 22),
        (0, 0, 32 * MiB + 1, 22),
        (0, 2**64 - 1, 2, 22),
        (0, 0, 0, 22),
        (7, SIZE - 1, 2, 22),
        (4, 0, 4096, 1),
        (6, 0, 4096, 1),
        (99, 0, 0, 22),
    ],
)
def test_refused_requests(data: str, kind: int, offset: int, length: int, error: int) -> None:
    with connect(data) as sock:
        client = Client(sock)
        client.send(kind, offset, length)
        assert client.error() == error
        client.send(0, 0, 512)
        assert client.chunks()[-1][0] == 0


def test_refused_write_takes_its_payload(data: str) -> None:
    with connect(data) as sock:
        client = Client(sock)
        client.send(1, 0, 3 * MiB)
        sock.sendall(b"w" * 3 * MiB)
        assert client.error() == 1
        client.send(0, 0, 512)
        assert client.chunks()[-1][0] == 0


def test_no_context_no_status(data: str) -> None:
    with connect(data) as sock:
        client = Client(sock, context=False)
        client.send(7, 0, 4096)
        assert client.error() == 22


@pytest.mark.parametrize(
    ("number", "payload", "answer"),
    [
        (5, b"", 2**31 + 1),
        (99, b"x" * 1000, 2**31 + 1),
        (7, b"", 2**31 + 3),
        (7, b"\xff" * 6, 2**31 + 3),
        (7, b"\0\0\0\4nope\0\0", 2**31 + 6),
        (8, b"x", 2**31 + 3),
        (10, b"\xff" * 40, 2**31 + 3),
        (10, b"", 2**31 + 3),
        (9, b"\0\0\0\4nope\0\0\0\0", 2**31 + 6),
        (3, b"x", 2**31 + 3),
    ],
)
def test_refused_options(data: str, number: int, payload: bytes, answer: int) -> None:
    with connect(data) as sock:
        client = Client.__new__(Client)
        client.sock = sock
        client.take(18)
        sock.sendall(struct.pack(">I", 3))
        if number == 9:
            client.option(8, b"")
        assert client.option(number, payload)[-1][0] == answer
        assert client.option(2, b"") == [(1, b"")]


def test_failing_read_is_an_error_of_the_request(data: str) -> None:
    with connect(data) as sock:
        client = Client(sock, name="short")
        client.send(0, 0, MiB)
        chunks = client.chunks()
        assert chunks[-1][0] == 32770
        client.send(0, 0, MiB, flags=4)
        assert [kind for kind, _ in client.chunks()] == [1, 32770]
        client.send(7, 512 * KiB, 4096)
        assert client.error() == 5
        client.send(0, 0, 64 * KiB)
        assert assembled(client.chunks(), 0, 64 * KiB) == b"x" * 64 * KiB


@pytest.mark.parametrize(
    "broken",
    [
        b"",
        b"\0\0\0\3",
        b"\0\0\0\3IHAVE",
        b"\0\0\0\3" + b"garbage!" * 3,
        b"VMB",
        b"\xff" * 100,
        b"\0\0\0\3IHAVEOPT\0\0\0\7\xff\xff\xff\xff",
    ],
)
def test_broken_sessions_are_followed_by_good_ones(data: str, broken: bytes) -> None:
    with connect(data) as sock:
        sock.sendall(broken)
    with connect(data) as sock:
        Client(sock)


def test_hello_in_the_middle(data: str) -> None:
    """A host that reconnects faster than the guest notices: stale requests, then a hello, on one stream."""
    with connect(data) as sock:
        client = Client(sock)
        client.send(0, 0, 2 * MiB)
        nonce = b"a" * 32
        sock.sendall(b"VMBK1 " + nonce + b"\n")
        seen = b""
        while not seen.endswith(b"VMBK1 " + nonce + b" 1\n"):
            seen = seen[-100:] + sock.recv(1)
        Client(sock)


def test_client_that_vanishes(data: str) -> None:
    for _ in range(3):
        with connect(data) as sock:
            client = Client(sock)
            for offset in range(0, 32 * MiB, MiB):
                client.send(0, offset, MiB)
            client.take(100)
    with connect(data) as sock:
        Client(sock)


def test_memory_is_bounded(data: str, tmp_path: Path) -> None:
    """Large requests are streamed: no process of the helper's grows by what it sends."""
    with connect(data) as sock:
        client = Client(sock)
        for _ in range(4):
            for _ in range(4):
                client.send(0, 0, 32 * MiB)
            for _ in range(4):
                client.chunks()
        peaks = []
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                text = status.read_text()
            except OSError:
                continue
            if "Name:\tvmbk-nbd" in text and str(tmp_path) in status.with_name("cmdline").read_text():
                peaks += [int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")]
    assert peaks and max(peaks) < 150 * 1024, peaks


def test_later_server_ends_the_earlier(tmp_path: Path, disk: Path, start_helper: Start) -> None:
    """A live disk with its hashes first, then on the same port the disk alone."""
    key = bytes(range(16))
    with listen(tmp_path / "data") as sock:
        start_helper(keep=(sock.fileno(),))
        number = sock.fileno()

        async def serve(hash_key: bytes | None) -> None:
            helper = await GuestHelper.reconnect(str(tmp_path / "control"), vm="vm", job="j01234567")
            await helper.serve(f"fd:{number}", {"disk": f"file:{disk}"}, live=True, hash_key=hash_key)
            await helper.close()

        asyncio.run(serve(key))
        with connect(str(tmp_path / "data")) as earlier:
            client = Client(earlier, name="disk#hashes")
            client.send(0, 16, 160)
            expected = b"".join(
                hashlib.blake2b(chunk, digest_size=16, key=key).digest() if chunk.strip(b"\0") else bytes(16)
                for chunk in (disk.read_bytes()[at : at + BLOCK] for at in range(BLOCK, 11 * BLOCK, BLOCK))
            )
            assert assembled(client.chunks(), 16, 160) == expected
            asyncio.run(serve(None))
            assert earlier.recv(1) == b""
    with connect(str(tmp_path / "data")) as later:
        assert names(later) == ["disk"]
        later.sendall(b"IHAVEOPT" + struct.pack(">II", 2, 0))


def names(sock: socket.socket) -> list[str]:
    """The exports of a server, by hand."""
    client = Client.__new__(Client)
    client.sock = sock
    client.take(18)
    sock.sendall(struct.pack(">I", 3))
    return [data[4:].decode() for kind, data in client.option(3, b"") if kind == 2]


def test_derived_names_that_collide_are_refused(tmp_path: Path, disk: Path, start_helper: Start) -> None:
    start_helper()

    async def serve() -> None:
        helper = await GuestHelper.reconnect(str(tmp_path / "control"), vm="vm", job="j01234567")
        try:
            with pytest.raises(GuestHelperError, match="a#hashes"):
                await helper.serve("fd:0", {"a": f"file:{disk}", "a#hashes": f"file:{disk}"}, hash_key=bytes(16))
        finally:
            await helper.close()

    asyncio.run(serve())
