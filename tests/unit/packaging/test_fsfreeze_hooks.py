"""The example hooks for databases, with stand-ins for the clients they call."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.lab.services import until

HOOKS = Path(__file__).parents[3] / "packaging/guest/fsfreeze-hook.d"
STATE = Path("/run/fsfreeze-hook-mariadb")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="hooks run as root")

CLIENT = """#!/bin/sh
while read -r line; do
    echo "$line" >> {directory}/asked
    {answer}
done
echo ended >> {directory}/asked
"""


def run(hook: str, argument: str, directory: Path, answer: str = "") -> int:
    """The exit status of a hook whose client answers each line with a shell command."""
    client = directory / "mariadb"
    client.write_text(CLIENT.format(directory=directory, answer=answer))
    client.chmod(0o755)
    environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}"}
    words = [str(HOOKS / hook), argument]
    return subprocess.run(words, env=environment, check=False, timeout=60, stdout=subprocess.DEVNULL).returncode


def test_the_read_lock_is_held_from_freeze_to_thaw(tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    assert run("mariadb", "freeze", tmp_path, "echo locked") == 0
    assert "FLUSH TABLES WITH READ LOCK" in asked.read_text() and "ended" not in asked.read_text()
    assert run("mariadb", "thaw", tmp_path) == 0
    until(lambda: "ended" in asked.read_text(), 10, "the session has ended")
    assert not STATE.exists()


def test_a_thaw_without_a_freeze_is_no_error(tmp_path: Path) -> None:
    assert run("mariadb", "thaw", tmp_path) == 0


def test_a_server_that_gives_no_lock_is_told_of(tmp_path: Path) -> None:
    assert run("mariadb", "freeze", tmp_path, "echo ERROR 1205; exit 1") == 1
    assert not STATE.exists()


def test_without_postgresql_its_hook_does_nothing(tmp_path: Path) -> None:
    assert run("postgresql", "freeze", tmp_path) == run("postgresql", "thaw", tmp_path) == 0
