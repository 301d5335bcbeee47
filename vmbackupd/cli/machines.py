"""``machines``, ``inspect``: what there is to back up."""

from __future__ import annotations

from typing import Any

from vmbackupd.cli import exits
from vmbackupd.cli.follow import run_job
from vmbackupd.cli.options import Subcommands, add_command, add_wait
from vmbackupd.cli.session import Session
from vmbackupd.cli.table import table
from vmbackupd.cli.text import amount, word


def register(subcommands: Subcommands) -> None:
    """Add the commands."""
    add_command(subcommands, "machines", machines, "list the hypervisor's VMs")
    parser = add_command(subcommands, "inspect", inspect, "show every block device of a VM and how it is captured")
    parser.add_argument("vm", metavar="VM")
    add_wait(parser)


async def machines(session: Session) -> int:
    """``machines``."""
    found = await session.client.listing("ListMachines")
    rows = [[word(vm.get("name")), "running" if vm.get("running") else "off", word(vm.get("uuid"))] for vm in found]
    session.output(found, table(["NAME", "STATE", "UUID"], rows))
    return exits.DONE


async def inspect(session: Session) -> int:
    """``inspect VM``."""
    watch = await session.client.start("Inspect", "s", session.args.vm)
    return await run_job(session, watch, _describe)


def _describe(result: dict[str, Any]) -> str:
    text = coverage_table(result.get("coverage") or [])
    if result.get("would_fail"):
        text += "\n\nA backup would fail, unless the uncovered volumes are allowed by name (--allow-uncovered)."
    return text


def coverage_table(coverage: list[dict[str, Any]]) -> str:
    """What happens to each block device of a guest."""
    names = ("device", "id", "size", "kind", "method", "decision", "reason")
    rows = [[amount(row.get(name)) if name == "size" else word(row.get(name)) for name in names] for row in coverage]
    titles = ["VOLUME" if name == "id" else name.upper() for name in names]
    return table(titles, rows, right=frozenset({"SIZE"}))
