"""QEMU's devices, found in its object tree: where the guest finds a disk, what kind it is, which ports are free."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vmbackupd.hypervisor.base import GuestAddress
from vmbackupd.hypervisor.qmp.blocks import understood
from vmbackupd.hypervisor.qmp.machine import Machine
from vmbackupd.hypervisor.qmpclient import QmpRefused

PERIPHERAL = ("/machine/peripheral", "/machine/peripheral-anon")
ROOT_PORTS = {"pcie-root-port", "ioh3420", "gen_pcie_root_port", "xio3130-downstream"}
FLASH = {"cfi.pflash01", "cfi.pflash02"}
_PASS_THROUGH = {"scsi-block", "scsi-generic"}
_CHANNEL = re.compile(r"(?:disconnected:)?unix:(?P<path>[^,]+)(?:,server=on|,server)?")


class Objects:
    """QEMU's object tree (``qom-list``, ``qom-get``), each question asked once."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: dict[tuple[str, str], Any] = {}
        self._bridges: dict[tuple[int, int], tuple[int, bool]] | None = None

    async def get(self, path: str, name: str) -> Any:
        """A property's value; None where the object has none of that name."""
        if (path, name) not in self._known:
            try:
                self._known[path, name] = await self._machine.execute("qom-get", {"path": path, "property": name})
            except QmpRefused as error:
                if "not found" not in error.reason:
                    raise
                self._known[path, name] = None
        return self._known[path, name]

    async def children(self, path: str) -> dict[str, str]:
        """Name and type of each child of an object."""
        reply = await self._machine.execute("qom-list", {"path": path})
        with understood("qom-list"):
            return {item["name"]: item["type"][6:-1] for item in reply if item["type"].startswith("child<")}

    async def peripherals(self) -> AsyncIterator[tuple[str, str]]:
        """(path, type) of each device that was asked for on the command line or plugged in."""
        for parent in PERIPHERAL:
            for name, kind in sorted((await self.children(parent)).items()):
                yield f"{parent}/{name}", kind

    async def owner(self, path: str) -> str | None:
        """The device that has the bus which the device at ``path`` is plugged into."""
        bus = await self.get(path, "parent_bus")
        return str(bus).rpartition("/")[0] if bus else None

    async def pci_function(self, path: str) -> str | None:
        """The PCI function the device at ``path`` is, or is behind."""
        at: str | None = path
        while at and not isinstance(await self.get(at, "addr"), int):
            at = await self.owner(at)
        return at or None

    async def pci_address(self, function: str) -> tuple[int, int] | None:
        """(bus as the guest numbers it, slot and function), None while the firmware has not numbered the buses."""
        place = int(await self.get(function, "addr"))
        owner = await self.owner(function)
        if owner is None or not isinstance(await self.get(owner, "addr"), int):
            return 0, place  # plugged into the host bridge
        bridge = await self.pci_address(owner)
        secondary = (await self.bridges()).get(bridge, (0, False))[0] if bridge is not None else 0
        return (secondary, place) if secondary else None

    async def bridges(self) -> dict[tuple[int, int], tuple[int, bool]]:
        """PCI bridges by their own (bus, slot and function): the bus behind, and whether anything is plugged there."""
        if self._bridges is None:
            reply = await self._machine.execute("query-pci")
            found: dict[tuple[int, int], tuple[int, bool]] = {}

            def walk(devices: Any) -> None:
                for device in devices:
                    bridge = device.get("pci_bridge")
                    if bridge is not None:
                        behind = bridge.get("devices", ())
                        place = (device["bus"], device["slot"] * 8 + device["function"])
                        found[place] = (bridge["bus"]["secondary"], bool(behind))
                        walk(behind)

            with understood("query-pci"):
                for bus in reply:
                    walk(bus["devices"])
            self._bridges = found
        return self._bridges


def pci_text(address: tuple[int, int]) -> str:
    """``0000:03:00.0``."""
    return f"0000:{address[0]:02x}:{address[1] >> 3:02x}.{address[1] & 7:x}"


async def guest_address(objects: Objects, path: str) -> GuestAddress | None:
    """Where the guest finds the disk at ``path``."""
    function = await objects.pci_function(path)
    address = await objects.pci_address(function) if function is not None else None
    if function is None or address is None:
        return None
    pci = pci_text(address)
    target, lun = await objects.get(path, "scsi-id"), await objects.get(path, "lun")
    if isinstance(target, int) and isinstance(lun, int):
        return GuestAddress(pci, target, lun)
    unit = await objects.get(path, "unit")
    if isinstance(unit, int):  # IDE: a bus a port
        port = _number(str(await objects.get(path, "parent_bus")))
        ahci = "ahci" in str(await objects.get(function, "type"))
        return GuestAddress(pci, 0, port) if ahci else GuestAddress(pci, port, unit)
    return GuestAddress(pci)


def _number(bus: str) -> int:
    tail = bus.rpartition(".")[2]
    return int(tail) if tail.isdecimal() else 0


def device_kind(kind: str) -> tuple[str, str]:
    """(device, bus) of a disk in the words of :class:`DomainDisk`, from QEMU's type of it."""
    if kind in _PASS_THROUGH:
        return "lun", "scsi"
    if kind == "floppy":
        return "floppy", "fdc"
    bus = kind.partition("-")[0]
    return ("cdrom" if kind.endswith("-cd") else "disk"), {"ide": "sata"}.get(bus, bus)


@dataclass(frozen=True, slots=True)
class Port:
    """A virtio-serial port: its path in the object tree, its id where it has one, the label of its character device
    and the path of that one's listening socket, where it has one."""

    path: str
    id: str | None
    chardev: str | None
    socket: str | None


async def find_port(machine: Machine, objects: Objects, name: str) -> Port | None:
    """The virtio-serial port of that name."""
    async for path, kind in objects.peripherals():
        if kind in ("virtserialport", "virtconsole") and await objects.get(path, "name") == name:
            label = await objects.get(path, "chardev")
            sockets = channel_sockets(await machine.execute("query-chardev"))
            parent, _, last = path.rpartition("/")
            return Port(path, last if parent == PERIPHERAL[0] else None, label or None, sockets.get(str(label)))
    return None


def channel_sockets(reply: Any) -> dict[str, str]:
    """Label and path of the character devices that are listening unix sockets, from ``query-chardev``."""
    found: dict[str, str] = {}
    with understood("query-chardev"):
        for item in reply:
            match = _CHANNEL.match(item["filename"])
            if match is not None:
                found[item["label"]] = match["path"]
    return found


async def free_root_port(objects: Objects) -> str | None:
    """The bus of a PCI Express port that nothing is plugged into."""
    async for path, kind in objects.peripherals():
        if kind not in ROOT_PORTS or await objects.get(path, "hotplug") is False:
            continue
        address = await objects.pci_address(path)
        if address is None or (await objects.bridges()).get(address, (0, True))[1]:
            continue
        for name, child in (await objects.children(path)).items():
            if child == "PCIE":
                return name
    return None


async def scsi_bus(objects: Objects) -> str | None:
    """The bus of a virtio-scsi controller."""
    async for path, kind in objects.peripherals():
        if kind.startswith("virtio-scsi"):
            for name, child in (await objects.children(f"{path}/virtio-backend")).items():
                if child == "SCSI":
                    return name
    return None


def object_path(qdev: str) -> str:
    """The path of a device that QEMU names by id or by path."""
    return qdev if qdev.startswith("/") else f"{PERIPHERAL[0]}/{qdev}"


def by_id(path: str) -> str | None:
    """The id of the device that the object at ``path`` is or belongs to; None where it was given none."""
    head = f"{PERIPHERAL[0]}/"
    return path.removeprefix(head).partition("/")[0] if path.startswith(head) else None


async def host_devices(objects: Objects) -> list[str]:
    """A readable line for each device of the host that the guest was given."""
    found = []
    async for path, kind in objects.peripherals():
        if kind.startswith("vfio-"):
            found.append(f"pci {await objects.get(path, 'host') or await objects.get(path, 'sysfsdev')}")
        elif kind == "usb-host":
            found.append(f"usb bus {await objects.get(path, 'hostbus')} device {await objects.get(path, 'hostaddr')}")
    return found
