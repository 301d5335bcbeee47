"""The :class:`vmbackupd.hypervisor.base.Hypervisor` of QEMU processes that run without libvirt."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vmbackupd.config import MachineConfig
from vmbackupd.errors import GuestAgentUnavailable, HypervisorError, NotFound, NotRunning
from vmbackupd.hypervisor.base import DomainInfo, FleeceExport
from vmbackupd.hypervisor.guestagent import AGENT_PORT, GuestAgent
from vmbackupd.hypervisor.qmp import bitmaps, fleece, hotplug, overlay, snapshot
from vmbackupd.hypervisor.qmp.description import agent_port, agent_socket, command_line, describe
from vmbackupd.hypervisor.qmp.devices import Objects
from vmbackupd.hypervisor.qmp.disks import read_disks
from vmbackupd.hypervisor.qmp.identities import Identities
from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmpclient import QmpBusy


class QmpHypervisor:
    """The machines of the configuration. ``state`` is the daemon's directory for what it has to know the next time."""

    defines = False

    def __init__(self, machines: Mapping[str, MachineConfig], state: Path) -> None:
        self._machines = {name: Machine(name, config) for name, config in machines.items()}
        self._identities = Identities(state / "machines.json")
        self._agents: dict[str, GuestAgent] = {}

    async def open(self) -> None:
        """Nothing is connected yet: a machine may be off, or its monitor serve somebody else until it is needed."""

    async def close(self) -> None:
        """Let go of every machine. Can be called again."""
        for agent in self._agents.values():
            await agent.close()
        self._agents.clear()
        for machine in self._machines.values():
            await machine.close()

    async def domains(self) -> Sequence[tuple[str, str, bool]]:
        return sorted(await asyncio.gather(*(self._listed(machine) for machine in self._machines.values())))

    async def _listed(self, machine: Machine) -> tuple[str, str, bool]:
        try:
            return machine.name, await self._uuid(machine), await machine.running()
        except QmpBusy:  # there is a QEMU, which serves somebody else
            return machine.name, self._identities.of(machine.name, machine.config), True

    async def domain(self, name_or_uuid: str) -> DomainInfo:
        machine = self._machines.get(name_or_uuid) or await self._machine(name_or_uuid)
        return await describe(machine, await self._uuid(machine))

    async def _uuid(self, machine: Machine) -> str:
        if not await machine.running():
            return self._identities.of(machine.name, machine.config)
        told = await machine.execute("query-uuid")
        return self._identities.learn(machine.name, machine.config, str(told["UUID"]))

    async def _machine(self, uuid: str) -> Machine:
        for machine in self._machines.values():
            if self._identities.of(machine.name, machine.config) == uuid:
                return machine
        for name, found, _ in await self.domains():  # one that was not asked before
            if found == uuid:
                return self._machines[name]
        raise NotFound(f"VM {uuid}: no [machines] section describes it; there are {', '.join(self._machines)}")

    async def agent(self, uuid: str, command: str, arguments: Mapping[str, object] | None = None, *,
                    timeout: float = 10.0) -> object:
        machine = await self._machine(uuid)
        agent = self._agents.get(machine.name) or await self._find_agent(machine)
        try:
            return await agent.ask(command, arguments, timeout)
        except GuestAgentUnavailable as error:
            self._agents.pop(machine.name, None)  # the port may be another by now: look for it the next time
            await agent.close()
            if not await machine.running():
                raise NotRunning(f"VM {machine.name} is not running: {error}") from error
            raise

    async def _find_agent(self, machine: Machine) -> GuestAgent:
        async with machine.held():  # one that is off has no agent either, and that is the error to tell
            path = await agent_socket(machine, Objects(machine))
        if path is None:
            raise GuestAgentUnavailable(f"VM {machine.name}: guest agent: there is no port {AGENT_PORT} with a socket"
                                        f" that QEMU listens at; add one, or name it in machines.{machine.name}.agent")
        agent = self._agents[machine.name] = GuestAgent(machine.name, path)
        return agent

    async def attach_channel(self, uuid: str, name: str) -> str:
        return await hotplug.attach_channel(await self._machine(uuid), name)

    async def detach_channel(self, uuid: str, name: str) -> None:
        await hotplug.detach_channel(await self._machine(uuid), name)

    async def attach_scratch(self, uuid: str, path: str, serial: str) -> str:
        return await hotplug.attach_scratch(await self._machine(uuid), path, serial)

    async def detach_scratch(self, uuid: str, path: str) -> None:
        await hotplug.detach_scratch(await self._machine(uuid), path)

    async def prepare_overlays(self, uuid: str, overlays: Mapping[str, str]) -> None:
        await snapshot.prepare_overlays(await self._machine(uuid), overlays)

    async def snapshot(self, uuid: str, overlays: Mapping[str, str]) -> None:
        await snapshot.take(await self._machine(uuid), overlays)

    async def drop_overlay(self, uuid: str, overlay_path: str,
                           progress: Callable[[int, int], None] | None = None) -> None:
        await overlay.drop(await self._machine(uuid), overlay_path, progress)

    async def begin_bitmaps(self, uuid: str, name: str, targets: Sequence[str]) -> dict[str, str | None]:
        return await bitmaps.begin(await self._machine(uuid), name, targets)

    async def bitmap_reasons(self, uuid: str, name: str, targets: Sequence[str]) -> dict[str, str | None]:
        return await bitmaps.reasons(await self._machine(uuid), name, targets)

    async def drop_bitmaps(self, uuid: str, name: str) -> None:
        await bitmaps.drop(await self._machine(uuid), name)

    async def bitmaps(self, uuid: str) -> list[str]:
        return await bitmaps.names(await self._machine(uuid))

    async def begin_fleece(self, uuid: str, disks: Mapping[str, str], socket: str,
                           since: Mapping[str, str]) -> dict[str, FleeceExport]:
        return await fleece.begin(await self._machine(uuid), disks, socket, since)

    async def end_fleece(self, uuid: str) -> None:
        await fleece.end(await self._machine(uuid))

    async def path_users(self, path: str) -> Sequence[str]:
        """A machine that is off has the paths that its command line names."""
        users = []
        for machine in self._machines.values():
            if await machine.running():
                used = (await read_disks(machine, Objects(machine))).by_path(path) is not None
            else:
                used = any(path in word for text in command_line(machine).values() for word in text.split())
            users += [machine.name] if used else []
        return sorted(users)

    def watch(self, uuid: str, callback: Callable[[str], None]) -> Callable[[], None]:
        for machine in self._machines.values():
            if self._identities.of(machine.name, machine.config) == uuid:
                return machine.watch(callback, agent_port)
        raise NotFound(f"VM {uuid}: no [machines] section describes it")

    async def define(self, xml: str) -> str:
        raise HypervisorError("machines without libvirt are described in the configuration: a VM is not defined, it"
                              " gets a [machines.NAME] section")

    async def undefine(self, uuid: str) -> None:
        raise HypervisorError("machines without libvirt are described in the configuration: take the [machines.NAME] "
                              "section out")

    async def start(self, uuid: str) -> None:
        machine = await self._machine(uuid)
        if not await machine.running():
            raise HypervisorError(f"VM {machine.name}: its QEMU is started by whoever runs it, not by vmbackupd")

    async def destroy(self, uuid: str) -> None:
        machine = await self._machine(uuid)
        if await machine.running():
            await machine.execute("quit")
