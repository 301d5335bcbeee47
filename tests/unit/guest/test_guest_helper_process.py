"""The helper as a process: its control protocol, sessions, lease, dead-man. Everything but device-mapper."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
import tty
from pathlib import Path

import pytest

from tests.unit.guest.support import Start
from vmbackupd.errors import GuestHelperError, GuestHelperUnavailable
from vmbackupd.guest.channel import Channel
from vmbackupd.guest.client import GuestHelper
from vmbackupd.guest.report import GuestReport, parse_report

NONCE = "0123456789abcdef" * 2


@pytest.fixture
def control(tmp_path: Path) -> str:
    return str(tmp_path / "control")


def connect(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(path)
    return sock


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = sock.recv(1)
        assert piece, data
        data += piece
    return data


def test_session(start_helper: Start, control: str) -> None:
    process = start_helper()

    async def run() -> GuestReport:
        helper = await GuestHelper.reconnect(control, vm="vm", job="j01234567")
        assert helper.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        report = await helper.probe()
        assert (await helper.status()).volumes == ()
        await helper.quit()
        await helper.close()
        return report

    report = asyncio.run(run())
    assert process.wait(20) == 0
    devnos = {path.read_text().strip() for path in Path("/sys/block").glob("*/dev")}
    assert devnos <= {device.devno for device in report.devices}


def test_reconnects_and_keeps_its_state(start_helper: Start, control: str) -> None:
    start_helper()

    async def run() -> list[int]:
        pids = []
        for _ in range(3):
            channel = await Channel.open(control, vm="vm", timeout=20)
            pid = (await channel.request("identify", {}, 20))["pid"]
            assert isinstance(pid, int)
            pids.append(pid)
            await channel.close()
        return pids

    assert len(set(asyncio.run(run()))) == 1


@pytest.mark.parametrize(
    "stale",
    [
        b'{"id":7,"method":"identify"}\n',
        b'{"id":7,"meth',
        b"VMBK1 ",
        b"VMBK1 " + b"f" * 32 + b"\n",
        b"\x00\xff" * 5000,
        b"\n\n\n",
        b"VMBK1 zz\n",
    ],
)
def test_stale_bytes_before_the_hello(start_helper: Start, control: str, stale: bytes) -> None:
    start_helper()
    with connect(control) as sock:
        sock.sendall(stale + f"VMBK1 {NONCE}\n".encode())
        assert read_until(sock, f"VMBK1 {NONCE} 1\n".encode())
        sock.sendall(b'{"id":1,"method":"ping","params":{}}\n')
        assert json.loads(read_until(sock, b"\n")) == {"id": 1, "result": {}}


def test_hello_in_the_middle_of_a_session(start_helper: Start, control: str) -> None:
    start_helper()
    with connect(control) as sock:
        for nonce in (NONCE, "f" * 32):
            sock.sendall(f'{{"id":1,"me{"" if nonce == NONCE else "x"}VMBK1 {nonce}\n'.encode())
            read_until(sock, f"VMBK1 {nonce} 1\n".encode())


@pytest.mark.parametrize(
    "request_line",
    [
        b"[]",
        b"{}",
        b"nonsense",
        b'{"id":1}',
        b'{"id":1,"method":"no such"}',
        b'{"id":1,"method":["ping"]}',
        b'{"id":"x","method":"ping"}',
        b'{"id":1,"method":"ping","params":[1]}',
        b"\xff\xfe",
        b"[" * 100000,
        b"null",
    ],
)
def test_malformed_requests(start_helper: Start, control: str, request_line: bytes) -> None:
    start_helper()
    with connect(control) as sock:
        sock.sendall(f"VMBK1 {NONCE}\n".encode())
        read_until(sock, b"\n")
        sock.sendall(request_line + b"\n")
        assert json.loads(read_until(sock, b"\n"))["error"]["code"] == "InvalidRequest"
        sock.sendall(b'{"id":2,"method":"ping"}\n')
        assert json.loads(read_until(sock, b"\n")) == {"id": 2, "result": {}}


def test_overlong_line_ends_the_session(start_helper: Start, control: str) -> None:
    start_helper()
    with connect(control) as sock:
        sock.sendall(f"VMBK1 {NONCE}\n".encode())
        read_until(sock, b"\n")
        sock.sendall(b"x" * (5 << 20))
        sock.sendall(f"VMBK1 {NONCE}\n".encode())
        read_until(sock, f"VMBK1 {NONCE} 1\n".encode())


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("prepare", {}),
        ("prepare", {"job": "j1", "volumes": []}),
        ("release", {"job": "../x"}),
        ("snap", {}),
        ("disarm", {}),
        ("capture", {"deadline_s": 1}),
        ("touch_pools", {}),
        ("compare_pools", {"disks": []}),
        ("prepare_capture", {"disks": [{"device": "9999:9"}], "limit": 65536}),
        ("prepare_capture", {"disks": [{"device": "8:0"}], "limit": 1}),
        ("track", {"consumer": "host"}),
        ("track", {"consumer": "host", "disks": [{"device": "sda", "identity": "x"}]}),
        ("track", {"consumer": "host", "disks": [], "limit": -1}),
        ("collect", {}),
        ("collect", {"device": "9999:9"}),
        ("settle", {}),
        ("settle", {"generation": "backup-1"}),
        ("arm", {"deadman_s": -1}),
        ("arm", {"deadman_s": True}),
        ("serve", {"port": "x", "disks": []}),
        ("serve", {"port": "no such port", "disks": [{"name": "a", "device": "9999:9"}]}),
        ("serve", {"port": "fd:0", "disks": [{"name": "a", "device": "/etc/passwd"}]}),
        ("serve", {"port": "fd:0", "disks": [{"name": "a", "device": "8:0"}], "live": 1}),
        ("serve", {"port": "fd:0", "disks": [{"name": "a", "device": "8:0"}], "hash_key": "ab"}),
        ("serve", {"port": "fd:0", "disks": [{"name": "a", "device": "8:0"}], "hash_key": "no" * 16}),
    ],
)
def test_refused_requests_leave_the_session(
    start_helper: Start, control: str, method: str, params: dict[str, object]
) -> None:
    start_helper()

    async def run() -> None:
        channel = await Channel.open(control, vm="vm", timeout=20)
        with pytest.raises(GuestHelperError) as caught:
            await channel.request(method, params, 60)
        assert caught.value.reason
        await channel.request("ping", {}, 20)
        await channel.close()

    asyncio.run(run())


def test_lease(start_helper: Start) -> None:
    assert start_helper("--lease", "0.5").wait(20) == 3


def test_the_host_tells_its_lease(start_helper: Start, control: str) -> None:
    process = start_helper()

    async def run() -> None:
        channel = await Channel.open(control, vm="vm", timeout=20)
        await channel.request("identify", {"lease_s": 0.5}, 20)
        await channel.close()

    asyncio.run(run())
    assert process.wait(20) == 3


def test_keeps_alive_beyond_the_lease(start_helper: Start, control: str) -> None:
    process = start_helper("--lease", "2")

    async def run() -> None:
        helper = await GuestHelper.reconnect(control, vm="vm", job="j01234567", lease=1.0)
        await asyncio.sleep(3)  # longer than the lease: only the pings keep it
        assert process.poll() is None
        await helper.probe()
        await helper.close()

    asyncio.run(run())


def test_pty(zipapp: Path) -> None:
    """A character device in place of the socket."""
    ours, theirs = pty.openpty()
    tty.setraw(theirs)
    process = subprocess.Popen([sys.executable, zipapp, "--fd", str(theirs), "--lease", "20"], pass_fds=(theirs,))
    os.close(theirs)
    try:
        os.write(ours, f"stale\0VMBK1 {NONCE}\n".encode())
        data = b""
        while not data.endswith(f"VMBK1 {NONCE} 1\n".encode()):
            data += os.read(ours, 4096)
        os.write(ours, b'{"id":1,"method":"quit"}\n')
        while not data.endswith(b'{"id":1,"result":{}}\n'):
            data += os.read(ours, 4096)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ended_stream_ends_the_helper(zipapp: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, zipapp, "--fd", str(theirs.fileno())], pass_fds=(theirs.fileno(),)
            )
        try:
            ours.settimeout(20)
            ours.sendall(f"VMBK1 {NONCE}\n".encode())
            read_until(ours, b"1\n")
            ours.close()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


def guards(pid: int) -> list[int]:
    """The watchdog processes of a helper."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            if Path(f"/proc/{child}/comm").read_text().strip() == "vmbk-watchdog":
                found.append(int(child))
        except OSError:
            pass
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="locks memory")
class TestDeadman:
    def test_disarmed_in_time(self, start_helper: Start, control: str) -> None:
        process = start_helper()

        async def run() -> None:
            helper = await GuestHelper.reconnect(control, vm="vm", job="j01234567")
            await helper.arm(60)
            assert len(guards(process.pid)) == 1
            with pytest.raises(GuestHelperError):
                await helper.arm(60)
            assert await helper.disarm() is False
            assert guards(process.pid) == []
            await helper.close()

        asyncio.run(run())

    def test_fires(self, start_helper: Start, control: str) -> None:
        start_helper()

        async def run() -> None:
            helper = await GuestHelper.reconnect(control, vm="vm", job="j01234567")
            await helper.arm(0.2)
            await asyncio.sleep(0.6)  # the passing of time is what is tested
            assert await helper.disarm() is True
            await helper.close()

        asyncio.run(run())

    def test_killed_watchdog_is_no_success(self, start_helper: Start, control: str) -> None:
        process = start_helper()

        async def run() -> None:
            helper = await GuestHelper.reconnect(control, vm="vm", job="j01234567")
            await helper.arm(60)
            os.kill(guards(process.pid)[0], signal.SIGKILL)
            with pytest.raises(GuestHelperError) as caught:
                await helper.disarm()
            assert caught.value.reason == "WatchdogLost"
            await helper.close()

        asyncio.run(run())

    def test_ends_with_its_helper(self, start_helper: Start, control: str) -> None:
        process = start_helper()

        async def run() -> int:
            helper = await GuestHelper.reconnect(control, vm="vm", job="j01234567")
            await helper.arm(60)
            guard = guards(process.pid)[0]
            process.kill()
            with pytest.raises(GuestHelperUnavailable):
                await helper.probe()
            await helper.close()
            return guard

        guard = asyncio.run(run())
        deadline = time.monotonic() + 20
        while os.path.exists(f"/proc/{guard}/exe"):  # a zombie has none
            assert time.monotonic() < deadline, "the watchdog outlives its helper"
            time.sleep(0.05)

    def test_fires_while_the_helper_is_stopped(self, start_helper: Start, control: str) -> None:
        process = start_helper()

        async def run() -> None:
            helper = await GuestHelper.reconnect(control, vm="vm", job="j01234567")
            await helper.arm(0.2)
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(0.6)
            process.send_signal(signal.SIGCONT)
            assert await helper.disarm() is True
            await helper.close()

        asyncio.run(run())


def test_report_of_this_machine(start_helper: Start, control: str) -> None:
    """What the helper reports passes the host's own checks unchanged."""
    start_helper()

    async def run() -> dict[str, object]:
        channel = await Channel.open(control, vm="vm", timeout=20)
        try:
            return await channel.request("probe", {}, 20)
        finally:
            await channel.close()

    assert parse_report(asyncio.run(run())).devices
