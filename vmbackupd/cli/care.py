"""``forget``, ``prune``, ``protect``, ``unprotect``, ``gc``, ``verify``: what keeps a repository small and sound."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vmbackupd.cli import exits
from vmbackupd.cli.client import JobView, count_option, flag_option, number_option
from vmbackupd.cli.follow import run_job
from vmbackupd.cli.options import Subcommands, add_command, add_dry_run, add_wait, count, share, size
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import fields, table
from vmbackupd.cli.text import amount, moment, word

RULES = ("last", "hourly", "daily", "weekly", "monthly", "yearly")


def register(subcommands: Subcommands) -> None:
    """Add the commands."""
    parser = add_command(subcommands, "forget", forget, "remove backups by name; gc gives their room back")
    parser.add_argument("backups", metavar="BACKUP", nargs="+")
    add_dry_run(parser, "say what would be removed, and remove nothing")
    add_wait(parser)
    parser = add_command(subcommands, "prune", prune, "remove the backups that no rule keeps, of one VM or of each")
    parser.add_argument("vm", metavar="VM", nargs="?", default="")
    for rule in RULES:
        what = "the newest backups" if rule == "last" else f"the newest backup of each {_PERIODS[rule]}"
        parser.add_argument(f"--keep-{rule}", metavar="N", type=count, help=f"keep {what}, N of them")
    add_dry_run(parser, "say what would be removed and why, and remove nothing")
    add_wait(parser)
    for name, protected, text in (
        ("protect", True, "let neither prune nor forget remove this backup"),
        ("unprotect", False, "let this backup be removed again"),
    ):
        parser = add_command(subcommands, name, protect, text)
        parser.add_argument("backup", metavar="BACKUP")
        parser.set_defaults(protected=protected)
    parser = add_command(subcommands, "gc", gc, "give back the room of what no backup needs any more")
    add_dry_run(parser, "say how much that would be, and remove nothing")
    parser.add_argument(
        "--threshold",
        metavar="SHARE",
        type=share,
        help="how much of a pack may be waste before it is packed anew, such as 30%% (default: 50%%, or"
        " less while there is much waste in all)",
    )
    add_wait(parser)
    parser = add_command(subcommands, "verify", verify, "check that every backup can be restored")
    parser.add_argument("backups", metavar="BACKUP", nargs="*", help="only these")
    parser.add_argument("--data", action="store_true", help="read and check every byte, not only the structure")
    parser.add_argument("--rate", metavar="SIZE", type=size, help="read at most this much a second, such as 50MiB")
    parser.add_argument("--restart", action="store_true", help="begin anew where an earlier verify was interrupted")
    add_wait(parser)
    parser.set_defaults(check=_check_verify)  # argparse cannot say that one option needs another


_PERIODS = {"hourly": "hour", "daily": "day", "weekly": "week", "monthly": "month", "yearly": "year"}


def _check_verify(args: argparse.Namespace) -> str | None:
    if args.rate is not None and not args.data:
        return "--rate is for reading the data: give --data as well"
    return None


async def forget(session: Session) -> int:
    """``forget BACKUP...``."""
    options = {"dry_run": flag_option(True)} if session.args.dry_run else {}
    return await _removed(session, "Forget", "as", list(session.args.backups), options=options)


async def prune(session: Session) -> int:
    """``prune [VM]``."""
    args = session.args
    options = {
        f"keep_{rule}": count_option(number) for rule in RULES if (number := getattr(args, f"keep_{rule}")) is not None
    }
    if args.dry_run:
        options["dry_run"] = flag_option(True)
    return await _removed(session, "Prune", "s", args.vm, options=options)


async def _removed(session: Session, member: str, signature: str, *arguments: object, options: dict[str, Any]) -> int:
    watch = await session.client.start(member, signature, *arguments, options=options)
    return await run_job(session, watch, _describe_decisions)


async def protect(session: Session) -> int:
    """``protect BACKUP``, ``unprotect BACKUP``."""
    args = session.args
    result = await session.client.listing("Protect", "sb", args.backup, args.protected)
    state = "is protected" if result.get("protected") else "is not protected any more"
    session.output(result, f"backup {word(result.get('backup'))} {state}")
    return exits.DONE


async def gc(session: Session) -> int:
    """``gc``."""
    args = session.args
    options = {"dry_run": flag_option(True)} if args.dry_run else {}
    if args.threshold is not None:
        options["threshold"] = number_option(args.threshold)
    return await run_job(session, await session.client.start("CollectGarbage", options=options), _describe_gc)


async def verify(session: Session) -> int:
    """``verify [BACKUP...]``: exit status 1 when something is damaged."""
    args = session.args
    options = {name: flag_option(True) for name in ("data", "restart") if getattr(args, name)}
    if args.rate is not None:
        options["rate"] = count_option(args.rate)
    watch = await session.client.start("Verify", "as", list(args.backups), options=options)
    return await run_job(session, watch, _describe_verify, _status_of_verify)


def _status_of_verify(session: Session, view: JobView) -> int:
    if view.result.get("sound") is True:
        return exits.DONE
    if not session.json:
        print("vmbackupctl: the repository is damaged", file=sys.stderr)
    return exits.FAILED


def _describe_decisions(result: dict[str, Any]) -> str:
    decisions = result.get("decisions") or []
    dry = bool(result.get("dry_run"))
    removed = "would be removed" if dry else "removed"
    rows = [
        [word(row.get("backup")), "kept" if row.get("keep") else removed, word(row.get("reason"))] for row in decisions
    ]
    kept = sum(bool(row.get("keep")) for row in decisions)
    gone = len(decisions) - kept
    room = "; `vmbackupctl gc` gives their room back" if gone and not dry else ""
    lines = [f"{kept} kept, {gone} {removed}{room}"]
    lines += [f"waiting for: {word(who)}" for who in result.get("waiting") or []]
    if until := _until(result):
        lines.append(f"locked by the store {until}")
    return "\n".join(([table(["BACKUP", "WHAT", "WHY"], rows), ""] if rows else []) + lines)


def _describe_gc(result: dict[str, Any]) -> str:
    dry = bool(result.get("dry_run"))
    head = "dry run: nothing was removed\n" if dry else ""
    text = head + fields([
        ("packs not needed", word(result.get("condemned_packs"))),
        ("packs removed", word(result.get("removed_packs"))),
        ("room to give back" if dry else "room given back", amount(result.get("freed_bytes"))),
        ("packed anew", amount(result.get("repacked_bytes"))),
        ("packs that wait", word(result.get("waiting_packs"))),
        ("waiting for", word(result.get("waiting_for"))),
        ("damaged packs", word(result.get("damaged_packs"))),
        ("locks renewed", word(result.get("locks_renewed") or None)),
        ("packs the store has locked", word(result.get("locked_packs") or None)),
        ("locked by the store", _until(result)),
    ])  # fmt: skip
    return text + "".join(f"\nwhy: {word(reason)}: {count} packs" for reason, count in
                          (result.get("reasons") or {}).items())  # fmt: skip


def _until(result: dict[str, Any]) -> str:
    """Until when an object store with object lock keeps what was removed."""
    until = result.get("locked_until")
    return f"until {moment(until)}; a gc after that gives its room back" if until else ""


def _describe_verify(result: dict[str, Any]) -> str:
    backups = result.get("backups") or []
    head = fields([
        ("backups", str(len(backups))),
        ("packs read" if result.get("data") else "packs", word(result.get("packs"))),
        ("bytes read", amount(result.get("bytes_read"))),
        ("went on", "where an earlier one was interrupted" if result.get("resumed") else ""),
        ("result", "sound" if result.get("sound") else "damaged"),
    ])  # fmt: skip
    parts = [head]
    rows = [[word(row.get("backup")), word(row.get("volume")), word(row.get("offset")), amount(row.get("length")),
             word(row.get("reason"))] for row in result.get("damage") or []]  # fmt: skip
    if rows:
        titles = ["BACKUP", "VOLUME", "OFFSET", "LENGTH", "WHY"]
        parts.append(table(titles, rows, right=frozenset({"OFFSET", "LENGTH"})))
    unreadable = result.get("unreadable") or {}
    found = [f"backup {word(backup)} cannot be read: {word(why)}" for backup, why in unreadable.items()]
    found += [f"pack {word(pack)}: {word(why)}" for pack, why in (result.get("damaged_packs") or {}).items()]
    found += [f"index {word(index)} is damaged" for index in result.get("damaged_indexes") or []]
    return "\n\n".join([*parts, *(["\n".join(found)] if found else [])])
