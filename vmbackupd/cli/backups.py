"""``backup``, ``list``, ``show``."""

from __future__ import annotations

from typing import Any

from vmbackupd.cli import exits
from vmbackupd.cli.client import count_option, flag_option, number_option, text_option, texts_option
from vmbackupd.cli.follow import run_job
from vmbackupd.cli.machines import coverage_table
from vmbackupd.cli.options import Subcommands, add_command, add_wait, seconds
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import fields, table
from vmbackupd.cli.text import amount, moment, precise_moment, word

PAGE = 1000  # backups a call

SIZES = ("size", "bytes_read", "bytes_stored")


def register(subcommands: Subcommands) -> None:
    """Add the commands."""
    parser = add_command(subcommands, "backup", backup, "back a running VM up")
    parser.add_argument("vm", metavar="VM")
    parser.add_argument("--revert", choices=("backup", "restore", "both"),
                        help="when the virtual disks are set back to the first snapshot (default: backup)")
    parser.add_argument("--allow-uncovered", metavar="VOLUME", action="append", default=[],
                        help="let this volume stay out of the backup (may be repeated)")
    parser.add_argument("--freeze-budget", metavar="SECONDS", type=seconds,
                        help="the longest the guest may be frozen; a backup that needs longer fails")
    parser.add_argument("--full", action="store_true", help="read every disk whole, also where the changes are known")
    parser.add_argument("--t2", choices=["auto", "external", "fleece"],
                        help="how the hypervisor holds virtual disks still: overlay files, or served by QEMU")
    add_wait(parser)
    parser = add_command(subcommands, "list", list_backups, "list backups, oldest first")
    parser.add_argument("vm", metavar="VM", nargs="?", default="")
    parser = add_command(subcommands, "show", show, "show a backup and the proof of its consistency")
    parser.add_argument("backup", metavar="BACKUP")


async def backup(session: Session) -> int:
    """``backup VM``."""
    args = session.args
    options = {}
    if args.revert:
        options["revert"] = text_option(args.revert)
    if args.allow_uncovered:
        options["allow_uncovered"] = texts_option(args.allow_uncovered)
    if args.freeze_budget is not None:
        options["freeze_budget"] = number_option(args.freeze_budget)
    if args.full:
        options["full"] = flag_option(True)
    if args.t2 is not None:
        options["t2"] = text_option(args.t2)
    watch = await session.client.start("Backup", "s", args.vm, options=options)
    return await run_job(session, watch, _describe_backup)


async def list_backups(session: Session) -> int:
    """``list [VM]``."""
    found: list[dict[str, Any]] = []
    while True:
        options = {"limit": count_option(PAGE)}
        if found:
            options["after"] = text_option(found[-1]["id"])
        part = await session.client.listing("ListBackups", "s", session.args.vm, options=options)
        found += part
        if len(part) < PAGE:
            break
    rows = [[word(item.get("id")), _vm(item), moment(item.get("t1") or item.get("created")), amount(item.get("size")),
             word(item.get("error")) or ("protected" if item.get("protected") else "")] for item in found]
    session.output(found, table(["BACKUP", "VM", "T1", "SIZE", "NOTE"], rows, right=frozenset({"SIZE"})))
    return exits.DONE


async def show(session: Session) -> int:
    """``show BACKUP``."""
    manifest = await session.client.listing("ShowBackup", "s", session.args.backup)
    session.output(manifest, _describe_manifest(manifest))
    return exits.DONE


def _describe_backup(result: dict[str, Any]) -> str:
    freeze = result.get("freeze_ms")
    return fields([("backup", word(result.get("backup"))), ("T1", precise_moment(result.get("t1"))),
                   ("frozen", "" if freeze is None else f"{freeze:.0f} ms"), ("size", amount(result.get("size"))),
                   ("stored", amount(result.get("bytes_stored"))), ("uncovered", word(result.get("uncovered")))])


def _describe_manifest(manifest: dict[str, Any]) -> str:
    freeze = manifest.get("freeze_ms")
    head = fields([("backup", word(manifest.get("id"))), ("VM", _vm(manifest)),
                   ("created", moment(manifest.get("created"))), ("T1", precise_moment(manifest.get("t1"))),
                   ("T2", precise_moment(manifest.get("t2"))), ("frozen", "" if freeze is None else f"{freeze:.0f} ms"),
                   ("revert", word(manifest.get("revert"))), ("uncovered", word(manifest.get("uncovered"))),
                   ("protected", "yes" if manifest.get("protected") else "")])
    names = ("id", "kind", "method", "consistency", *SIZES, "reverted_chunks")
    rows = [[*(amount(row.get(name)) if name in SIZES else word(row.get(name)) for name in names), _changes(row)]
            for row in manifest.get("volumes", [])]
    titles = ["VOLUME", "KIND", "METHOD", "CONSISTENCY", "SIZE", "READ", "STORED", "REVERTED", "CHANGES"]
    parts = [head, table(titles, rows, right=frozenset(titles[4:-1]))]
    if manifest.get("coverage"):
        parts.append(coverage_table(manifest["coverage"]))
    return "\n\n".join(parts)


def _changes(volume: dict[str, Any]) -> str:
    """How it was found out what to read, on which backup that builds, and why not better."""
    change = volume.get("change")
    if not isinstance(change, dict):
        return ""
    words = [word(change.get("method")), *([f"since {word(change['base'])}"] if change.get("base") else [])]
    return " ".join([*words, *([f"({word(change['reason'])})"] if change.get("reason") else [])])


def _vm(item: dict[str, Any]) -> str:
    vm = item.get("vm")
    return word(vm.get("name") if isinstance(vm, dict) else vm)
