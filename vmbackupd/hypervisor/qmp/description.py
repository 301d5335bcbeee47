"""What there is to know about a machine: its disks, and what it takes to start it again."""

from __future__ import annotations

import json
import shlex
import stat
from pathlib import Path
from typing import Any

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.base import DomainInfo
from vmbackupd.hypervisor.guestagent import AGENT_PORT
from vmbackupd.hypervisor.qmp.devices import Objects, Port, find_port, host_devices
from vmbackupd.hypervisor.qmp.disks import read_disks
from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmpclient import QmpRefused

COMMAND_LINE = "qemu-command-line"
STATE = "qemu-state.json"
QUERIES = (
    "query-version", "query-status", "query-name", "query-uuid", "query-kvm", "query-machines", "query-cpus-fast",
    "query-memory-size-summary", "query-memory-devices", "query-iothreads", "query-block", "query-named-block-nodes",
    "query-chardev", "query-pci", "query-rx-filter", "query-tpm", "query-vnc",
)
_ENDED = {"shutdown", "postmigrate", "inmigrate"}  # states of a QEMU without a guest
COMMAND_LINE_LIMIT = 1 << 20  # bytes


async def describe(machine: Machine, uuid: str) -> DomainInfo:
    """The machine as it is now; of one that is off what the configuration tells."""
    if not await machine.running():
        return DomainInfo(
            name=machine.name, uuid=uuid, running=False, persistent=True, has_agent=machine.config.agent is not None,
            config=command_line(machine), disks=(), hostdevs=(), nvram=_text(machine.config.nvram), tpm_state=None)
    async with machine.held():
        objects = Objects(machine)
        disks = await read_disks(machine, objects)
        status = await machine.execute("query-status")
        port = await agent_socket(machine, objects)
        return DomainInfo(
            name=machine.name, uuid=uuid, running=status["status"] not in _ENDED, persistent=True,
            has_agent=port is not None, config={**command_line(machine), STATE: await _state(machine)},
            disks=tuple(item.disk for item in disks.disks.values()), hostdevs=tuple(await host_devices(objects)),
            nvram=_text(machine.config.nvram) or disks.flash, tpm_state=None)


async def agent_socket(machine: Machine, objects: Objects) -> str | None:
    """The socket of the guest agent's port: the configured one, else the one QEMU listens at."""
    if machine.config.agent is not None:
        return str(machine.config.agent)
    port: Port | None = await find_port(machine, objects, AGENT_PORT)
    return None if port is None else port.socket


async def agent_port(machine: Machine) -> str | None:
    """The id of the guest agent's port, without which QEMU does not tell when the agent comes and goes."""
    port = await find_port(machine, Objects(machine), AGENT_PORT)
    return None if port is None else port.id


async def _state(machine: Machine) -> str:
    """Everything QEMU tells of itself that a person needs to start it again, as JSON."""
    state: dict[str, Any] = {}
    for query in QUERIES:
        try:
            state[query] = await machine.execute(query)
        except QmpRefused:
            continue  # not known to this QEMU, or not of this machine
    machine_type = await Objects(machine).get("/machine", "type")
    state["query-machines"] = [
        item for item in state.get("query-machines", ()) if f"{item['name']}-machine" == machine_type]
    return json.dumps(state, indent=1, sort_keys=True)


def command_line(machine: Machine) -> dict[str, str]:
    """The command that starts the machine, where it is known."""
    given = machine.config.command_line
    if given is not None:
        return {COMMAND_LINE: _read(machine, given)}
    process = machine.process
    try:
        words = (process / "cmdline").read_bytes().split(b"\0")[:-1] if process is not None else []
    except OSError:
        words = []
    if not words or b"qemu" not in words[0]:
        return {}  # whoever made the socket and handed it over
    return {COMMAND_LINE: shlex.join(word.decode(errors="surrogateescape") for word in words) + "\n"}


def _read(machine: Machine, path: Path) -> str:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > COMMAND_LINE_LIMIT:
            raise HypervisorError(f"VM {machine.name}: {path}: expected a file of at most {COMMAND_LINE_LIMIT} bytes "
                                  "with the command that starts it (machines.NAME.command_line)")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise HypervisorError(f"VM {machine.name}: its command line {path} cannot be read: {error}") from error


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
