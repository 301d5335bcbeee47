"""What every command works with: the connection, the arguments, where output goes."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from typing import Any

from vmbackupd.cli.client import Client
from vmbackupd.cli.progress import Bar, Display, Lines, Silent


@dataclass(frozen=True, slots=True)
class Session:
    """One run of ``vmbackupctl``."""

    client: Client
    args: argparse.Namespace

    @property
    def json(self) -> bool:
        """Whether stdout is to be one JSON document."""
        return bool(self.args.json)

    def output(self, document: Any, text: str) -> None:
        """Print ``document`` with ``--json``, else ``text`` if there is any."""
        if self.json:
            print(json.dumps(document, indent=2))
        elif text:
            print(text)

    def display(self) -> Display:
        """Where progress goes: stderr, in a way that fits it."""
        if self.args.quiet:
            return Silent(sys.stderr)
        return Bar(sys.stderr) if sys.stderr.isatty() else Lines(sys.stderr)
