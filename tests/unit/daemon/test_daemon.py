"""The daemon's process: start, readiness, stop by a signal, a second one, the loss of the bus."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.api.support import DEADLINE, ROOT_DIRECTORY, BusDaemon, cli_command, cli_environment
from vmbackupd import __version__


class Systemd:
    """What systemd would hear: a datagram socket."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="vmbackupd-notify-")
        self.path = f"{self._directory.name}/notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(DEADLINE)
        self.heard: list[str] = []

    def wait_for(self, words: str) -> str:
        """The message with ``words``, after reading those before it."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            message = self._socket.recv(4096).decode()
            self.heard.append(message)
            if words in message:
                return message
        raise AssertionError(f"{words!r} did not come; heard {self.heard}")

    def close(self) -> None:
        self._socket.close()
        self._directory.cleanup()


class Daemon:
    """One daemon process on a bus and directories of its own."""

    def __init__(self, address: str, state: Path, **environment: str) -> None:
        self.systemd = Systemd()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.daemon.small_daemon", "--bus-address", address, "--state-directory",
             str(state), "--runtime-directory", str(state / "run")],
            cwd=ROOT_DIRECTORY, env={**os.environ, "NOTIFY_SOCKET": self.systemd.path, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Send a signal, unless it is 0, and wait: exit status, stdout, stderr."""
        if number:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, out, err

    def line(self) -> str:
        """A line of stdout."""
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            assert selector.select(DEADLINE), "nothing on stdout"
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate(timeout=DEADLINE)
        self.systemd.close()


class Start:
    """Starts daemons; all are gone at the end of the test."""

    def __init__(self) -> None:
        self.daemons: list[Daemon] = []

    def __call__(self, address: str, state: Path, **environment: str) -> Daemon:
        self.daemons.append(Daemon(address, state, **environment))
        return self.daemons[-1]


@pytest.fixture
def start() -> Iterator[Start]:
    starter = Start()
    yield starter
    for daemon in starter.daemons:
        daemon.close()


def ctl(address: str, *arguments: str) -> tuple[int, Any]:
    done = subprocess.run(cli_command(*arguments, "--json"), env=cli_environment(address), capture_output=True,
                          check=False, timeout=DEADLINE)
    return done.returncode, json.loads(done.stdout)


def backup_that_waits(address: str) -> subprocess.Popen[str]:
    """A ``vmbackupctl backup`` that has seen its job at work."""
    waiting = subprocess.Popen(cli_command("backup", "slow"), env=cli_environment(address), stderr=subprocess.PIPE,
                               text=True)
    assert waiting.stderr is not None
    while "passthrough-copy" not in waiting.stderr.readline():
        assert waiting.poll() is None
    return waiting


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_recovery_then_ready_then_work_then_an_orderly_end(address: str, tmp_path: Path, start: Start,
                                                           number: int) -> None:
    daemon = start(address, tmp_path / "state")
    daemon.systemd.wait_for("STATUS=recovering")
    daemon.systemd.wait_for("READY=1\nSTATUS=no job")
    assert daemon.line() == "recovering"
    status, document = ctl(address, "jobs")
    assert [(job["kind"], job["state"]) for job in document] == [("recover", "succeeded")]
    status, document = ctl(address, "backup", "slow", "--no-wait")
    assert status == 0
    daemon.systemd.wait_for("STATUS=1 jobs: backup slow passthrough-copy")
    status, out, err = daemon.stop(number)
    assert status == 0, err
    daemon.systemd.wait_for("STOPPING=1\nSTATUS=stopping: undoing 1 jobs")
    daemon.systemd.wait_for("EXTEND_TIMEOUT_USEC=60000000")
    daemon.systemd.wait_for("STATUS=1 jobs: backup slow undo")
    assert "closed" in out
    assert f"job {document['job']} (backup slow) is cancelled" in err


def test_who_waits_learns_that_the_daemon_stopped(address: str, tmp_path: Path, start: Start) -> None:
    daemon = start(address, tmp_path / "state")
    daemon.systemd.wait_for("READY=1")
    waiting = backup_that_waits(address)
    daemon.stop()
    _, err = waiting.communicate(timeout=DEADLINE)
    assert waiting.returncode == 1
    assert "was cancelled; everything it did is undone" in err


def test_a_killed_daemon_is_told_to_who_waits_and_its_lock_is_free(address: str, tmp_path: Path, start: Start) -> None:
    daemon = start(address, tmp_path / "state")
    daemon.systemd.wait_for("READY=1")
    waiting = backup_that_waits(address)
    daemon.stop(signal.SIGKILL)
    _, err = waiting.communicate(timeout=DEADLINE)
    assert waiting.returncode == 1
    assert "vmbackupctl recover" in err
    again = start(address, tmp_path / "state")
    again.systemd.wait_for("READY=1")


def test_a_second_daemon_is_refused(address: str, tmp_path: Path, start: Start) -> None:
    first = start(address, tmp_path / "state")
    first.systemd.wait_for("READY=1")
    status, _, err = start(address, tmp_path / "state").stop(0)
    assert status == 1
    assert f"another vmbackupd (process {first.process.pid}) uses {tmp_path}/state" in err
    status, _, err = start(address, tmp_path / "other").stop(0)
    assert status == 1
    assert "the name org.vmbackupd1 is taken" in err
    assert first.stop()[0] == 0


def test_a_recovery_that_fails_is_loud_but_no_reason_to_stay_down(address: str, tmp_path: Path, start: Start) -> None:
    daemon = start(address, tmp_path / "state", RECOVERY="fails")
    daemon.systemd.wait_for("READY=1")
    _, document = ctl(address, "jobs")
    assert document[0]["error"] == {"code": "Hypervisor", "message": "web: the scratch disk does not go away"}
    status, _, err = daemon.stop()
    assert (status, "recovery at start: web: the scratch disk does not go away" in err) == (0, True)


def test_a_recovery_can_be_interrupted(address: str, tmp_path: Path, start: Start) -> None:
    daemon = start(address, tmp_path / "state", RECOVERY="hangs")
    assert daemon.line() == "recovering"
    status, out, _ = daemon.stop()
    assert (status, "closed" in out) == (0, True)
    assert not any("READY" in message for message in daemon.systemd.heard)


def test_no_hypervisor_no_bus_no_directory(address: str, tmp_path: Path, start: Start) -> None:
    status, _, err = start(address, tmp_path / "state", HYPERVISOR="away").stop(0)
    assert (status, "cannot connect to libvirt" in err) == (1, True)
    status, _, err = start(f"unix:path={tmp_path}/bus", tmp_path / "state").stop(0)
    assert (status, f"cannot connect to unix:path={tmp_path}/bus" in err) == (1, True)
    (tmp_path / "file").touch()
    status, _, err = start(address, tmp_path / "file" / "state").stop(0)
    assert (status, "cannot make the directory" in err) == (2, True)


def test_the_loss_of_the_bus_ends_the_daemon_in_order(tmp_path: Path, start: Start) -> None:
    with BusDaemon() as bus:
        daemon = start(bus.address, tmp_path / "state")
        daemon.systemd.wait_for("READY=1")
        ctl(bus.address, "backup", "slow", "--no-wait")
        daemon.systemd.wait_for("passthrough-copy")
        bus.kill()
        status, out, err = daemon.stop(0)
    assert status == 1
    assert "the bus connection ended" in err and "is cancelled" in err
    assert "closed" in out


def test_directories_and_their_modes(address: str, tmp_path: Path, start: Start) -> None:
    daemon = start(address, tmp_path / "state")
    daemon.systemd.wait_for("READY=1")
    modes = {name: (tmp_path / "state" / name).stat().st_mode & 0o777 for name in (".", "run", "scratch", "lock")}
    assert modes == {".": 0o711, "run": 0o700, "scratch": 0o711, "lock": 0o600}
    assert daemon.stop()[0] == 0


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "vmbackupd", *arguments], cwd=ROOT_DIRECTORY, capture_output=True,
                          text=True, check=False, timeout=DEADLINE, env={**os.environ, **environment})


def test_version_show_config_and_errors(tmp_path: Path) -> None:
    assert run("--version").stdout == f"vmbackupd {__version__}\n"
    file = tmp_path / "c.toml"
    file.write_text('[guest]\nfreeze_budget = "2s"\n')
    done = run("--config", str(file), "--show-config", "--repository", "/r", VMBACKUPD_BUS_ADDRESS="unix:path=/b")
    assert done.returncode == 0
    for line in ("freeze_budget = 2.0", 'path = "/r"', 'address = "unix:path=/b"'):
        assert line in done.stdout.splitlines()
    file.write_text("[guest]\nfreeze = 2\n")
    done = run("--config", str(file))
    assert done.returncode == 2
    assert f"{file}: unknown key guest.freeze" in done.stderr
    assert run("--explode").returncode == 2
