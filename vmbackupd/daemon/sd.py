"""What we tell systemd: readiness, status, the watchdog, and log records with fields. The only user of systemd-python.

Without systemd (no ``NOTIFY_SOCKET``, no ``JOURNAL_STREAM``) everything here does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket

from systemd import daemon, journal
from vmbackupd.job.job import current_job

log = logging.getLogger("daemon.sd")

IDENTIFIER = "vmbackupd"
EXTEND_EVERY = 5.0  # seconds
EXTEND_BY = 60.0  # seconds


def _notify(message: str) -> None:
    """Tell systemd, unless it does not read at the moment.

    systemd-python's call blocks then, with the interpreter's lock held: the event loop, on which a frozen guest may
    depend, would stand still.
    """
    if not _listening():
        log.debug("systemd does not listen; not told: %s", message)
        return
    try:
        daemon.notify(message)
    except OSError as error:  # whoever listened is gone: not a reason to fail a backup
        log.debug("telling systemd: %s", error)


def _listening() -> bool:
    """Whether the socket systemd gave us takes a message now."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect("\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            return False
        poll = select.poll()
        poll.register(probe, select.POLLOUT)
        return any(events & select.POLLOUT for _, events in poll.poll(0))


class Notifier:
    """Messages to systemd about this service."""

    def __init__(self) -> None:
        self._watchdog: asyncio.TimerHandle | None = None
        self._extension: asyncio.TimerHandle | None = None

    def ready(self, status: str) -> None:
        """The service is up."""
        self._stop_extending()
        _notify(f"READY=1\nSTATUS={_line(status)}")

    def status(self, text: str) -> None:
        """What ``systemctl status`` shows."""
        _notify(f"STATUS={_line(text)}")

    def stopping(self, status: str) -> None:
        """The service is on its way down, and takes the time it needs as long as the event loop runs."""
        _notify(f"STOPPING=1\nSTATUS={_line(status)}")
        self.extend_timeout()

    def extend_timeout(self) -> None:
        """Keep systemd from running out of patience with a start or a stop, until it is over."""
        self._stop_extending()
        _notify(f"EXTEND_TIMEOUT_USEC={int(EXTEND_BY * 1e6)}")
        self._extension = asyncio.get_running_loop().call_later(EXTEND_EVERY, self.extend_timeout)

    def start_watchdog(self) -> None:
        """Feed systemd's watchdog, if it is set, from the event loop: a loop that hangs starves it."""
        interval = watchdog_interval()
        if interval is not None:
            self._feed(interval)

    def close(self) -> None:
        """Say nothing more."""
        self._stop_extending()
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None

    def _feed(self, interval: float) -> None:
        _notify("WATCHDOG=1")
        self._watchdog = asyncio.get_running_loop().call_later(interval, self._feed, interval)

    def _stop_extending(self) -> None:
        if self._extension is not None:
            self._extension.cancel()
            self._extension = None


def watchdog_interval() -> float | None:
    """Seconds between two signs of life, a third of what systemd allows; None when it does not watch this process."""
    try:
        microseconds = int(os.environ["WATCHDOG_USEC"])
        watched = int(os.environ.get("WATCHDOG_PID", os.getpid()))
    except (KeyError, ValueError):
        return None
    return microseconds / 1e6 / 3 if microseconds > 0 and watched == os.getpid() else None


def stderr_is_journal() -> bool:
    """Whether systemd connected stderr to the journal: ``JOURNAL_STREAM`` names its device and inode."""
    try:
        device, _, inode = os.environ["JOURNAL_STREAM"].partition(":")
        stat = os.fstat(2)
        return (stat.st_dev, stat.st_ino) == (int(device), int(inode))
    except (KeyError, ValueError, OSError):
        return False


def add_job_fields(record: logging.LogRecord) -> bool:
    """A logging filter that gives records of a job's work the fields ``VMBACKUP_JOB`` and ``VMBACKUP_VM``."""
    job = current_job.get()
    if job is not None and not hasattr(record, "VMBACKUP_JOB"):
        record.VMBACKUP_JOB = job.id
        record.VMBACKUP_VM = job.vm
    return True


def log_handler() -> logging.Handler:
    """Where log records go: to the journal with fields, else to stderr."""
    handler: logging.Handler
    if stderr_is_journal():
        handler = journal.JournalHandler(SYSLOG_IDENTIFIER=IDENTIFIER)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(add_job_fields)
    return handler


def _line(text: str) -> str:
    return " ".join(text.split())
