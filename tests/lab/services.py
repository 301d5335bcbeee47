"""The host side of a lab: a bus, a libvirtd and an iSCSI target of its own, all below one directory.

libvirtd runs in a user namespace in which root has another name. To libvirt it is then an unprivileged session daemon,
whose every path lies below the XDG directories that we give it; to the host its processes are still root's, so that
they open what the tests create. Paths are the same for everybody: no mount namespace.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import libvirt

from tests.lab.image import cache_directory

BUS_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <allow own="*"/>
    <allow send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
  </policy>
</busconfig>
"""


class LabError(Exception):
    """A part of the lab does not start or answer; the message ends with its log."""


def until(done: Callable[[], Any], seconds: float, what: str, interval: float = 0.05) -> Any:
    """Poll ``done`` until it returns something true and return that. LabError naming ``what`` after ``seconds``."""
    end = time.monotonic() + seconds
    while True:
        result = done()
        if result:
            return result
        if time.monotonic() > end:
            raise LabError(f"{what}: not within {seconds:g} s")
        time.sleep(interval)


def kept(error: Exception | None, close: Callable[[], object]) -> Exception | None:
    """Run ``close``; the first error of a row of clean-ups, so that later ones neither hide it nor are skipped."""
    try:
        close()
    except Exception as later:
        return error or later
    return error


class Processes:
    """The lab's child processes, held by tests/lab/supervisor.py."""

    def __init__(self, directory: Path, lock: int | None = None) -> None:
        """``directory`` is removed at the end; ``lock``: a descriptor to hold open until then."""
        script = Path(__file__).with_name("supervisor.py")
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            pass_fds=[] if lock is None else [lock],  # the next lab begins when all of this one is gone
        )
        self.pid = self._process.pid

    def _order(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline() or '{"error": "the supervisor has ended"}')
        if "error" in answer:
            raise LabError(f"{order}: {answer['error']}")
        return answer

    def start(self, name: str, argv: Sequence[str | Path], env: Mapping[str, str] | None = None) -> int:
        """Start a process that ends with the lab; its pid. Output goes to ``log(name)``."""
        environment = {**os.environ, **(env or {})}
        return int(
            self._order(start=name, argv=[str(a) for a in argv], env=environment, log=str(self.log_path(name)))["pid"]
        )

    def stop(self, name: str, timeout: float = 10.0) -> int | None:
        """SIGTERM, after ``timeout`` seconds SIGKILL; the exit status, negative for a signal."""
        status = self._order(stop=name, timeout=timeout)["status"]
        return None if status is None else int(status)

    def status(self, name: str) -> int | None:
        """The exit status of a process that has ended, None while it runs."""
        status = self._order(status=name)["status"]
        return None if status is None else int(status)

    def log_path(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def log(self, name: str) -> str:
        """What process ``name`` has printed so far."""
        path = self.log_path(name)
        return path.read_text(errors="replace") if path.exists() else ""

    def ready(self, name: str, done: Callable[[], Any], seconds: float = 30.0) -> Any:
        """Poll ``done`` like ``until``; fails at once, with the log, when the process has ended."""

        def check() -> Any:
            status = self.status(name)
            if status is not None:
                raise LabError(f"{name} ended with {status}:\n{self.log(name)}")
            return done()

        try:
            return until(check, seconds, f"{name} is ready")
        except LabError as error:
            raise LabError(f"{error}\n{self.log(name)[-4000:]}") from None

    def close(self) -> None:
        """End every process, wait for them, and remove the lab's directory."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise LabError("the lab's supervisor did not end; processes may be left") from None
        finally:
            self._process.stdout.close()


def _connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def start_bus(processes: Processes, directory: Path) -> str:
    """Start a dbus-daemon in which everybody may do everything; its address."""
    path, config = directory / "bus", directory / "bus.conf"
    config.write_text(BUS_CONFIG.format(path=path))
    processes.start("dbus", ["dbus-daemon", f"--config-file={config}", "--nofork", "--nopidfile", "--nosyslog"])
    processes.ready("dbus", lambda: _connects(path))
    return f"unix:path={path}"


def start_libvirt(processes: Processes, directory: Path) -> str:
    """Start a libvirtd whose files all lie in ``directory``; the URI to open."""
    home = directory / "libvirt"  # = XDG_CONFIG_HOME/libvirt. Short: channel sockets below it must fit in 107 bytes
    runtime = directory / "r"
    for path in (home, runtime):
        path.mkdir(mode=0o700)
    (home / "libvirtd.conf").write_text(
        f'auth_unix_rw = "none"\nauth_unix_ro = "none"\nlog_outputs = "3:file:{directory}/libvirtd-messages.log"\n'
    )
    (home / "qemu.conf").write_text(
        'stdio_handler = "file"\nsecurity_driver = "none"\nnamespaces = []\ncgroup_controllers = []\n'
    )
    environment = {
        "HOME": str(directory),
        "XDG_CONFIG_HOME": str(directory),
        "XDG_RUNTIME_DIR": str(runtime),
        "XDG_CACHE_HOME": str(cache_directory() / "libvirt"),  # what libvirt learns of QEMU by running it: seconds
        "XDG_DATA_HOME": str(directory / "data"),
    }
    argv: list[str | Path] = [
        "unshare",
        "--user",
        "--map-user=1",
        "--map-group=1",
        "libvirtd",
        "-f",
        home / "libvirtd.conf",
        "-p",
        directory / "libvirtd.pid",
    ]
    processes.start("libvirtd", argv, environment)
    path = runtime / "libvirt/libvirt-sock"
    processes.ready("libvirtd", lambda: _connects(path))
    return f"qemu+unix:///session?socket={path}"


def open_libvirt(uri: str) -> libvirt.virConnect:
    """A connection of its own to the lab's libvirtd."""
    return libvirt.open(uri)
