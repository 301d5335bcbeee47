"""vmbackupctl on a terminal: the progress bar, and what Ctrl-C asks."""

from __future__ import annotations

import asyncio
import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.unit.api.support import DEADLINE, cli_command, cli_environment, served


class Terminal:
    """A pseudo-terminal with a process on it, read and typed into by the test."""

    def __init__(self, process: asyncio.subprocess.Process, fd: int) -> None:
        self.process = process
        self.fd = fd
        self.text = ""
        self._news = asyncio.Event()
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # the process is gone
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self.fd)
        self.text += data.decode(errors="replace")
        self._news.set()

    async def wait_for(self, words: str) -> None:
        """Wait until ``words`` are on the screen, then forget what is before their end."""
        async with asyncio.timeout(DEADLINE):
            while words not in self.text:
                self._news.clear()
                await self._news.wait()
        self.text = self.text[self.text.index(words) + len(words):]

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    async def end(self) -> int:
        return await asyncio.wait_for(self.process.wait(), DEADLINE)


@asynccontextmanager
async def terminal(address: str, *arguments: str) -> AsyncIterator[Terminal]:
    """``vmbackupctl`` as the foreground process of a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    environment = cli_environment(address)
    del environment["COLUMNS"]
    process = await asyncio.create_subprocess_exec(
        *cli_command(*arguments), env=environment, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
    os.close(theirs)
    screen = Terminal(process, ours)
    try:
        yield screen
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(ours)
        os.close(ours)


def test_a_bar_is_drawn_and_cleared(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), terminal(address, "backup", "slow") as screen:
            await screen.wait_for("\r\x1b[K")
            await screen.wait_for("backup slow: passthrough-copy [#########...............]   40 %  400 B of 1000 B")
            runner.go.set()
            await screen.wait_for("\r\x1b[K")
            assert await screen.end() == 0

    asyncio.run(main())


def test_ctrl_c_then_yes_cancels(address: str) -> None:
    async def main() -> None:
        async with served(address) as (manager, _, _), terminal(address, "backup", "slow") as screen:
            await screen.wait_for("passthrough-copy")
            screen.type("\x03")
            await screen.wait_for("Cancel job")
            screen.type("y\n")
            await screen.wait_for("was cancelled; everything it did is undone")
            assert await screen.end() == 1
            assert [job.state.value for job in manager.jobs.values()] == ["cancelled"]

    asyncio.run(main())


def test_ctrl_c_then_no_goes_on_waiting(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), terminal(address, "backup", "slow") as screen:
            await screen.wait_for("passthrough-copy")
            screen.type("\x03")
            await screen.wait_for("let it run: ")
            screen.type("n\n")
            await screen.wait_for("n\r\n")
            runner.go.set()
            assert await screen.end() == 0

    asyncio.run(main())


def test_ctrl_c_twice_or_d_lets_the_job_run(address: str) -> None:
    async def main() -> None:
        async with served(address) as (manager, _, _):
            for answer in ("\x03", "d\n", "\x04"):
                async with terminal(address, "backup", f"slow{ord(answer[0])}") as screen:
                    await screen.wait_for("passthrough-copy")
                    screen.type("\x03")
                    await screen.wait_for("let it run: ")
                    screen.type(answer)
                    await screen.wait_for("goes on; see `vmbackupctl jobs`")
                    assert await screen.end() == 130
            assert {job.state.value for job in manager.jobs.values()} == {"running"}

    asyncio.run(main())


def test_a_job_that_ends_during_the_question_ends_it(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), terminal(address, "backup", "slow") as screen:
            await screen.wait_for("passthrough-copy")
            screen.type("\x03")
            await screen.wait_for("let it run: ")
            runner.go.set()
            assert await screen.end() == 0

    asyncio.run(main())
