"""Talking to systemd: a real datagram socket, a real stream where the journal would be."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.api.support import SmallRunner
from vmbackupd.daemon import sd
from vmbackupd.job.job import JobContext
from vmbackupd.job.manager import JobManager, Result

DEADLINE = 10.0


@pytest.fixture
def notify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket systemd would listen on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def drain(listener: socket.socket) -> list[str]:
    messages = []
    while select.select([listener], [], [], 0)[0]:
        messages.append(listener.recv(4096).decode())
    return messages


async def heard(listener: socket.socket, words: str) -> None:
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(DEADLINE):
        while words not in (await loop.sock_recv(listener, 4096)).decode():
            pass


def test_the_watchdog_is_fed_by_the_loop_and_starves_with_it(notify: socket.socket,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))

    async def main() -> None:
        notifier = sd.Notifier()
        notifier.start_watchdog()
        for _ in range(3):
            await heard(notify, "WATCHDOG=1")
        # The loop hangs from here on: what it said before may still arrive, then no sign of life comes for several
        # intervals.
        while select.select([notify], [], [], 0.1)[0]:
            drain(notify)
        assert select.select([notify], [], [], 0.3)[0] == []
        await heard(notify, "WATCHDOG=1")
        notifier.close()
        drain(notify)
        assert select.select([notify], [], [], 0.1)[0] == []

    asyncio.run(main())


@pytest.mark.parametrize(("usec", "pid", "expected"), [
    ("3000000", None, 1.0), ("3000000", "self", 1.0), ("3000000", "1", None), (None, None, None), ("0", None, None),
    ("soon", None, None),
])
def test_when_there_is_a_watchdog(monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None,
                                  expected: float | None) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", str(os.getpid()) if pid == "self" else pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert sd.watchdog_interval() == expected


def test_messages(notify: socket.socket) -> None:
    async def main() -> None:
        notifier = sd.Notifier()
        notifier.extend_timeout()
        notifier.status("two\nlines")
        notifier.ready("no job")
        notifier.stopping("bye")
        notifier.close()
        assert drain(notify) == [
            "EXTEND_TIMEOUT_USEC=60000000", "STATUS=two lines", "READY=1\nSTATUS=no job", "STOPPING=1\nSTATUS=bye",
            "EXTEND_TIMEOUT_USEC=60000000"]

    asyncio.run(main())


def test_a_stop_that_takes_long_asks_for_more_time(notify: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd, "EXTEND_EVERY", 0.01)

    async def main() -> None:
        notifier = sd.Notifier()
        notifier.stopping("undoing")
        for _ in range(3):
            await heard(notify, "EXTEND_TIMEOUT_USEC")
        notifier.close()

    asyncio.run(main())


def test_a_systemd_that_does_not_read_does_not_block_the_loop(notify: socket.socket) -> None:
    async def main() -> None:
        notifier = sd.Notifier()
        for number in range(10000):
            notifier.status(f"status {number}")
        heard = drain(notify)
        assert 0 < len(heard) < 10000 and heard[0] == "STATUS=status 0"
        notifier.status("again")
        notifier.close()
        assert drain(notify) == ["STATUS=again"]

    asyncio.run(main())


def test_a_listener_that_went_away_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    asyncio.run(_say_ready())
    monkeypatch.delenv("NOTIFY_SOCKET")
    asyncio.run(_say_ready())


async def _say_ready() -> None:
    notifier = sd.Notifier()
    notifier.ready("no job")
    notifier.close()


def test_the_journal_is_used_where_stderr_is_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    assert isinstance(sd.log_handler(), logging.StreamHandler)
    stat = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
    assert type(sd.log_handler()).__name__ == "JournalHandler"
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino + 1}")
    assert isinstance(sd.log_handler(), logging.StreamHandler)


def test_records_of_a_job_carry_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    stat = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
    sent: list[tuple[str, dict[str, object]]] = []
    handler = sd.log_handler()
    monkeypatch.setattr(handler, "send", lambda message, /, **fields: sent.append((message, fields)))
    log = logging.getLogger("some.step")
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)

    class Talking(SmallRunner):
        async def inspect(self, job: JobContext, vm: str) -> Result:
            log.warning("hello")
            return {}

    async def main() -> str:
        log.warning("before")
        job = JobManager(Talking()).start_inspect("web")
        await job.wait()
        return job.id

    job_id = asyncio.run(main())
    assert [message for message, _ in sent] == ["some.step: before", "some.step: hello"]
    assert "VMBACKUP_JOB" not in sent[0][1]
    fields = sent[1][1]
    assert (fields["VMBACKUP_JOB"], fields["VMBACKUP_VM"]) == (job_id, "web")
    assert (fields["PRIORITY"], fields["SYSLOG_IDENTIFIER"]) == ("4", "vmbackupd")
