"""The daemon's command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from vmbackupd import __version__
from vmbackupd.api.names import ADDRESS_VARIABLE
from vmbackupd.config import DEFAULT_FILE, Config, load

LOG_LEVELS = ("debug", "info", "warning", "error")

# Option of the command line and the key of the configuration it overrides.
OVERRIDES = {
    "--bus-address": "bus.address",
    "--state-directory": "state_directory",
    "--runtime-directory": "runtime_directory",
    "--repository": "repository.path",
    "--scratch-directory": "scratch.directory",
    "--hypervisor": "hypervisor.uri",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; ``SystemExit`` for wrong ones, ``--help`` and ``--version``."""
    parser = argparse.ArgumentParser(prog="vmbackupd", description="Backup daemon for KVM guests.")
    parser.add_argument("--version", action="version", version=f"vmbackupd {__version__}")
    parser.add_argument("--config", metavar="FILE", type=Path, help=f"configuration (default: {DEFAULT_FILE})")
    for option, key in OVERRIDES.items():
        parser.add_argument(option, metavar="VALUE", dest=key, help=f"instead of {key} in the configuration")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info")
    parser.add_argument("--show-config", action="store_true", help="print the configuration in effect and exit")
    return parser.parse_args(arguments)


def configuration(args: argparse.Namespace) -> Config:
    """The configuration file with what the environment and the command line put over it.

    Raises ``ConfigError``.
    """
    overrides = {key: value for key in OVERRIDES.values() if (value := getattr(args, key)) is not None}
    if "://" in overrides.get("repository.path", ""):
        overrides["repository.url"] = overrides.pop("repository.path")
    if address := os.environ.get(ADDRESS_VARIABLE):
        overrides.setdefault("bus.address", address)
    return load(args.config, overrides)
