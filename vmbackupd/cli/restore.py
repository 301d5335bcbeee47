"""``restore``."""

from __future__ import annotations

import os
from typing import Any

from vmbackupd.cli.client import flag_option, mapping_option, text_option
from vmbackupd.cli.follow import run_job
from vmbackupd.cli.options import Subcommands, add_command, add_wait, volume_target
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import fields, table
from vmbackupd.cli.text import amount, printable, word


def register(subcommands: Subcommands) -> None:
    """Add the command."""
    parser = add_command(subcommands, "restore", restore, "restore a backup to new disks, volumes and a new VM")
    parser.add_argument("backup", metavar="BACKUP")
    parser.add_argument("--name", metavar="NEW", help="name of the restored VM")
    parser.add_argument("--to", metavar="DIR", help="directory for the virtual disks")
    parser.add_argument("--volume", metavar="VOLUME=TARGET", type=volume_target, action="append", default=[],
                        help="where a volume goes: a file, a block device or iscsi://PORTAL/IQN/LUN (may be repeated)")
    parser.add_argument("--force", action="store_true", help="write to targets that are not empty")
    parser.add_argument("--in-place", action="store_true",
                        help="read targets that hold data and write only what differs; needs no --force")
    parser.add_argument("--revert", choices=("backup", "restore"),
                        help="revert while restoring, instead of using what was reverted at backup time")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    either.add_argument("--start", action="store_true", help="start the restored VM")
    add_wait(parser)


async def restore(session: Session) -> int:
    """``restore BACKUP``."""
    args = session.args
    options = {name: flag_option(True) for name in ("dry_run", "force", "start", "in_place")
               if getattr(args, name)}
    if args.name:
        options["name"] = text_option(args.name)
    if args.to:
        options["directory"] = text_option(os.path.abspath(args.to))
    if args.volume:
        options["volumes"] = mapping_option(dict(args.volume))
    if args.revert:
        options["revert"] = text_option(args.revert)
    watch = await session.client.start("Restore", "s", args.backup, options=options)
    return await run_job(session, watch, _describe)


def _describe(result: dict[str, Any]) -> str:
    """A restore that was made, or the plan of one."""
    names = (("backup", "backup"), ("vm", "of VM"), ("name", "new VM"), ("uuid", "UUID"), ("directory", "directory"),
             ("started", "started"), ("left_out", "left out"))
    parts = [fields([(title, word(result.get(name))) for name, title in names])]
    if volumes := result.get("volumes"):
        now = "HELD BEFORE" if "bytes_written" in result else "HOLDS NOW"
        titles = ["VOLUME", "KIND", "SIZE", "TARGET", now, "REVERT"]
        rows = [_volume_row(volume) for volume in volumes]
        if written := result.get("bytes_written"):
            titles.append("WRITTEN")
            rows = [[*row, amount(written.get(volume.get("id")))] for row, volume in zip(rows, volumes, strict=True)]
        parts.append(table(titles, rows, right=frozenset({"SIZE", "WRITTEN"})))
    shown = [f"{volume}: {word(entry.get('how'))}" for entry in result.get("present_to_guest") or []
             if (volume := word(entry.get("volume")))]
    if isinstance(command := result.get("command"), dict):  # of a machine that no libvirt ran
        lines = [word(command.get("path"))] if command.get("path") else str(command.get("text")).splitlines()
        shown += ["start it with:", *(f"    {printable(line)}" for line in lines)]
    shown += [f"note: {word(note)}" for note in result.get("notes") or []]
    shown += [f"problem: {word(problem)}" for problem in result.get("problems") or []]
    parts.append("\n".join(shown))
    return "\n\n".join(part for part in parts if part)


def _volume_row(volume: dict[str, Any]) -> list[str]:
    now = volume.get("now") or {}
    return [word(volume.get("id")), word(volume.get("kind")), amount(volume.get("size")), word(volume.get("target")),
            word(now.get("what") or now.get("content")), word(volume.get("revert"))]
