"""Talking to a guest agent on its port's socket. The guest is not trusted: these agents are good, deaf and hostile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vmbackupd.errors import GuestAgentRefused, GuestAgentUnavailable, HypervisorError
from vmbackupd.hypervisor import guestagent
from vmbackupd.hypervisor.guestagent import GuestAgent

Answer = Callable[[dict[str, Any]], bytes | None]


def conversation(path: Path, answer: Answer, work: Callable[[GuestAgent], Awaitable[None]], *, stale: bytes = b"",
                 ) -> list[list[str]]:
    """``work`` with an agent that gives these answers (None: it hangs up); the commands of each connection."""
    connections: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard: list[str] = []
        connections.append(heard)
        writer.write(stale)
        while line := await reader.readline():
            request = json.loads(line.lstrip(b"\xff"))
            if request["execute"] == "guest-sync-delimited":
                writer.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
                continue
            heard.append(request["execute"])
            told = answer(request)
            if told is None:
                break
            writer.write(told)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_unix_server(serve, path)
        agent = GuestAgent("web1", str(path))
        try:
            await asyncio.wait_for(work(agent), 30)
        finally:
            await agent.close()
            server.close()
            await server.wait_closed()

    asyncio.run(main())
    return connections


def returned(value: object) -> bytes:
    return json.dumps({"return": value}).encode() + b"\n"


def refused(text: str) -> bytes:
    return json.dumps({"error": {"class": "GenericError", "desc": text}}).encode() + b"\n"


def test_answers_and_one_connection_for_commands_in_a_row(tmp_path: Path) -> None:
    async def work(agent: GuestAgent) -> None:
        assert await agent.ask("guest-exec", {"path": "/bin/true"}, 5) == {"path": "/bin/true"}
        assert await agent.ask("guest-ping", None, 5) is None

    heard = conversation(tmp_path / "s", lambda request: returned(request.get("arguments")), work)
    assert heard == [["guest-exec", "guest-ping"]]


@pytest.mark.parametrize("stale", [
    b'{"return": {"half an ans', b'\xff{"return": 5}\n', b'{"return": 1}\n\xff{"return": 2}\n', b"\xff\xff\n",
    b'\xff{"return": {"half', b"\xff[]\n{}\n"])
def test_what_an_earlier_client_left_is_passed_over(tmp_path: Path, stale: bytes) -> None:
    async def work(agent: GuestAgent) -> None:
        assert await agent.ask("guest-ping", None, 5) == {}

    conversation(tmp_path / "s", lambda _: returned({}), work, stale=stale)


@pytest.mark.parametrize(("text", "kind", "words"), [
    ("Command guest-exec has been disabled: the agent is in frozen state", GuestAgentUnavailable, "is frozen"),
    ("Command guest-exec has been disabled: the command is not allowed", GuestAgentRefused, "not allowed"),
    ("The command guest-exec has not been found", GuestAgentRefused, "not been found"),
    ("failed to open file", HypervisorError, "VM web1: guest agent: guest-exec: failed to open file")])
def test_refusals_are_told_apart(tmp_path: Path, text: str, kind: type[Exception], words: str) -> None:
    async def work(agent: GuestAgent) -> None:
        with pytest.raises(kind, match=words) as caught:
            await agent.ask("guest-exec", {}, 5)
        assert type(caught.value) is kind

    conversation(tmp_path / "s", lambda _: refused(text), work)


@pytest.mark.parametrize("answer", [
    b"no json\n", b"[]\n", b"{}\n", b'{"error": 5}\n', b'{"error": {"desc": 7}}\n', b"[" * 100_000 + b"\n",
    b'{"return": NaN}\n', b"\xff\xfe\n", b"x" * 5000 + b"\n"])
def test_nonsense_is_an_error_and_the_connection_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(guestagent, "ANSWER_LIMIT", 200_000)

    async def work(agent: GuestAgent) -> None:
        with pytest.raises(HypervisorError if b"error" in answer else GuestAgentUnavailable):
            await agent.ask("guest-nonsense", None, 5)
        assert await agent.ask("guest-ping", None, 5) == {}

    answers = {"guest-nonsense": answer, "guest-ping": returned({})}
    conversation(tmp_path / "s", lambda request: answers[request["execute"]], work)


def test_an_answer_without_an_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guestagent, "ANSWER_LIMIT", 10_000)

    async def work(agent: GuestAgent) -> None:
        with pytest.raises(GuestAgentUnavailable):
            await agent.ask("guest-exec-status", None, 5)

    conversation(tmp_path / "s", lambda _: b"x" * 100_000, work)


def test_an_agent_that_is_silent_and_one_that_hangs_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guestagent, "SYNC", 0.2)

    async def work(agent: GuestAgent) -> None:
        with pytest.raises(GuestAgentUnavailable, match=r"no answer within 0\.4 s: no agent runs in the guest, or "):
            await agent.ask("guest-silent", None, 0.2)
        with pytest.raises(GuestAgentUnavailable):
            await agent.ask("guest-gone", None, 5)
        assert await agent.ask("guest-ping", None, 5) == {}

    answers: dict[str, bytes | None] = {"guest-silent": b"", "guest-gone": None, "guest-ping": returned({})}
    heard = conversation(tmp_path / "s", lambda request: answers[request["execute"]], work)
    assert heard == [["guest-silent"], ["guest-gone"], ["guest-ping"]]


def test_nobody_listens(tmp_path: Path) -> None:
    async def main() -> None:
        agent = GuestAgent("web1", str(tmp_path / "nothing"))
        with pytest.raises(GuestAgentUnavailable, match="nothing"):
            await agent.ask("guest-ping", None, 1)

    asyncio.run(main())
