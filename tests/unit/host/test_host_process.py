"""Programs run to their end, in time, and children that die with their parent."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmbackupd.host.process import Child, CommandFailed, run


def gone(pid: int) -> bool:
    """Whether the process ended; a zombie that nobody of ours has to wait for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def until(done, seconds: float = 10.0) -> bool:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(done())


def test_output_and_input_are_bytes() -> None:
    result = asyncio.run(run(["cat"], stdin=b"\0\xff\n", timeout=10))
    assert (result.status, result.stdout, result.stderr) == (0, b"\0\xff\n", "")


def test_an_unexpected_status_is_an_error_with_stderr_in_it() -> None:
    with pytest.raises(CommandFailed, match=r"sh -c .*: exit status 3: no such thing") as caught:
        asyncio.run(run(["sh", "-c", "echo no such thing >&2; exit 3"], timeout=10))
    assert (caught.value.status, caught.value.stderr) == (3, "no such thing")
    assert asyncio.run(run(["sh", "-c", "exit 3"], timeout=10, ok=(0, 3))).status == 3


def test_a_signal_is_named() -> None:
    with pytest.raises(CommandFailed, match="killed by signal 9"):
        asyncio.run(run(["sh", "-c", "kill -9 $$"], timeout=10))


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(CommandFailed, match="cannot start it: No such file"):
        asyncio.run(run(["/nonexistent/program"], timeout=10))


def test_words_are_never_shell() -> None:
    assert asyncio.run(run(["echo", "$(id); *"], timeout=10)).stdout == b"$(id); *\n"


def test_the_deadline_kills() -> None:
    async def main() -> float:
        began = time.monotonic()
        with pytest.raises(CommandFailed, match="did not end within 0.2 s"):
            await run(["sleep", "60"], timeout=0.2)
        return time.monotonic() - began

    assert asyncio.run(main()) < 10


def test_a_cancelled_caller_leaves_no_process(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"

    async def main() -> None:
        script = f"echo $$ > {pidfile}.new; mv {pidfile}.new {pidfile}; exec sleep 60"
        task = asyncio.create_task(run(["sh", "-c", script], timeout=60))
        while not pidfile.exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert gone(int(pidfile.read_text()))


def test_messages_are_in_one_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert asyncio.run(run(["sh", "-c", "echo $LC_ALL"], timeout=10)).stdout == b"C\n"


def test_a_child_keeps_the_descriptors_it_is_given_and_ends_on_request() -> None:
    async def main() -> None:
        here, there = os.pipe()
        child = await Child.spawn(
            ["sh", "-c", f"echo warned >&2; echo hello > /proc/self/fd/{there}; exec sleep 60"], pass_fds=[there])
        os.close(there)
        assert await asyncio.to_thread(os.read, here, 100) == b"hello\n"
        os.close(here)
        await child.stop("terminate", 5)
        assert child.status == -15
        assert "warned" in str(child.failure("went"))
        await child.stop("terminate", 5)  # again is no error

    asyncio.run(main())


def test_a_child_that_ignores_sigterm_is_killed() -> None:
    async def main() -> int | None:
        here, there = os.pipe()
        program = f"import os, signal, time; signal.signal(15, 1); os.write({there}, b'x'); time.sleep(60)"
        child = await Child.spawn([sys.executable, "-c", program], pass_fds=[there])
        await asyncio.to_thread(os.read, here, 1)
        os.close(here)
        os.close(there)
        await child.stop("terminate", 0.2)
        return child.status

    assert asyncio.run(main()) == -9


PARENT = """
import asyncio, os, sys
from vmbackupd.host.process import Child

async def main():
    child = await Child.spawn(["sleep", "300"])
    while "sleep" not in open(f"/proc/{child.pid}/comm").read():
        await asyncio.sleep(0.01)
    print(child.pid, flush=True)
    await asyncio.sleep(300)

asyncio.run(main())
"""


def test_a_child_dies_with_its_killed_parent() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
    assert until(lambda: gone(pid))
