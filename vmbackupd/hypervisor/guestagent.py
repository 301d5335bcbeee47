"""qemu-guest-agent (qemu: qga/qapi-schema.json): what its refusals mean, and talking to it on a socket of its port.

The guest is not trusted: an answer is bounded, and parsed as one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Mapping

from vmbackupd.errors import BackupError, GuestAgentRefused, GuestAgentUnavailable, HypervisorError
from vmbackupd.typed import parse_object

AGENT_PORT = "org.qemu.guest_agent.0"
ANSWER_LIMIT = 64 << 20  # bytes; guest-exec keeps 16 MiB of each output, in base64
SYNC = 5.0  # seconds an agent that runs has for its first answer, on top of the command's own time
IDLE = 10.0
SENTINEL = b"\xff"  # in no JSON; the agent's parser starts anew behind it, and it sends one before a delimited answer


def refusal(text: str, what: str) -> BackupError | None:
    """An agent's error ``text`` where it means that a command is not to be had; ``what`` begins the message.

    The agent tells it in words only (qga/main.c, qapi/qmp-dispatch.c): "Command X has been disabled[: the command is
    not allowed | for this instance]", "The command X has not been found", and while the guest is frozen "Command X has
    been disabled: the agent is in frozen state".
    """
    if "frozen state" in text:
        return GuestAgentUnavailable(f"{what}: the guest is frozen ({text})")
    if "has been disabled" in text or "has not been found" in text:
        return GuestAgentRefused(f"{what}: {text}")
    return None


class GuestAgent:
    """The agent behind the unix socket at ``path``, one command at a time.

    A port serves one client, and a guest's agent needs a moment to notice a new one, so that the connection is kept for
    ``IDLE`` seconds.
    """

    def __init__(self, machine: str, path: str) -> None:
        self._machine = machine
        self.path = path
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._idle: asyncio.TimerHandle | None = None

    async def ask(self, command: str, arguments: Mapping[str, object] | None, timeout: float) -> object:
        """The ``return`` value of a command. Raises ``GuestAgentUnavailable``, ``GuestAgentRefused``, and
        ``HypervisorError`` for what the command itself fails with."""
        what = f"VM {self._machine}: guest agent: {command}"
        request: dict[str, object] = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        async with self._lock:
            self._stay()
            try:
                answer = await asyncio.wait_for(self._exchange(request), timeout + SYNC)
            except TimeoutError:
                self._drop()
                raise GuestAgentUnavailable(
                    f"{what}: no answer within {timeout + SYNC:g} s: no agent runs in the guest, or another program"
                    f" holds the port's socket {self.path}") from None
            except (OSError, EOFError, asyncio.LimitOverrunError, ValueError) as error:
                self._drop()
                raise GuestAgentUnavailable(f"{what}: {self.path}: {error}") from error
            except BaseException:
                self._drop()  # half an answer may be on its way
                raise
            finally:
                self._leave()
        if "error" in answer:
            text = _reason(answer["error"])
            raise refusal(text, what) or HypervisorError(f"{what}: {text}")
        if "return" not in answer:
            raise GuestAgentUnavailable(f"{what}: its answer makes no sense: {str(answer)[:200]!r}")
        return answer["return"]

    async def _exchange(self, request: Mapping[str, object]) -> dict[str, object]:
        if self._streams is not None and self._streams[0].at_eof():
            self._drop()
        if self._streams is None:
            self._streams = await self._connect()
        reader, writer = self._streams
        writer.write(json.dumps(request).encode() + b"\n")
        return _parsed(await reader.readuntil(b"\n"))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect, and pass over whatever an earlier client left unread."""
        reader, writer = await asyncio.open_unix_connection(self.path, limit=ANSWER_LIMIT)
        number = secrets.randbits(31)
        try:
            sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
            writer.write(SENTINEL + json.dumps(sync).encode() + b"\n")
            await reader.readuntil(SENTINEL)
            while _synchronised(await reader.readuntil(b"\n")) != number:
                pass
        except BaseException:
            writer.close()
            raise
        return reader, writer

    def _stay(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _leave(self) -> None:
        if self._streams is not None:
            self._idle = asyncio.get_running_loop().call_later(IDLE, self._drop)

    def _drop(self) -> None:
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()

    async def close(self) -> None:
        """Let go of the port. Can be called again."""
        self._stay()
        streams, self._streams = self._streams, None
        if streams is not None:
            streams[1].close()
            try:
                await streams[1].wait_closed()
            except OSError:
                pass


def _synchronised(line: bytes) -> object:
    """The number that a line answers to a sync, None where it is something else that lay in the port."""
    try:
        return _parsed(line.rpartition(SENTINEL)[2]).get("return")
    except ValueError:
        return None


def _reason(error: object) -> str:
    text = error.get("desc") if isinstance(error, dict) else None
    return text if isinstance(text, str) and text else "no reason"


def _parsed(line: bytes) -> dict[str, object]:
    return parse_object(line, what="the answer of the guest agent", max_length=ANSWER_LIMIT)
