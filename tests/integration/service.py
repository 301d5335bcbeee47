"""The daemon under test as users meet it: a process of its own on the lab's bus, driven by ``vmbackupctl``
processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import outliving
from tests.lab import Lab
from tests.lab.services import until
from tests.lab.workload import Workload
from vmbackupd.job.faultpoints import VARIABLE

ROOT = Path(__file__).parent.parent.parent
START_DEADLINE = 120.0  # recovery runs before the daemon is ready
COMMAND_DEADLINE = 400.0


class CommandError(AssertionError):
    """``vmbackupctl`` ended with a status the test did not expect."""


class Service:
    """``with Service(lab, directory)``: a running daemon with a repository; ``ctl("backup", "plain")`` returns its
    JSON."""

    def __init__(self, lab: Lab, directory: Path, **settings: str) -> None:
        self.lab, self.directory = lab, directory
        directory.mkdir(parents=True, exist_ok=True)
        self.scratch = directory / "scratch"
        self.repository = directory / "repository"
        self.state = directory / "state"
        self.log = directory / "daemon.log"
        self.config = directory / "vmbackupd.toml"
        self.process: subprocess.Popen[bytes] | None = None
        self.configure(**settings)

    def configure(self, **settings: str) -> None:
        """Write the configuration; ``settings`` are lines by table, e.g. ``scratch='size = "1 MiB"'``."""
        tables = {
            "repository": f'path = "{self.repository}"',
            "hypervisor": f'uri = "{self.lab.libvirt_uri}"',
            "guest": "freeze_budget = 20.0\nlease = 300",
            "scratch": f'directory = "{self.scratch}"',
        }
        for table, lines in settings.items():
            own = {line.split("=")[0] for line in lines.splitlines()}
            kept = [line for line in tables.get(table, "").splitlines() if line.split("=")[0] not in own]
            tables[table] = "\n".join([*kept, lines])
        head = f'state_directory = "{self.state}"\nruntime_directory = "{self.lab.dir}/r"\n'
        self.config.write_text(head + "".join(f"[{name}]\n{lines}\n" for name, lines in tables.items()))

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self, faultpoints: str = "") -> None:
        """Start the daemon and wait until it says that it is ready."""
        ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        path = str(self.directory / "notify")
        Path(path).unlink(missing_ok=True)
        ready.bind(path)
        ready.settimeout(START_DEADLINE)
        environment = dict(os.environ, NOTIFY_SOCKET=path, **{VARIABLE: faultpoints})
        with self.log.open("ab") as log, ready:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "vmbackupd",
                    "--config",
                    str(self.config),
                    "--bus-address",
                    self.lab.bus_address,
                ],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
            outliving.PIDS.add(self.process.pid)
            while b"READY=1" not in ready.recv(4096):
                assert self.process.poll() is None, self.tail()

    def restart(self, faultpoints: str = "") -> None:
        self.stop()
        self.start(faultpoints)

    def stop(self) -> None:
        """End the daemon in order; fails when it does not end well."""
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            status = process.wait(timeout=60)
            assert status == 0, f"the daemon ended with {status}:\n{self.tail()}"

    def storage_daemons(self) -> list[str]:
        """Command lines of its qemu-storage-daemons; others on this machine may belong to another test session."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # ended meanwhile
            if "qemu-storage-daemon" in words.split(" ")[0] and f" {self.lab.dir}/" in words:
                found.append(words)
        return found

    def signal(self, number: signal.Signals) -> None:
        """Send the daemon a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def killed_in(self, *words: str) -> None:
        """Run ``vmbackupctl`` with ``words``, in which a fault point kills the daemon. A daemon that lives on is ended:
        it would die under another test."""
        done = self.run(*words)
        assert self.process is not None
        try:
            status = self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.stop()
            raise AssertionError(f"no fault point was reached:\n{done.stdout}{done.stderr}\n{self.tail()}") from None
        self.process = None
        assert status == -signal.SIGKILL, f"the daemon ended with {status}:\n{self.tail()}"

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-6000:] if self.log.exists() else ""

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run ``vmbackupctl`` with ``words``."""
        return subprocess.run(
            [sys.executable, "-m", "vmbackupd.cli", "--bus-address", self.lab.bus_address, *words],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_DEADLINE,
            stdin=subprocess.DEVNULL,
        )

    def begin(self, *words: str) -> subprocess.Popen[str]:
        """Start ``vmbackupctl`` with ``words`` and ``--json`` and go on; :meth:`end` waits for it."""
        argv = [sys.executable, "-m", "vmbackupd.cli", "--bus-address", self.lab.bus_address, *words, "--json"]
        return subprocess.Popen(
            argv, cwd=ROOT, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def end(self, command: subprocess.Popen[str], status: int = 0) -> Any:
        """The JSON of a command that was begun."""
        out, err = command.communicate(timeout=COMMAND_DEADLINE)
        return self._parsed(command.args, command.returncode, out, err, status)

    def _parsed(self, words: object, returncode: int, out: str, err: str, status: int) -> Any:
        if returncode != status:
            raise CommandError(
                f"{words} ended with {returncode}, expected {status}:\n{out}{err}\ndaemon:\n{self.tail()}"
            )
        return json.loads(out) if out.strip() else None

    def ctl(self, *words: str, status: int = 0) -> Any:
        """The JSON that ``vmbackupctl --json`` prints; fails unless it ends with ``status``."""
        done = self.run(*words, "--json")
        return self._parsed(done.args, done.returncode, done.stdout, done.stderr, status)

    def backup_under(self, workload: Workload, *options: str) -> tuple[str, range]:
        """A backup of the writer's guest while it writes: its id, and the records that its logs may end with."""
        workload.start(interval=0.02)
        try:
            before = workload.round()
            backup = self.ctl("backup", workload.guest.name, *options)["backup"]
            return backup, range(before, workload.round() + 2)
        finally:
            workload.stop()

    def restore_files(self, backup: str, name: str, to: Path) -> dict[str, Path]:
        """Restore every volume of ``backup`` to new files below ``to``; volume id -> file."""
        volumes = self.ctl("show", backup)["volumes"]
        outside = [volume["id"] for volume in volumes if volume["kind"] == "pass-through"]
        files = {ident: to / f"{number}.raw" for number, ident in enumerate(outside)}
        words = [word for ident, path in files.items() for word in ("--volume", f"{ident}={path}")]
        self.ctl("restore", backup, "--name", name, "--to", str(to), *words)
        inside = [volume["id"] for volume in volumes if volume["kind"] == "virtual"]
        return files | {ident: to / f"{ident}.qcow2" for ident in inside}

    def fails(self, *words: str) -> tuple[str, str]:
        """``(code, message)`` of the error a command that must fail with status 1 reports."""
        error = self.ctl(*words, status=1)["error"]
        return error["code"], error["message"]


class Pause:
    """A fault point at which the daemon waits: ``Pause(directory, point).fault`` for :meth:`Service.restart`."""

    def __init__(self, directory: Path, point: str) -> None:
        self._directory, self._point = directory, point
        self.fault = f"{point}=pause:{directory}"

    def wait(self, command: subprocess.Popen[str] | None = None) -> None:
        """Wait until the daemon has come there, or ``command``, which shall bring it there, has ended."""
        reached = self._directory / f"{self._point}.reached"
        until(
            lambda: reached.exists() or (command is not None and command.poll() is not None),
            COMMAND_DEADLINE,
            f"the daemon reaches {self._point}",
            0.05,
        )

    def go(self) -> None:
        """Let it go on."""
        (self._directory / f"{self._point}.go").touch()

    def again(self) -> None:
        """The next job, too, waits there. For between two jobs."""
        for what in ("reached", "go"):
            (self._directory / f"{self._point}.{what}").unlink(missing_ok=True)
