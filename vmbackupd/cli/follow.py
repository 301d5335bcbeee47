"""Waiting for a job, with progress, and turning its end into output and an exit status."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any

from vmbackupd.cli import exits
from vmbackupd.cli.client import Client, JobView, JobWatch
from vmbackupd.cli.interrupt import Interrupts, ask, can_ask
from vmbackupd.cli.progress import Display
from vmbackupd.cli.session import Session
from vmbackupd.cli.text import printable
from vmbackupd.errors import BackupError, Cancelled


class Detached(Exception):
    """The user stopped waiting; the job goes on."""


#: Jobs that leave what they completed when they are stopped, because that is whole in itself.
KEEPING = frozenset({"forget", "prune", "gc", "verify", "serve"})


async def run_job(session: Session, watch: JobWatch, describe: Callable[[dict[str, Any]], str],
                  judge: Callable[[Session, JobView], int] | None = None) -> int:
    """Wait for the job unless ``--no-wait``, print its result with ``describe``, and return the exit status, which
    ``judge`` finds for a job that succeeded, or else :func:`status`.

    Raises the job's error when it failed, ``Cancelled`` when it was cancelled.
    """
    view = watch.view
    if getattr(session.args, "no_wait", False):
        session.output({"job": view.id}, f"job {view.id} started; see `vmbackupctl jobs`")
        return exits.DONE
    try:
        view = await follow(session.client, watch, session.display())
    except Detached:
        print(f"job {view.id} goes on; see `vmbackupctl jobs`, stop it with `vmbackupctl cancel {view.id}`",
              file=sys.stderr)
        return exits.DETACHED
    if view.state == "cancelled":
        raise Cancelled(cancelled_text(view, "was cancelled"))
    if view.error is not None:
        raise view.error
    session.output({"job": view.id, "warnings": list(view.warnings), **view.result}, describe(view.result))
    return (judge or status)(session, view)


def cancelled_text(view: JobView, verb: str) -> str:
    """That a job was stopped, and what that means for what it had done."""
    after = "what it had completed stays" if view.kind in KEEPING else "everything it did is undone"
    return f"job {view.id} {verb}; {after}"


def status(session: Session, view: JobView) -> int:
    """The exit status of a job that succeeded; says on stderr why it is not 0."""
    for what in ("uncovered", "degraded"):
        volumes = view.result.get(what)
        if volumes:
            if not session.json:
                names = ", ".join(_name(volume) for volume in volumes)
                print(f"vmbackupctl: {what}: {names}", file=sys.stderr)
            return exits.INCOMPLETE
    return exits.DONE


async def follow(client: Client, watch: JobWatch, display: Display) -> JobView:
    """Wait until the job has ended, showing its progress; Ctrl-C asks whether to cancel it.

    Raises :class:`Detached` when the user only stops waiting, ``DaemonLost`` when nobody knows how the job ends.
    """
    with Interrupts() as interrupts:
        try:
            display.show(watch.view)
            interrupted = asyncio.ensure_future(interrupts.next())
            try:
                while not watch.view.final:
                    changed = asyncio.ensure_future(watch.change())
                    await _first(changed, interrupted)
                    if changed.done():
                        display.show(changed.result())
                    if interrupted.done():
                        display.clear()
                        await _interrupted(client, watch, interrupts)
                        interrupted = asyncio.ensure_future(interrupts.next())
                    await _stop(changed)
            finally:
                await _stop(interrupted)
        finally:
            display.clear()
    return watch.view


async def run_until_interrupted(client: Client, watch: JobWatch, changed: Callable[[JobView], None]) -> None:
    """Wait until the job has ended, telling ``changed`` of its changes; Ctrl-C, and a request to terminate, cancel it.

    Raises ``DaemonLost``.
    """
    with Interrupts(signal.SIGINT, signal.SIGTERM) as interrupts:
        interrupted = asyncio.ensure_future(interrupts.next())
        ended = asyncio.ensure_future(_until_final(watch, changed))
        try:
            await _first(interrupted, ended)
            if interrupted.done():
                await _cancel(client, watch.view.id)
            await ended
        finally:
            await _stop(interrupted)
            await _stop(ended)


async def _interrupted(client: Client, watch: JobWatch, interrupts: Interrupts) -> None:
    """Ask what a Ctrl-C means, while the job goes on; a second one stops waiting."""
    job = watch.view
    if not can_ask() or job.state == "cancelling":
        raise Detached
    answer = asyncio.ensure_future(ask(f"Cancel job {job.id} ({job.kind} {printable(job.vm)})? "
                                       "[y] yes  [n] no, go on waiting  [d] stop waiting, let it run: "))
    again = asyncio.ensure_future(interrupts.next())
    ended = asyncio.ensure_future(_until_final(watch))
    try:
        await _first(answer, again, ended)
        if ended.done():
            ended.result()
            return
        if again.done():
            print(file=sys.stderr)
            raise Detached
        if answer.result() in ("d", None):
            raise Detached
        if answer.result() in ("y", "yes"):
            await _cancel(client, job.id)
    finally:
        for task in (answer, again, ended):
            await _stop(task)


async def _cancel(client: Client, job_id: str) -> None:
    try:
        await client.cancel(job_id)
    except BackupError as error:
        if error.code != "InvalidArgument":  # it ended in between, which the caller is about to see
            raise


async def _until_final(watch: JobWatch, changed: Callable[[JobView], None] = lambda view: None) -> None:
    changed(watch.view)
    while not watch.view.final:
        changed(await watch.change())


async def _first(*tasks: asyncio.Task[Any]) -> None:
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _stop(task: asyncio.Task[Any]) -> None:
    """End ``task`` and leave nothing behind, without a word about how it ends."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


def _name(volume: object) -> str:
    if isinstance(volume, dict):
        return printable(str(volume.get("device") or volume.get("id") or volume))
    return printable(str(volume))
