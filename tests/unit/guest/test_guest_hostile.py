"""Whoever answers in place of the helper: an error of the right class, in time, never a hang."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vmbackupd.errors import BackupError, GuestHelperError, GuestHelperUnavailable, GuestProtocolError
from vmbackupd.guest import channel as channel_module
from vmbackupd.guest import client as client_module
from vmbackupd.guest import hello
from vmbackupd.guest.channel import Channel
from vmbackupd.guest.client import GuestHelper, open_data_channel
from vmbackupd.guest.replies import Collected, TrackedDisk, parse_collected, parse_tracked

TRACKED = {"device": "8:0", "tracking": True, "generation": "backup-1", "reason": ""}
COLLECTED = {"chunks": 1, "seconds": 0.5, "reason": ""}

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter
Behaviour = Callable[[Reader, Writer], Awaitable[None]]

IDENTITY = {"version": 1, "helper": "x", "boot_id": "b", "kernel": "k", "python": "3", "pid": 1}


def against(path: Path, behaviour: Behaviour, work: Callable[[str], Awaitable[None]]) -> None:
    """Run ``work`` against a server that does ``behaviour``; all of it within twenty seconds."""

    async def run() -> None:
        tasks: set[asyncio.Task[None]] = set()

        async def connected(reader: Reader, writer: Writer) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await behaviour(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_unix_server(connected, path, limit=2**23)
        try:
            async with asyncio.timeout(20):
                await work(str(path))
        finally:
            server.close()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())


async def accept(reader: Reader, writer: Writer) -> None:
    line = await reader.readline()
    writer.write(line.rstrip() + b" 1\n")


async def endless(writer: Writer, data: bytes) -> None:
    while True:
        writer.write(data)
        await writer.drain()


async def silent(reader: Reader, writer: Writer) -> None:
    await reader.read()


async def hangs_up(reader: Reader, writer: Writer) -> None:
    return


async def wrong_nonce(reader: Reader, writer: Writer) -> None:
    await reader.readline()
    writer.write(b"VMBK1 " + b"0" * 32 + b" 1\n")
    await reader.read()


async def wrong_version(reader: Reader, writer: Writer) -> None:
    writer.write((await reader.readline()).rstrip() + b" 2\n")
    await reader.read()


async def endless_version(reader: Reader, writer: Writer) -> None:
    writer.write((await reader.readline()).rstrip() + b" " + b"1" * 100)
    await reader.read()


async def flood(reader: Reader, writer: Writer) -> None:
    await endless(writer, b"\0" * 65536)


async def half_answer(reader: Reader, writer: Writer) -> None:
    writer.write((await reader.readline()).rstrip())
    await reader.read()


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (silent, GuestHelperUnavailable),
        (hangs_up, GuestHelperUnavailable),
        (wrong_nonce, GuestHelperUnavailable),
        (wrong_version, GuestHelperUnavailable),
        (endless_version, GuestProtocolError),
        (flood, GuestProtocolError),
        (half_answer, GuestHelperUnavailable),
    ],
)
@pytest.mark.parametrize("data_port", [False, True])
def test_bad_hello(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour: Behaviour, error: type[BackupError], data_port: bool
) -> None:
    monkeypatch.setattr(hello, "MAX_DISCARDED", 2**20)
    monkeypatch.setattr(hello, "RETRY", 0.1)

    async def work(path: str) -> None:
        with pytest.raises(error):
            if data_port:
                await open_data_channel(path, timeout=0.5)
            else:
                await Channel.open(path, vm="vm", timeout=0.5)

    against(tmp_path / "socket", behaviour, work)


def test_nobody_there(tmp_path: Path) -> None:
    async def run() -> None:
        with pytest.raises(GuestHelperUnavailable):
            await GuestHelper.reconnect(str(tmp_path / "none"), vm="vm", job="j01234567")
        with pytest.raises(GuestHelperUnavailable):
            await open_data_channel(str(tmp_path / "none"), timeout=1)

    asyncio.run(run())


async def require_greeting(path: str) -> None:
    """The data channel's next bytes are those behind the answer that counts."""
    sock = await open_data_channel(path, timeout=5)
    with sock:
        sock.settimeout(5)
        assert await asyncio.to_thread(sock.recv, 100) == b"NBDMAGICIHAVEOPT!"


def test_late_answer_to_an_earlier_hello_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both attempts are answered after the second was sent: what the peer says between them belongs to the first."""
    monkeypatch.setattr(hello, "RETRY", 0.2)

    async def slow(reader: Reader, writer: Writer) -> None:
        first, second = await reader.readline(), await reader.readline()
        writer.write(first.rstrip() + b" 1\nNBDMAGICstale" + second.rstrip() + b" 1\nNBDMAGICIHAVEOPT!")
        await reader.read()

    against(tmp_path / "socket", slow, require_greeting)


def test_a_helper_that_answers_and_then_gives_the_session_up_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its port may have told it that nobody is there any more, of the connection before."""
    monkeypatch.setattr(hello, "RETRY", 0.2)

    async def absent(reader: Reader, writer: Writer) -> None:
        writer.write((await reader.readline()).rstrip() + b" 1\nNBDM")
        writer.write((await reader.readline()).rstrip() + b" 1\nNBDMAGICIHAVEOPT!")
        await reader.read()

    against(tmp_path / "socket", absent, require_greeting)


def test_a_data_port_that_speaks_something_else_is_refused(tmp_path: Path) -> None:
    async def other(reader: Reader, writer: Writer) -> None:
        writer.write((await reader.readline()).rstrip() + b" 1\n{}")
        await reader.read()

    async def work(path: str) -> None:
        with pytest.raises(GuestProtocolError, match="NBDMAGIC"):
            await open_data_channel(path, timeout=5)

    against(tmp_path / "socket", other, work)


def answers(*lines: bytes | Callable[[dict[str, object]], object]) -> Behaviour:
    """Identify properly, then answer each request with the next of ``lines``."""

    async def behaviour(reader: Reader, writer: Writer) -> None:
        await accept(reader, writer)
        request = json.loads(await reader.readline())
        writer.write(json.dumps({"id": request["id"], "result": IDENTITY}).encode() + b"\n")
        for line in lines:
            request = json.loads(await reader.readline())
            writer.write(line if isinstance(line, bytes) else json.dumps(line(request)).encode() + b"\n")
            await writer.drain()
        await reader.read()

    return behaviour


def result(value: object) -> Callable[[dict[str, object]], object]:
    return lambda request: {"id": request["id"], "result": value}


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"null\n",
        b"[]\n",
        b"{}\n",
        b"nonsense\n",
        b"\xff\xff\n",
        b'{"id":2}\n',
        b'{"id":1,"result":{}}\n',
        b'{"id":true,"result":{}}\n',
        b'{"id":2,"result":[]}\n',
        b'{"id":2,"result":null}\n',
        b'{"id":2,"error":"x"}\n',
        b'{"id":2,"error":{"code":1,"message":"x"}}\n',
        b'{"id":2,"error":{"code":"x"}}\n',
        b'{"id":2,"error":{"code":"' + b"x" * 100 + b'","message":"x"}}\n',
        b"[" * 200000 + b"\n",
        b'{"id":2,"result":{"a":' + b"[" * 200000 + b"\n",
        b"x" * (5 << 20),
        b"x" * (5 << 20) + b"\n",
        b'{"id":2,"id":2,"result":{}}\n',
        b'{"id":2,"result":{"boot_id":NaN}}\n',
        b'{"id":' + b"9" * 5000 + b',"result":{}}\n',
    ],
)
def test_malformed_answers(tmp_path: Path, line: bytes) -> None:
    async def work(path: str) -> None:
        helper = await GuestHelper.reconnect(path, vm="vm", job="j01234567")
        with pytest.raises(GuestProtocolError):
            await helper.status()
        with pytest.raises(GuestHelperUnavailable):
            await helper.status()
        await helper.close()

    against(tmp_path / "socket", answers(line), work)


@pytest.mark.parametrize("line", [b"VMBK1 begun\n", b'{"id":2,"resuVMBK1 begun\n'])
def test_that_another_helper_was_started_is_heard_at_once(tmp_path: Path, line: bytes) -> None:
    async def work(path: str) -> None:
        helper = await GuestHelper.reconnect(path, vm="vm", job="j01234567")
        with pytest.raises(GuestHelperUnavailable, match="another was started"):
            await helper.status()
        await helper.close()

    against(tmp_path / "socket", answers(line), work)


VOLUME = {
    "device": "253:0",
    "name": "v",
    "size": 1024,
    "store_offset": 0,
    "store_length": 65536,
    "table": [[0, 2, "linear", "8:0 0"]],
}
COMPARED = {"device": "8:0", "moment": "", "known": False, "reason": ""}
TAKEN = {"device": "8:0", "chunks": 3, "bytes": 65536}
STATUS = {"device": "253:0", "valid": True, "allocated": 1, "total": 2, "metadata": 1, "table_ok": True}


@pytest.mark.parametrize(
    ("method", "value"),
    [
        ("snap", {}),
        ("snap", {"t1": "now", "suspend_ms": 1, "resume_ms": 1}),
        ("snap", {"t1": -1, "suspend_ms": 1, "resume_ms": 1}),
        ("prepare_capture", {}),
        ("prepare_capture", {"limit": 65537}),
        ("capture", {"t1": 1, "passes": 1, "disks": []}),
        ("capture", {"t1": 1, "passes": 1, "disks": [TAKEN, TAKEN]}),
        ("capture", {"t1": 1, "passes": 1, "disks": [{**TAKEN, "device": "8:16"}]}),
        ("capture", {"t1": 1, "passes": 0, "disks": [TAKEN]}),
        ("capture", {"t1": 1, "passes": 1, "disks": [{**TAKEN, "chunks": 2**41}]}),
        ("capture", {"t1": 1, "passes": 1, "disks": [{**TAKEN, "bytes": -1}]}),
        ("touch_pools", {"pools": [{"name": "p", "touched": 1, "reason": ""}]}),
        ("touch_pools", {"pools": [{"name": "p" * 200, "touched": True, "reason": ""}]}),
        ("compare_pools", {"disks": []}),
        ("compare_pools", {"disks": [{**COMPARED, "device": "8:16"}]}),
        ("compare_pools", {"disks": [{**COMPARED, "known": None}]}),
        ("compare_pools", {"disks": [{**COMPARED, "moment": "x" * 5000}]}),
        ("disarm", {}),
        ("disarm", {"fired": 0}),
        ("release", {"removed": [1]}),
        ("release", {"removed": ["x" * 1000]}),
        ("status", {"boot_id": "", "volumes": []}),
        ("status", {"boot_id": "b", "volumes": [STATUS, STATUS]}),
        ("status", {"boot_id": "b", "volumes": [{**STATUS, "valid": 1}]}),
        ("status", {"boot_id": "b", "volumes": [{**STATUS, "allocated": -1}]}),
        ("status", {"boot_id": "b", "volumes": [{**STATUS, "device": "253"}]}),
        ("prepare", {"volumes": []}),
        ("prepare", {"volumes": [{**VOLUME, "device": "253:1"}]}),
        ("prepare", {"volumes": [VOLUME, VOLUME]}),
        ("prepare", {"volumes": [{**VOLUME, "store_offset": 512}]}),
        ("prepare", {"volumes": [{**VOLUME, "store_length": 1}]}),
        ("prepare", {"volumes": [{**VOLUME, "size": 512}]}),
        ("prepare", {"volumes": [{**VOLUME, "size": 2**70}]}),
        ("prepare", {"volumes": [{**VOLUME, "table": []}]}),
        ("prepare", {"volumes": [{**VOLUME, "table": [[1, 2, "linear", "x"]]}]}),
        ("probe", {}),
        ("probe", {"devices": {}}),
    ],
)
def test_wrong_results(tmp_path: Path, method: str, value: object) -> None:
    async def work(path: str) -> None:
        helper = await GuestHelper.reconnect(path, vm="vm", job="j01234567")
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "snap": helper.snap,
            "prepare_capture": lambda: helper.prepare_capture(["8:0"], limit=65536),
            "capture": lambda: helper.capture(["8:0"], deadline=1),
            "touch_pools": lambda: helper.touch_pools(["8:0"]),
            "compare_pools": lambda: helper.compare_pools({"8:0": ""}),
            "disarm": helper.disarm,
            "release": helper.release,
            "status": helper.status,
            "probe": helper.probe,
            "prepare": lambda: helper.prepare(scratch_serial="s", volumes={"253:0": 65536}),
        }
        with pytest.raises(GuestProtocolError):
            await calls[method]()
        await helper.close()

    against(tmp_path / "socket", answers(result(value)), work)


def test_reported_failure_keeps_the_session(tmp_path: Path) -> None:
    failing = lambda request: {"id": request["id"], "error": {"code": "NoVolume", "message": "253:0 is none"}}  # noqa: E731

    async def work(path: str) -> None:
        helper = await GuestHelper.reconnect(path, vm="vm", job="j01234567")
        with pytest.raises(GuestHelperError, match="253:0 is none") as caught:
            await helper.prepare(scratch_serial="s", volumes={"253:0": 65536})
        assert caught.value.reason == "NoVolume"
        prepared = await helper.prepare(scratch_serial="s", volumes={"253:0": 65536})
        assert prepared[0].table[0].params == "8:0 0"
        await helper.close()

    against(tmp_path / "socket", answers(failing, result({"volumes": [VOLUME]})), work)


@pytest.mark.parametrize("lines", [[], [b""], [b'{"id":2,'], [b"\n" * 0]])
def test_silence_after_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[bytes]) -> None:
    monkeypatch.setattr(client_module, "_SHORT", 0.3)

    async def work(path: str) -> None:
        helper = await GuestHelper.reconnect(path, vm="vm", job="j01234567")
        with pytest.raises(GuestHelperUnavailable, match="status"):
            await helper.status()
        await helper.close()

    against(tmp_path / "socket", answers(*lines), work)


def test_guest_that_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request larger than the socket's buffers, and nobody reads."""

    async def deaf(reader: Reader, writer: Writer) -> None:
        await accept(reader, writer)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await asyncio.sleep(60)

    async def work(path: str) -> None:
        channel = await Channel.open(path, vm="vm", timeout=5)
        with pytest.raises(GuestHelperUnavailable):
            await channel.request("x", {"text": "x" * (3 << 20)}, 0.5)
        assert channel.closed

    against(tmp_path / "socket", deaf, work)


def test_cancelled_request_closes_the_session(tmp_path: Path) -> None:
    """Its answer may still come, and must not be taken for the next one's."""

    async def work(path: str) -> None:
        helper = await GuestHelper.reconnect(path, vm="vm", job="j01234567")
        task = asyncio.create_task(helper.status())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(GuestHelperUnavailable):
            await helper.status()
        await helper.close()

    against(tmp_path / "socket", answers(), work)
    assert channel_module.MAX_LINE == 4 * 2**20


def test_what_is_tracked() -> None:
    assert parse_tracked({"disks": [TRACKED]}, ["8:0"]) == [TrackedDisk("8:0", True, "backup-1", "")]
    assert parse_collected(COLLECTED) == Collected(1, 0.5, "")


@pytest.mark.parametrize(
    "disks",
    [
        [],
        [TRACKED, TRACKED],
        [TRACKED | {"device": "8:16"}],
        [TRACKED | {"device": "../sda"}],
        [TRACKED | {"tracking": False}],
        [TRACKED | {"tracking": 1}],
        [TRACKED | {"generation": ""}],
        [TRACKED | {"generation": "x" * 256}],
        [TRACKED | {"reason": "x" * 1001}],
        [TRACKED | {"reason": None}],
        ["8:0"],
    ],
)
def test_a_lie_about_what_is_tracked(disks: list[object]) -> None:
    with pytest.raises(GuestProtocolError, match=r"disks"):
        parse_tracked({"disks": disks}, ["8:0"])


@pytest.mark.parametrize(
    "lie", [{"chunks": -1}, {"chunks": 2**50}, {"seconds": -0.5}, {"seconds": float("nan")}, {"reason": 5}]
)
def test_a_lie_about_what_was_collected(lie: dict[str, object]) -> None:
    with pytest.raises(GuestProtocolError, match=next(iter(lie))):
        parse_collected(COLLECTED | lie)
