"""Other programs: run to their end, or kept as a child that dies with us.

The only place that starts processes. Commands are argument vectors, never shell text; each has a deadline, and what a
failed one wrote to stderr is in the error.
"""

from __future__ import annotations

import asyncio
import os
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from vmbackupd.errors import BackupError

STDERR_LIMIT = 64 * 1024
KILL_WAIT = 10.0


class CommandFailed(BackupError):
    """A program could not be started, ended with an unexpected status, or did not end in time.

    ``status`` is its exit status (negative: the signal that ended it), None when it has none.
    """

    code = "CommandFailed"

    def __init__(self, argv: Sequence[str], reason: str, *, status: int | None = None, stderr: str = "") -> None:
        words = stderr.strip()
        super().__init__(f"{shlex.join(argv)}: {reason}" + (f": {words}" if words else ""))
        self.status = status
        self.stderr = words


@dataclass(frozen=True, slots=True)
class Finished:
    """What a program left behind."""

    status: int
    stdout: bytes
    stderr: str


def _environment() -> dict[str, str]:
    # Messages end up in errors and are matched against: one language.
    return {**os.environ, "LC_ALL": "C"}


async def run(argv: Sequence[str], *, timeout: float, stdin: bytes | None = None,
              ok: Collection[int] = (0,)) -> Finished:
    """Run ``argv`` to its end within ``timeout`` seconds.

    Raises ``CommandFailed`` when it cannot start, when its exit status is not in ``ok``, or on the deadline (the
    process is killed then, as it is when the caller is cancelled).
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, env=_environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE)
    except OSError as error:
        raise CommandFailed(argv, f"cannot start it: {error.strerror}") from error
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin), timeout)
    except TimeoutError:
        raise CommandFailed(argv, f"did not end within {timeout:g} s") from None
    finally:
        await _end(process)
    stderr = err.decode(errors="replace")
    status = process.returncode
    assert status is not None
    if status not in ok:
        raise CommandFailed(argv, _ending(status), status=status, stderr=stderr)
    return Finished(status, out, stderr)


def _ending(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    try:
        process.kill()
    except ProcessLookupError:
        pass
    try:
        await asyncio.wait_for(process.wait(), KILL_WAIT)
    except TimeoutError:
        pass  # uninterruptible in the kernel: nothing a user of this process could still wait for


class Child:
    """A long-running program that the kernel kills when we die. Made by :meth:`spawn`."""

    def __init__(self, argv: Sequence[str], process: asyncio.subprocess.Process) -> None:
        self.argv = tuple(argv)
        self._process = process
        self._tail = b""
        self._reader = asyncio.create_task(self._read_stderr(), name=f"stderr of {argv[0]}")

    @classmethod
    async def spawn(cls, argv: Sequence[str], *, pass_fds: Sequence[int] = ()) -> Child:
        """Start ``argv``; the file descriptors in ``pass_fds`` keep their numbers in it.

        Call it from the thread that lives as long as the daemon (the event loop in the main thread): the kernel's
        parent-death signal goes by the parent *thread*.
        """
        full = ("setpriv", "--pdeathsig", "KILL", "--", *argv)
        try:
            process = await asyncio.create_subprocess_exec(
                *full, env=_environment(), stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE, pass_fds=tuple(pass_fds))
        except OSError as error:
            raise CommandFailed(full, f"cannot start it: {error.strerror}") from error
        return cls(argv, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Exit status, None while it runs."""
        return self._process.returncode

    @property
    def stderr(self) -> str:
        """The last it wrote to stderr."""
        return self._tail.decode(errors="replace").strip()

    async def wait(self, timeout: float) -> int:
        """Wait for its end. Raises ``TimeoutError``."""
        status = await asyncio.wait_for(self._process.wait(), timeout)
        await asyncio.wait({self._reader}, timeout=KILL_WAIT)
        return status

    async def stop(self, how: Literal["terminate", "kill"], timeout: float) -> None:
        """Send the signal and wait; a program that does not follow ``terminate`` in time is killed."""
        try:
            if self._process.returncode is None and how == "terminate":
                self._process.terminate()
                await self.wait(timeout)
        except (TimeoutError, ProcessLookupError):
            pass
        finally:
            await _end(self._process)
            self._reader.cancel()
            await asyncio.wait({self._reader}, timeout=KILL_WAIT)

    def failure(self, reason: str) -> CommandFailed:
        """An error about this program, with what it wrote to stderr."""
        return CommandFailed(self.argv, reason, status=self.status, stderr=self.stderr)

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while data := await self._process.stderr.read(4096):
            self._tail = (self._tail + data)[-STDERR_LIMIT:]
