"""Holds every process of a lab so that none outlives it, not even when the test process is killed.

A process of its own: it is the subreaper of all it starts (also of the QEMU processes that libvirtd detaches), takes
orders as JSON lines on standard input, answers on standard output, and when standard input ends it ends its whole
family and removes the lab's directory.

    {"start": NAME, "argv": [...], "env": {...}, "log": PATH} → {"pid": N}
    {"stop": NAME, "timeout": SECONDS}                         → {"status": N}   SIGTERM, then SIGKILL; negative: signal
    {"status": NAME}                                           → {"status": N|null}
Standard library only; run as a script.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

PR_SET_CHILD_SUBREAPER = 36
GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL at the end."""


class Supervisor:
    """The processes by name, and what became of them."""

    def __init__(self) -> None:
        self.pids: dict[str, int] = {}
        self.ended: dict[int, int] = {}
        self._popen: list[subprocess.Popen[bytes]] = []  # kept so that Popen's destructor does not warn

    def reap(self, *_: object) -> None:
        """Collect every child that ended, ours or adopted."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self.ended[pid] = os.waitstatus_to_exitcode(status)

    def order(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order; the answer."""
        if "start" in order:
            with open(order["log"], "ab") as log:
                process = subprocess.Popen(
                    order["argv"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=order["env"],
                    start_new_session=True,
                )
            self._popen.append(process)
            self.pids[order["start"]] = process.pid
            return {"pid": process.pid}
        if "stop" in order:
            pid = self.pids.pop(order["stop"])
            if pid not in self.ended:
                os.kill(pid, signal.SIGTERM)
                if not self.wait(lambda: pid in self.ended, order.get("timeout", GRACE)):
                    os.kill(pid, signal.SIGKILL)
                    self.wait(lambda: pid in self.ended, GRACE)
            return {"status": self.ended.get(pid)}
        return {"status": self.ended.get(self.pids[order["status"]])}

    def wait(self, done: Any, seconds: float) -> bool:
        """Whether ``done()`` came true within ``seconds``; children are collected meanwhile."""
        until = time.monotonic() + seconds
        while True:
            self.reap()
            if done():
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.02)

    def end(self) -> None:
        """End and collect all descendants."""
        for sign in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
            for pid in descendants():
                try:
                    os.kill(pid, sign)
                except ProcessLookupError:
                    pass
            if self.wait(lambda: not descendants(), GRACE):
                return


def descendants() -> list[int]:
    """Every process below this one, deepest last. As a subreaper we are the parent of all that were orphaned."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    fields = file.read().rpartition(b")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(name))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def main(directory: str) -> None:
    """Serve until standard input ends, then leave nothing behind."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "PR_SET_CHILD_SUBREAPER")
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)
    supervisor = Supervisor()
    signal.signal(signal.SIGCHLD, supervisor.reap)
    try:
        for line in sys.stdin:
            try:
                answer = supervisor.order(json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), flush=True)
    except BrokenPipeError:
        pass
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        supervisor.end()
        if directory and not os.environ.get("VMBACKUPD_LAB_KEEP"):
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
