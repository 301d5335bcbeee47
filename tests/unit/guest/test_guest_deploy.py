"""Starting the helper through a guest agent that refuses, fails, lies or never ends."""

from __future__ import annotations

import asyncio
import base64
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from vmbackupd.errors import GuestAgentRefused, GuestHelperUnavailable, GuestProtocolError
from vmbackupd.guest import client, deploy

INFO = {"supported_commands": [{"name": "guest-exec", "enabled": True, "success-response": True}]}


class Agent:
    """Answers what it is told to; ``calls`` are the commands it was sent."""

    def __init__(self, **answers: object) -> None:
        self.answers = {"guest_info": INFO, "guest_exec": {"pid": 7}, **answers}
        self.calls: list[tuple[str, Mapping[str, object] | None]] = []

    async def __call__(self, command: str, arguments: Mapping[str, object] | None, timeout: float) -> object:
        self.calls.append((command, arguments))
        answer = self.answers[command.replace("-", "_")]
        if isinstance(answer, BaseException):
            raise answer
        return answer


class LocalAgent(Agent):
    """Runs what it is asked to, on this machine."""

    async def __call__(self, command: str, arguments: Mapping[str, object] | None, timeout: float) -> object:
        if command == "guest-exec":
            assert arguments is not None
            argv = [str(arguments["path"]), *arguments["arg"]]  # type: ignore[misc]
            data = base64.b64decode(str(arguments["input-data"]))
            done = await asyncio.to_thread(subprocess.run, argv, input=data, capture_output=True, timeout=60)
            self.answers["guest_exec_status"] = {
                "exited": True,
                "exitcode": done.returncode,
                "err-data": base64.b64encode(done.stderr).decode(),
            }
        return await super().__call__(command, arguments, timeout)


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        ({"exited": True, "exitcode": deploy.NO_PYTHON}, GuestHelperUnavailable, "python3"),
        (
            {"exited": True, "exitcode": 1, "err-data": encoded("no space\nleft")},
            GuestHelperUnavailable,
            "status 1.: no space left",
        ),
        ({"exited": True, "exitcode": 1, "out-data": encoded("x" * 10000)}, GuestHelperUnavailable, "x{400}$"),
        ({"exited": True, "signal": 9}, GuestHelperUnavailable, "killed"),
        ({"exited": False}, GuestHelperUnavailable, "within 0.1 s"),
        ({"exited": True, "exitcode": 1, "err-data": "%%%"}, GuestProtocolError, "base64"),
        ({"exited": True, "exitcode": "0"}, GuestProtocolError, "exitcode"),
        ({}, GuestProtocolError, "exited"),
        ([], GuestProtocolError, "object"),
        (None, GuestProtocolError, "object"),
    ],
)
def test_what_the_agent_says_of_the_end(status: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        asyncio.run(deploy.release(Agent(guest_exec_status=status), vm="vm", job="j01234567", timeout=0.1))


@pytest.mark.parametrize(
    ("info", "may"),
    [
        (INFO, True),
        ({"supported_commands": []}, False),
        ({"supported_commands": [{"name": "guest-exec", "enabled": False}]}, False),
        ({"supported_commands": [None, 7, {}]}, False),
    ],
)
def test_whether_the_agent_runs_programs(info: object, may: bool) -> None:
    assert asyncio.run(deploy.may_execute(Agent(guest_info=info))) is may


@pytest.mark.parametrize(
    "answers",
    [
        {"guest_info": {"supported_commands": []}},
        {"guest_exec": GuestAgentRefused("Command guest-exec has been disabled")},
    ],
)
def test_refused_and_nothing_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: dict[str, object]
) -> None:
    monkeypatch.setattr(client, "INSTALLED_TIMEOUT", 0.1)
    start = client.GuestHelper.start(
        Agent(**answers), str(tmp_path / "none"), vm="vm", job="j01234567", channel="org.vmbackupd.j01234567.c"
    )
    with pytest.raises(GuestAgentRefused, match="vmbackupd-guest"):
        asyncio.run(start)


def test_malformed_info() -> None:
    for info in (None, [], {}, {"supported_commands": 7}):
        with pytest.raises(GuestProtocolError):
            asyncio.run(deploy.may_execute(Agent(guest_info=info)))


@pytest.mark.skipif(os.geteuid() != 0, reason="the helper runs as root")
def test_one_shot_leaves_no_file() -> None:
    """The script itself, on this machine."""
    before = set(Path("/run").glob("vmbackupd-*"))
    asyncio.run(client.remove_leftovers(LocalAgent(), vm="vm", job="jffffffff"))
    assert set(Path("/run").glob("vmbackupd-*")) == before


def test_one_shot_tells_why_it_failed() -> None:
    with pytest.raises(GuestHelperUnavailable, match="not a job id"):
        asyncio.run(deploy.release(LocalAgent(), vm="vm", job="what", timeout=60))
