"""What we tell systemd: readiness, status, the watchdog, and log records with fields. The only user of systemd-python.

Without systemd (no ``NOTIFY_SOCKET``, no ``JOURNAL_STREAM``) everything here does nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading

from systemd import daemon, journal
from vmbackupd.job.job import current_job

log = logging.getLogger("daemon.sd")

IDENTIFIER = "vmbackupd"
EXTEND_EVERY = 5.0  # seconds
EXTEND_BY = 60.0  # seconds
QUEUE = 32  # messages
CLOSE_TIMEOUT = 2.0  # seconds


class _Sender:
    """Hands messages to systemd from a thread: ``sd_notify`` blocks while systemd does not read, and the event loop,
    on which a frozen guest may depend, must not wait for that. Messages that find the queue full are dropped."""

    def __init__(self) -> None:
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name="sd_notify", daemon=True)
        self._thread.start()

    def send(self, message: str) -> None:
        try:
            self._queue.put_nowait(message)
        except queue.Full:
            log.debug("systemd does not listen; not told: %s", message)

    def close(self) -> None:
        """Send what is waiting, for a short while."""
        try:
            self._queue.put(None, timeout=CLOSE_TIMEOUT)
            self._thread.join(CLOSE_TIMEOUT)
        except queue.Full:
            pass  # the thread hangs in a call; it ends with the process

    def _run(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                daemon.notify(message)
            except OSError as error:  # whoever listened is gone: not a reason to fail a backup
                log.debug("telling systemd: %s", error)


class Notifier:
    """Messages to systemd about this service."""

    def __init__(self) -> None:
        self._sender = _Sender()
        self._watchdog: asyncio.TimerHandle | None = None
        self._extension: asyncio.TimerHandle | None = None

    def ready(self, status: str) -> None:
        """The service is up."""
        self._stop_extending()
        self._sender.send(f"READY=1\nSTATUS={_line(status)}")

    def status(self, text: str) -> None:
        """What ``systemctl status`` shows."""
        self._sender.send(f"STATUS={_line(text)}")

    def stopping(self, status: str) -> None:
        """The service is on its way down, and takes the time it needs as long as the event loop runs."""
        self._sender.send(f"STOPPING=1\nSTATUS={_line(status)}")
        self.extend_timeout()

    def extend_timeout(self) -> None:
        """Keep systemd from running out of patience with a start or a stop, until it is over."""
        self._stop_extending()
        self._sender.send(f"EXTEND_TIMEOUT_USEC={int(EXTEND_BY * 1e6)}")
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
        self._sender.close()

    def _feed(self, interval: float) -> None:
        self._sender.send("WATCHDOG=1")
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
