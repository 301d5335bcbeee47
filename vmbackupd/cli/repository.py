"""``repository init``, ``repository info``."""

from __future__ import annotations

from typing import Any

from vmbackupd.cli import exits
from vmbackupd.cli.options import Subcommands, add_command
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import fields
from vmbackupd.cli.text import amount, moment, word


def register(subcommands: Subcommands) -> None:
    """Add the commands."""
    parser = subcommands.add_parser("repository", help="make or describe the repository")
    commands = parser.add_subparsers(dest="repository_command", metavar="COMMAND", required=True)
    add_command(commands, "init", init, "make the configured repository")
    add_command(commands, "info", info, "describe the configured repository")


async def init(session: Session) -> int:
    """``repository init``."""
    return _show(session, await session.client.listing("InitRepository"))


async def info(session: Session) -> int:
    """``repository info``."""
    return _show(session, await session.client.listing("RepositoryInfo"))


def _show(session: Session, values: dict[str, Any]) -> int:
    def text(name: str) -> str:
        if name == "created":
            return moment(values[name])
        return amount(values[name]) if "bytes" in name or "size" in name else word(values[name])

    session.output(values, fields([(name.replace("_", " "), text(name)) for name in values]))
    return exits.DONE
