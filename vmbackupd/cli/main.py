"""The command line: what there is to say, and how errors are told."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence

from vmbackupd import __version__
from vmbackupd.api.names import ADDRESS_VARIABLE
from vmbackupd.cli import backups, care, exchange, exits, jobs, keys, machines, repository, restore
from vmbackupd.cli.client import Client
from vmbackupd.cli.options import add_global_options
from vmbackupd.cli.session import Session
from vmbackupd.cli.text import printable
from vmbackupd.errors import BackupError

EPILOG = """exit status: 0 done; 1 failed, or verify found damage; 2 wrong usage; 3 done, but volumes are missing or
degraded, which was allowed; 130 interrupted, the job goes on"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    result = argparse.ArgumentParser(prog="vmbackupctl", description="Consistent backups of KVM guests.", epilog=EPILOG)
    result.add_argument("--version", action="version", version=f"vmbackupctl {__version__}")
    add_global_options(result)
    commands = result.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for group in (machines, backups, restore, jobs, care, exchange):
        group.register(commands)
    keys.register(repository.register(commands))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    command_line = parser()
    args = command_line.parse_args(arguments)
    if (check := getattr(args, "check", None)) and (wrong := check(args)):
        command_line.error(wrong)
    for name, value in (("json", False), ("quiet", False), ("bus_address", os.environ.get(ADDRESS_VARIABLE))):
        if not hasattr(args, name):
            setattr(args, name, value)
    try:
        return asyncio.run(_run(args))
    except BackupError as error:
        if args.json:
            print(json.dumps({"error": {"code": error.code, "message": str(error)}}, indent=2))
        else:
            print(f"vmbackupctl: {printable(str(error))}", file=sys.stderr)
        return exits.FAILED
    except KeyboardInterrupt:
        return exits.DETACHED
    except BrokenPipeError:
        # Whoever read our output has enough. Python must not try to flush it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.FAILED


async def _run(args: argparse.Namespace) -> int:
    client = await Client.connect(args.bus_address or None)
    try:
        status: int = await args.run(Session(client, args))
    finally:
        await client.close()
    return status
