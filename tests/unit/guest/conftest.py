"""A real helper process on a unix socket in place of a virtio-serial port."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.guest.support import Start, listen
from vmbackupd.guest.deploy import build_zipapp


@pytest.fixture
def zipapp(tmp_path: Path) -> Path:
    """The helper as it is pushed into guests."""
    path = tmp_path / "helper.pyz"
    path.write_bytes(build_zipapp())
    return path


@pytest.fixture
def start_helper(tmp_path: Path, zipapp: Path) -> Iterator[Start]:
    """``start_helper("--lease", "5", python=...)``: a helper that listens on ``tmp_path / "control"``."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, python: str = sys.executable, keep: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        with listen(tmp_path / "control") as sock:
            process = subprocess.Popen(
                [python, str(zipapp), "--fd", str(sock.fileno()), "--allow-files", *arguments],
                pass_fds=(sock.fileno(), *keep),
            )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
