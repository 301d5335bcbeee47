"""The writer at work in a guest, seen from the host."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab import writer
from tests.lab.guest import LOGS, Guest
from tests.lab.services import until

SCRIPT = "/run/lab-writer.py"  # tmpfs: no backup holds it
UNIT = "lab-writer"


class Workload:
    """Writes to the volumes ``names`` (keys of guest.LOGS, in this order) of a guest, then to ``more``: name → log."""

    def __init__(self, guest: Guest, names: Sequence[str] = tuple(LOGS), more: Mapping[str, str] | None = None) -> None:
        logs = {name: LOGS[name] for name in names} | dict(more or {})
        self.guest, self.names, self.logs = guest, tuple(logs), list(logs.values())

    def install(self) -> None:
        """Put the program into the guest, for writing or checking."""
        self.guest.write_file(SCRIPT, Path(writer.__file__).read_bytes())

    def start(self, *, interval: float = 0.0) -> None:
        """Start new logs and return when the first records are written. ``interval``: rest after each round, s."""
        self.stop()
        self.install()
        # Logs of an earlier run would be taken for the new ones until the writer has come to truncate them.
        self.guest.exec(["rm", "-f", *self.logs])
        self.guest.exec(
            [
                "systemd-run",
                "--collect",
                "--quiet",
                f"--unit={UNIT}",
                "python3",
                SCRIPT,
                f"--interval={interval}",
                *self.logs,
            ]
        )
        self.wait(2)

    def stop(self) -> None:
        """Stop writing; no error if nothing runs."""
        self.guest.exec(f"systemctl stop {UNIT} 2>/dev/null || true")

    def round(self) -> int:
        """Number of the last record that is in every log."""
        size = self.guest.exec(f"stat -c %s {self.logs[-1]} 2>/dev/null || echo 0")
        return int(size) // writer.RECORD

    def wait(self, number: int, timeout: float = 120.0) -> None:
        """Wait until record ``number`` is in every log. Raises LabError."""
        until(lambda: self.round() >= number, timeout, f"{self.guest.name}: the writer's record {number}", 0.2)

    def check(self, guest: Guest | None = None) -> dict[str, writer.Log]:
        """Verify all logs in the running ``guest`` (default: where they were written), volume → Log. Raises
        CommandFailed.

        Stop the writer first, unless it is another guest: a restored copy.
        """
        there = guest or self.guest
        there.write_file(SCRIPT, Path(writer.__file__).read_bytes())
        told = json.loads(there.exec(["python3", SCRIPT, "--check", *self.logs], timeout=300))
        return {name: writer.Log(**told[path]) for name, path in zip(self.names, self.logs, strict=True)}
