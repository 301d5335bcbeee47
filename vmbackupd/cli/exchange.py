"""``export``, ``import``, ``serve``: volumes in formats that others read and write."""

from __future__ import annotations

import os
import sys
from typing import Any
from urllib.parse import quote

from vmbackupd.cli import exits
from vmbackupd.cli.client import JobView, flag_option, text_option
from vmbackupd.cli.follow import run_job, run_until_interrupted
from vmbackupd.cli.options import Subcommands, add_command, add_wait
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import fields
from vmbackupd.cli.text import amount, word

SERVING = "serving "  # the step of a job that serves; the socket's path follows


def register(subcommands: Subcommands) -> None:
    """Add the commands."""
    parser = add_command(subcommands, "export", export, "write a volume of a backup into an image file")
    parser.add_argument("backup", metavar="BACKUP")
    parser.add_argument("volume", metavar="VOLUME")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--format", choices=("raw", "qcow2"), help="of the image file (default: raw)")
    parser.add_argument("--compress", action="store_true", help="compress the image; for qcow2")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    add_wait(parser)
    parser = add_command(subcommands, "import", import_image, "make an image file a backup")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--name", required=True, metavar="VM", help="the VM the backup is listed under")
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help="what the image is, such as raw or qcow2 (default: what its name and its content agree upon)",
    )
    parser.add_argument("--volume", metavar="VOLUME", help="the id of the volume in the backup (default: vda)")
    parser.add_argument(
        "--allow-backing",
        action="store_true",
        help="follow the names of backing files in the image, which whoever wrote it has chosen",
    )
    add_wait(parser)
    parser = add_command(subcommands, "serve", serve, "serve a volume of a backup over NBD, read-only, until Ctrl-C")
    parser.add_argument("backup", metavar="BACKUP")
    parser.add_argument("volume", metavar="VOLUME")
    parser.add_argument(
        "socket",
        metavar="SOCKET",
        nargs="?",
        help="the unix socket to make (default: one of its own below the daemon's runtime directory)",
    )
    parser.add_argument("--group", metavar="GROUP", help="let this group connect, not only root; needs SOCKET")
    add_wait(parser)


async def export(session: Session) -> int:
    """``export BACKUP VOLUME FILE``."""
    args = session.args
    options = {name: flag_option(True) for name in ("compress", "force") if getattr(args, name)}
    if args.format:
        options["format"] = text_option(args.format)
    file = os.path.abspath(args.file)
    watch = await session.client.start("Export", "sss", args.backup, args.volume, file, options=options)
    return await run_job(session, watch, _describe)


async def import_image(session: Session) -> int:
    """``import FILE --name VM``."""
    args = session.args
    options = {name: text_option(getattr(args, name)) for name in ("format", "volume") if getattr(args, name)}
    if args.allow_backing:
        options["allow_backing"] = flag_option(True)
    watch = await session.client.start("Import", "ss", os.path.abspath(args.file), args.name, options=options)
    return await run_job(session, watch, _describe)


async def serve(session: Session) -> int:
    """``serve BACKUP VOLUME [SOCKET]``: ends when it is told to, or with ``--no-wait`` when it serves."""
    args = session.args
    options = {"socket": text_option(os.path.abspath(args.socket))} if args.socket else {}
    if args.group:
        options["group"] = text_option(args.group)
    watch = await session.client.start("Serve", "ss", args.backup, args.volume, options=options)
    if args.no_wait:
        while not (watch.view.final or _serves(watch.view)):
            await watch.change()
        if _serves(watch.view):
            _announce(session, watch.view)
    else:
        announced: list[JobView] = []

        def changed(view: JobView) -> None:
            if _serves(view) and not announced:
                announced.append(view)
                _announce(session, view)

        await run_until_interrupted(session.client, watch, changed)
    if watch.view.error is not None and watch.view.state != "cancelled":
        raise watch.view.error
    return exits.DONE


def _serves(view: JobView) -> bool:
    return not view.final and view.step.startswith(SERVING)


def _announce(session: Session, view: JobView) -> None:
    """Tell where the volume can be read, while the job goes on."""
    socket = view.step.removeprefix(SERVING)
    uri = f"nbd+unix:///?socket={quote(socket)}"
    how = f"`vmbackupctl cancel {view.id}`" if session.args.no_wait else "Ctrl-C"
    session.output({"job": view.id, "socket": socket, "uri": uri}, f"{uri}\nserved by job {view.id}; {how} ends it")
    sys.stdout.flush()


def _describe(result: dict[str, Any]) -> str:
    amounts = ("size", "allocated", "bytes_read", "bytes_stored")
    return fields(
        [
            (name.replace("_", " "), amount(result.get(name)) if name in amounts else word(result.get(name)))
            for name in ("backup", "vm", "volume", "path", "format", "compression", *amounts)
        ]
    )
