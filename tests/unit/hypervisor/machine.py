"""A real libvirtd of the test's own and real QEMU processes without an operating system in them: started in a second.

What a guest would write is written by QEMU itself through the guest's device (the monitor's ``qemu-io``).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import libvirt
import libvirt_qemu

from tests.lab.services import Processes, start_libvirt, until
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor

T = TypeVar("T")
H = TypeVar("H", bound=LibvirtHypervisor)

DOMAIN = """<domain type='qemu'><name>{name}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
<devices>
<controller type='pci' index='0' model='pcie-root'/>
{ports}
<controller type='virtio-serial' index='0'/>
{devices}
<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
</devices></domain>"""
SCSI = "<controller type='scsi' model='virtio-scsi' index='0'/>"
PORT = "<controller type='pci' model='pcie-root-port'/>"


def tool(*argv: str) -> str:
    """Run a program that has to succeed; its output."""
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def disk(path: Path, target: str, format: str = "qcow2", bus: str = "virtio") -> str:
    return (f"<disk type='file' device='disk'><driver name='qemu' type='{format}'/><source file='{path}'/>"
            f"<target dev='{target}' bus='{bus}'/></disk>")


def create(path: Path, format: str = "qcow2", size: str = "32M") -> Path:
    tool("qemu-img", "create", "-q", "-f", format, str(path), size)
    return path


def pattern(path: Path, format: str, number: int, at: str, length: str) -> bool:
    """Whether the image reads as that byte there. ``-U``: a QEMU may have it open."""
    done = subprocess.run(["qemu-io", "-U", "-r", "-f", format, "-c", f"read -P {number} {at} {length}", str(path)],
                          capture_output=True, text=True, check=True)
    return "verification failed" not in done.stdout


def dirty(socket: str, export: str, bitmap: str) -> set[int]:
    """The 64 KiB chunks that a bitmap served over NBD calls dirty, read without the project's code."""
    told = json.loads(tool("nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}",
                           f"nbd+unix:///{export}?socket={socket}"))
    return {chunk for piece in told if piece["type"] for chunk in range(
        piece["offset"] >> 16, (piece["offset"] + piece["length"] + 0xFFFF) >> 16)}


class Host:
    """libvirtd, and the means to end it and start it again as it was."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self._nothing = os.open("/dev/null", os.O_RDONLY)
        self.processes = Processes(directory, self._nothing)
        self.uri = start_libvirt(self.processes, directory)
        self.connection = libvirt.open(self.uri)

    def stop_libvirtd(self) -> Callable[[], None]:
        """Kill libvirtd like a crash would; the returned function starts it with the same words and directories."""
        self.connection.close()
        pid = int((self.dir / "libvirtd.pid").read_text())
        argv = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
        pairs = [item.split("=", 1) for item in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in item]
        os.kill(pid, signal.SIGKILL)
        until(lambda: self.processes.status("libvirtd") is not None, 10, "libvirtd ends")

        def start() -> None:
            self.processes.start("libvirtd", ["unshare", "--user", "--map-user=1", "--map-group=1", *argv], dict(pairs))
            self.connection = until(self._reached, 30, "libvirtd is back")

        return start

    def restart_libvirtd(self) -> None:
        """Kill libvirtd and start it again."""
        self.stop_libvirtd()()

    def _reached(self) -> libvirt.virConnect | None:
        try:
            return libvirt.open(self.uri)
        except libvirt.libvirtError:
            return None

    def close(self) -> None:
        try:
            for dom in self.connection.listAllDomains():
                remove(dom)
            self.connection.close()
        finally:
            self.processes.close()
            os.close(self._nothing)


def remove(dom: libvirt.virDomain) -> None:
    if dom.isActive():
        dom.destroy()
    if dom.isPersistent():
        dom.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                          | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)


@dataclass
class Machine:
    """One domain that runs no operating system, with its images in ``dir``."""

    host: Host
    uuid: str
    dir: Path

    @property
    def dom(self) -> libvirt.virDomain:
        return self.host.connection.lookupByUUIDString(self.uuid)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        until(condition, 20, what)

    def kill(self) -> None:
        """End QEMU like a crash of the host would."""
        pidfile = next(self.host.dir.rglob(f"{self.dom.name()}.pid"))
        os.kill(int(pidfile.read_text()), signal.SIGKILL)
        until(lambda: not self.dom.isActive(), 10, "QEMU is dead")

    def crash(self) -> None:
        """Kill QEMU and start the domain again."""
        self.kill()
        self.dom.create()

    def write(self, alias: str, number: int, at: str, length: str) -> None:
        """Write a byte pattern as the guest's device would."""
        self._io(alias, f"write -P {number} {at} {length}")

    def zero(self, alias: str, at: str, length: str) -> None:
        self._io(alias, f"write -z {at} {length}")

    def discard(self, alias: str, at: str, length: str) -> None:
        self._io(alias, f"discard {at} {length}")

    def _io(self, alias: str, words: str) -> None:
        device = f"/machine/peripheral/{alias}" + ("/virtio-backend" if alias.startswith("virtio-") else "")
        told = libvirt_qemu.qemuMonitorCommand(self.dom, f'qemu-io -d {device} "{words}"',
                                               libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP)
        assert not told, told  # what qemu-io has to say goes to the stdout of QEMU

    def with_hypervisor(self, work: Callable[[LibvirtHypervisor], Awaitable[T]]) -> T:
        """The result of ``work`` on a hypervisor that is open meanwhile."""
        return with_hypervisor(self.host.uri, work)


def with_hypervisor(uri: str, work: Callable[[H], Awaitable[T]], kind: type[H] = LibvirtHypervisor) -> T:  # type: ignore[assignment]
    async def main() -> T:
        hypervisor = kind(uri)
        await hypervisor.open()
        try:
            return await asyncio.wait_for(work(hypervisor), 120)
        finally:
            await hypervisor.close()

    return asyncio.run(main())
