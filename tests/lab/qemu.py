"""QEMU processes that no libvirt runs: their command lines, and a monitor of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.lab.services import LabError, until

AGENT_PORT = "org.qemu.guest_agent.0"


class Monitor:
    """A QMP client for tests: one command after the other, events passed over. Raises LabError with QEMU's error."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rwb")
        self._stream.readline()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """The ``return`` value. Underscores in argument names become dashes."""
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._stream.write(json.dumps({"execute": command, "arguments": words}).encode() + b"\n")
        self._stream.flush()
        while True:
            answer = json.loads(self._stream.readline())
            if "error" in answer:
                raise LabError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


@contextlib.contextmanager
def monitor(path: Path) -> Iterator[Monitor]:
    """A block with a connection to the monitor at ``path``."""
    opened = Monitor(path)
    try:
        yield opened
    finally:
        opened.close()


class Qemu:
    """One QEMU process with two monitors: ``qmp`` for the service under test, ``own`` for the test. Its sockets lie in
    ``directory``, whose path has to be short."""

    def __init__(self, name: str, directory: Path, words: Sequence[str | Path], *, uuid: str | None = None) -> None:
        self.name, self.directory, self.uuid = name, directory, uuid
        self.qmp, self.own = directory / f"{name}.qmp", directory / f"{name}.own"
        self.agent = directory / f"{name}.agent"
        self.argv = [
            "qemu-system-x86_64", "-name", name, "-nodefaults", "-display", "none", "-no-user-config",
            *(["-uuid", uuid] if uuid else []),
            "-qmp", f"unix:{self.qmp},server=on,wait=off", "-qmp", f"unix:{self.own},server=on,wait=off",
            *(str(word) for word in words),
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def agent_words(self) -> list[str]:
        """The guest agent's port, for a machine with a virtio-serial controller."""
        return [
            "-chardev", f"socket,path={self.agent},server=on,wait=off,id=agent",
            "-device", f"virtserialport,chardev=agent,name={AGENT_PORT},id=agentport",
        ]  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until it answers."""
        for path in (self.qmp, self.own):
            path.unlink(missing_ok=True)  # a QEMU that was killed leaves its sockets
        self.process = subprocess.Popen(self.argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, cwd=self.directory)
        until(self._listens, 30, f"QEMU {self.name} listens")

    def _listens(self) -> bool:
        assert self.process is not None and self.process.stderr is not None
        if self.process.poll() is not None:
            raise LabError(f"QEMU {self.name} ended: {self.process.stderr.read().decode()}")
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.own))
            except OSError:
                return False
        return True

    def kill(self) -> None:
        """End it like a crash would."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.wait()

    def wait(self) -> None:
        """Wait for its end."""
        assert self.process is not None and self.process.stderr is not None
        self.process.wait(60)
        self.process.stderr.close()
        self.process = None

    def execute(self, command: str, **arguments: Any) -> Any:
        """A command on the test's own monitor."""
        with monitor(self.own) as opened:
            return opened.execute(command, **arguments)

    def write(self, device: str, number: int, at: str, length: str) -> None:
        """Write a byte pattern as the guest's device ``device`` (a path in QEMU's object tree) would, and flush."""
        for command in (f"write -P {number} {at} {length}", "flush"):
            said = self.execute("human-monitor-command", command_line=f'qemu-io -d {device} "{command}"')
            assert not said, said  # what qemu-io has to say goes to the stdout of QEMU

    def close(self) -> None:
        self.kill()
        for path in (self.qmp, self.own, self.agent):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
