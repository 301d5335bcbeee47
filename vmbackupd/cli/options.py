"""Options that several commands have."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Coroutine
from typing import Any

from vmbackupd import units
from vmbackupd.cli.session import Session

Subcommands = Any  # argparse has no public name for what add_subparsers() returns
Run = Callable[[Session], Coroutine[Any, Any, int]]


def add_command(subcommands: Subcommands, name: str, run: Run, help_text: str) -> argparse.ArgumentParser:
    """A command with the options every command has; ``run`` does it and returns the exit status."""
    parser: argparse.ArgumentParser = subcommands.add_parser(name, help=help_text, description=help_text)
    add_global_options(parser)
    parser.set_defaults(run=run)
    return parser


def add_global_options(parser: argparse.ArgumentParser) -> None:
    """Accepted before and after the command's name; absent they leave no trace, so that neither place overrides."""
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document")
    parser.add_argument("--quiet", "-q", action="store_true", default=argparse.SUPPRESS, help="show no progress")
    parser.add_argument("--bus-address", metavar="ADDRESS", default=argparse.SUPPRESS,
                        help="D-Bus address of the daemon's bus (default: $VMBACKUPD_BUS_ADDRESS, or the system bus)")


def add_wait(parser: argparse.ArgumentParser) -> None:
    """``--no-wait`` for commands that start a job."""
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and do not wait for its end")


def add_dry_run(parser: argparse.ArgumentParser, help_text: str) -> None:
    """``--dry-run``."""
    parser.add_argument("--dry-run", action="store_true", help=help_text)


def count(text: str) -> int:
    """A whole number on the command line, not below 0."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError("expected a whole number, 0 or more")
    return int(text)


def share(text: str) -> float:
    """A share on the command line: ``0.3`` or ``30%``."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError("expected a share from 0 to 1, or such as 30%")
    return value


def size(text: str) -> int:
    """A size on the command line: ``1048576``, ``50MiB``, ``"1.5 GiB"``; ``M`` alone is ``MiB``."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(?:([KMGT])(?:iB)?|B?)", text, re.ASCII)
    value = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if value <= 0:
        raise argparse.ArgumentTypeError("expected a size above zero, such as 50MiB or 1GiB")
    return value


_UNITS = {"": 1, "K": units.KiB, "M": units.MiB, "G": units.GiB, "T": units.TiB}


def seconds(text: str) -> float:
    """A duration on the command line: ``5``, ``5s`` or ``500ms``."""
    factor = 1.0
    for suffix, scale in (("ms", 0.001), ("s", 1.0)):
        if text.endswith(suffix):
            text, factor = text.removesuffix(suffix), scale
            break
    try:
        value = float(text) * factor
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("expected a number of seconds above zero, such as 5 or 500ms")
    return value


def volume_target(text: str) -> tuple[str, str]:
    """``VOLUME=TARGET`` on the command line; a path is made absolute, because the daemon works elsewhere."""
    volume, equals, target = text.partition("=")
    if not (volume and equals and target):
        raise argparse.ArgumentTypeError("expected VOLUME=TARGET")
    return volume, target if "://" in target else os.path.abspath(target)
