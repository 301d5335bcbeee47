"""``jobs``, ``cancel``, ``recover``."""

from __future__ import annotations

import re
from dataclasses import fields as dataclass_fields
from typing import Any

from vmbackupd.cli import exits
from vmbackupd.cli.client import JobView
from vmbackupd.cli.follow import Detached, cancelled_text, follow, run_job
from vmbackupd.cli.options import Subcommands, add_command, add_wait
from vmbackupd.cli.progress import figure
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import table
from vmbackupd.cli.text import moment, word
from vmbackupd.errors import BackupError, NotFound

JOB_ID = re.compile(r"j[0-9a-f]{8}")


def register(subcommands: Subcommands) -> None:
    """Add the commands."""
    add_command(subcommands, "jobs", jobs, "list jobs that wait, run, or ended not long ago")
    parser = add_command(subcommands, "cancel", cancel, "stop a job and undo what it did")
    parser.add_argument("job", metavar="JOB")
    add_wait(parser)
    parser = add_command(subcommands, "recover", recover, "undo what jobs left behind that died")
    add_wait(parser)


async def jobs(session: Session) -> int:
    """``jobs``."""
    views = await session.client.jobs()
    rows = [[view.id, view.kind, word(view.vm), view.state, word(view.step), _progress(view), moment(view.created),
             word(str(view.error)) if view.error else ""] for view in views]
    titles = ["JOB", "KIND", "VM", "STATE", "STEP", "PROGRESS", "CREATED", "ERROR"]
    session.output([document(view) for view in views], table(titles, rows))
    return exits.DONE


async def cancel(session: Session) -> int:
    """``cancel JOB``."""
    job_id = session.args.job
    if not JOB_ID.fullmatch(job_id):
        raise NotFound(f"{job_id!r} is no job: a job is j and 8 hexadecimal digits, see `vmbackupctl jobs`")
    watch = await session.client.watch(job_id)
    await session.client.cancel(job_id)
    if session.args.no_wait:
        session.output({"job": job_id, "state": watch.view.state}, f"job {job_id} is being cancelled")
        return exits.DONE
    try:
        view = await follow(session.client, watch, session.display())
    except Detached:
        return exits.DETACHED
    if view.state == "cancelled":
        session.output(document(view), cancelled_text(view, "is cancelled"))
        return exits.DONE
    raise view.error or BackupError(f"job {job_id} could not be cancelled any more: it {view.state}")


async def recover(session: Session) -> int:
    """``recover``."""
    return await run_job(session, await session.client.start("Recover"), _describe)


def document(view: JobView) -> dict[str, Any]:
    """A job as JSON."""
    values = {field.name: getattr(view, field.name) for field in dataclass_fields(view)}
    if view.error is not None:
        values["error"] = {"code": view.error.code, "message": str(view.error)}
    return values


def _progress(view: JobView) -> str:
    if view.total:
        return f"{figure(view, view.done)} of {figure(view, view.total)}"
    return figure(view, view.done) if view.done else ""


def _describe(result: dict[str, Any]) -> str:
    recovered = result.get("recovered") or []
    if not recovered:
        return "nothing was left to undo"
    rows = [[word(row.get(name)) for name in ("job", "vm", "undone", "failed")] for row in recovered]
    return table(["JOB", "VM", "UNDONE", "FAILED"], rows)
