"""QEMU processes without libvirt and without an operating system in them, and the hypervisor layer on them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tests.lab.qemu import Qemu
from tests.lab.services import until
from vmbackupd.config import MachineConfig
from vmbackupd.hypervisor.qmp.hypervisor import QmpHypervisor

T = TypeVar("T")

PORTS = "".join(f" -device pcie-root-port,id=port{number},chassis={number + 1}" for number in range(4))
FEW_DISKS = (
    "-device virtio-serial-pci -device virtio-scsi-pci,id=scsi0" + PORTS
    + " -blockdev driver=qcow2,node-name=a,file.driver=file,file.filename={dir}/a.qcow2,discard=unmap"
    + " -device virtio-blk-pci,drive=a,id=vda,serial=serial-a"
    + " -drive if=none,id=b,format=raw,file={dir}/b.raw -device scsi-hd,drive=b,id=sda,bus=scsi0.0"
    + " -drive if=none,id=cd,media=cdrom -device ide-cd,drive=cd,bus=ide.1"
)


@dataclass
class PlainQemu:
    """One QEMU, with its images in ``dir``."""

    qemu: Qemu
    dir: Path

    @property
    def uuid(self) -> str:
        assert self.qemu.uuid is not None
        return self.qemu.uuid

    @property
    def config(self) -> MachineConfig:
        return MachineConfig(self.qemu.qmp)

    def wait_numbered(self) -> None:
        """Wait until the firmware has numbered the PCI buses."""
        until(self._numbered, 30, "the firmware has numbered the buses")

    def _numbered(self) -> bool:
        bridges = [item["pci_bridge"] for item in self.qemu.execute("query-pci")[0]["devices"] if "pci_bridge" in item]
        return all(bridge["bus"]["secondary"] for bridge in bridges)

    def work(self, work: Callable[[QmpHypervisor, str], Awaitable[T]]) -> T:
        """The result of ``work(hypervisor, uuid)``."""

        async def named(hypervisor: QmpHypervisor) -> T:
            uuid = next(uuid for name, uuid, _ in await hypervisor.domains() if name == self.qemu.name)
            return await work(hypervisor, uuid)

        return with_qmp({self.qemu.name: self.config}, self.dir, named)


def with_qmp(machines: Mapping[str, MachineConfig], state: Path, work: Callable[[Any], Awaitable[T]],
             kind: type[QmpHypervisor] = QmpHypervisor) -> T:
    """The result of ``work`` on a hypervisor that is open meanwhile."""

    async def main() -> T:
        hypervisor = kind(machines, state)
        await hypervisor.open()
        try:
            return await asyncio.wait_for(work(hypervisor), 120)
        finally:
            await hypervisor.close()

    return asyncio.run(main())
