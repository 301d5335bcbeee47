"""``repository init``, ``repository info``."""

from __future__ import annotations

from typing import Any

from vmbackupd.cli import exits
from vmbackupd.cli.client import descriptor_option, flag_option
from vmbackupd.cli.keys import describe_recovery_key
from vmbackupd.cli.options import Subcommands, add_command
from vmbackupd.cli.secret import Reply
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import fields
from vmbackupd.cli.text import amount, moment, word


def register(subcommands: Subcommands) -> Subcommands:
    """Add the commands; returns where more of ``repository`` can be added."""
    parser = subcommands.add_parser("repository", help="make or describe the repository, and its keys")
    commands = parser.add_subparsers(dest="repository_command", metavar="COMMAND", required=True)
    parser = add_command(commands, "init", init, "make the configured repository, encrypted if [encryption] is set")
    parser.add_argument("--encrypt", action="store_true",
                        help="fail instead of making one that is not encrypted; a key_file of the configuration that is"
                        " not there is made")
    parser.add_argument("--no-recovery-key", action="store_true",
                        help="make no recovery key: when every other key is lost, so are the backups")
    add_command(commands, "info", info, "describe the configured repository")
    return commands


async def init(session: Session) -> int:
    """``repository init``."""
    options = {"encrypt": flag_option(True)} if session.args.encrypt else {}
    with Reply() as reply:
        if not session.args.no_recovery_key:
            options["recovery_key"] = descriptor_option(reply.descriptor)
        values = await session.client.listing("InitRepository", options=options)
        text = reply.read()
    if not text:
        return _show(session, values)
    session.output({**values, "recovery_key": text}, f"{_describe(values)}\n\n{describe_recovery_key(text)}")
    return exits.DONE


async def info(session: Session) -> int:
    """``repository info``."""
    return _show(session, await session.client.listing("RepositoryInfo"))


def _show(session: Session, values: dict[str, Any]) -> int:
    session.output(values, _describe(values))
    return exits.DONE


def _describe(values: dict[str, Any]) -> str:
    def text(name: str) -> str:
        if name == "created":
            return moment(values[name])
        if name == "keys":
            return word([f"{key.get('id')} ({key.get('kind')})" for key in values[name]])
        return amount(values[name]) if "bytes" in name or "size" in name else word(values[name])

    return fields([(name.replace("_", " "), text(name)) for name in values])
