"""``repository keys``, ``repository recovery-key``: who can open an encrypted repository."""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from typing import Any

from vmbackupd.cli import exits
from vmbackupd.cli.client import descriptor_option, text_option
from vmbackupd.cli.options import Subcommands, add_command
from vmbackupd.cli.secret import Reply, handed_over, read_secret
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import fields, table
from vmbackupd.cli.text import moment, word


def register(subcommands: Subcommands) -> None:
    """Add the commands below ``repository``."""
    parser = subcommands.add_parser("keys", help="list, add and revoke the keys of an encrypted repository")
    commands = parser.add_subparsers(dest="keys_command", metavar="COMMAND", required=True)
    add_command(commands, "list", list_keys, "list the keys; not the secrets, which nobody can list")
    parser = add_command(commands, "add", add, "let another secret open the repository")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--key-file", metavar="FILE", help="a file of at least 32 random bytes, on the daemon's host")
    kind.add_argument("--credential", metavar="NAME", help="a systemd credential of the daemon's unit")
    kind.add_argument("--passphrase", action="store_true", help="a passphrase, asked for on the terminal")
    kind.add_argument("--passphrase-file", metavar="FILE", help="a passphrase in a file (- is standard input)")
    _add_common(parser)
    parser = add_command(commands, "revoke", revoke, "let this key open the repository no more")
    parser.add_argument("slot", metavar="KEY")
    parser = add_command(
        subcommands, "recovery-key", recovery_key, "add a recovery key and print it, this once: for paper, in a safe"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--label", metavar="TEXT", default="", help="what a listing shows for it")
    parser.add_argument(
        "--unlock",
        metavar="FILE",
        nargs="?",
        const="",
        help="open the repository with a recovery key, asked for or in FILE (- is standard input), when"
        " the configured keys are lost",
    )


async def list_keys(session: Session) -> int:
    """``repository keys list``."""
    found = await session.client.listing("ListKeys")
    rows = [
        [word(key.get("id")), word(key.get("kind")), moment(key.get("created")), word(key.get("label"))]
        for key in found
    ]
    session.output(found, table(["KEY", "KIND", "CREATED", "LABEL"], rows))
    return exits.DONE


async def add(session: Session) -> int:
    """``repository keys add``."""
    args = session.args
    with ExitStack() as stack:
        options = _common_options(session, stack)
        if args.key_file:
            kind, options["path"] = "keyfile", text_option(os.path.abspath(args.key_file))
        elif args.credential:
            kind, options["name"] = "credential", text_option(args.credential)
        else:
            secret = read_secret(args.passphrase_file, "passphrase", twice=True)
            kind, options["secret"] = "passphrase", descriptor_option(stack.enter_context(handed_over(secret)))
        key = await session.client.listing("AddKey", "s", kind, options=options)
    session.output(key, describe_key(key))
    return exits.DONE


async def recovery_key(session: Session) -> int:
    """``repository recovery-key``."""
    with ExitStack() as stack:
        options = _common_options(session, stack)
        reply = stack.enter_context(Reply())
        options["recovery_key"] = descriptor_option(reply.descriptor)
        key = await session.client.listing("AddKey", "s", "recovery", options=options)
        text = reply.read()
    session.output({**key, "recovery_key": text}, f"{describe_key(key)}\n\n{describe_recovery_key(text)}")
    return exits.DONE


async def revoke(session: Session) -> int:
    """``repository keys revoke KEY``."""
    result = await session.client.listing("RevokeKey", "s", session.args.slot)
    session.output(result, f"key {word(result.get('revoked'))} does not open the repository any more")
    return exits.DONE


def describe_key(key: dict[str, Any]) -> str:
    """A key slot."""
    return fields([("key", word(key.get("id"))), ("kind", word(key.get("kind"))), ("label", word(key.get("label")))])


def describe_recovery_key(text: str) -> str:
    """The recovery key, for somebody to write down."""
    return (
        f"recovery key: {text}\n\nWrite it down and keep it away from this host. It opens the repository when every"
        " other key is lost.\nIt is stored nowhere and not shown again."
    )


def _common_options(session: Session, stack: ExitStack) -> dict[str, Any]:
    args = session.args
    options: dict[str, Any] = {}
    if args.label:
        options["label"] = text_option(args.label)
    if args.unlock is not None:
        secret = read_secret(args.unlock or None, "recovery key")
        options["unlock"] = descriptor_option(stack.enter_context(handed_over(secret)))
    return options
