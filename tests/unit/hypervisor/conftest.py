"""A libvirtd and bare machines, shared by the hypervisor's tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.unit.hypervisor import machine as machines


@pytest.fixture(scope="session")
def libvirt_host() -> Iterator[machines.Host]:
    """A private libvirtd; needs no guest image and no lab."""
    for program in ("libvirtd", "qemu-system-x86_64", "qemu-io", "unshare"):
        require(program, shutil.which(program) is not None)
    directory = Path(tempfile.mkdtemp(prefix="vmbk-hv-", dir="/tmp"))  # short: unix sockets lie below it
    host = machines.Host(directory)
    try:
        yield host
    finally:
        host.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def new_machine(libvirt_host: machines.Host, tmp_path: Path) -> Iterator[Callable[..., machines.Machine]]:
    """Make and start a domain from the XML of its devices."""
    made: list[str] = []

    def make(devices: str, *, ports: int = 5, name: str = "bare", start: bool = True) -> machines.Machine:
        xml = machines.DOMAIN.format(name=name, ports=machines.PORT * ports, devices=devices)
        dom = libvirt_host.connection.defineXML(xml)
        made.append(dom.UUIDString())
        if start:
            dom.create()
        return machines.Machine(libvirt_host, dom.UUIDString(), tmp_path)

    yield make
    for dom in libvirt_host.connection.listAllDomains():
        if dom.UUIDString() in made:
            machines.remove(dom)


@pytest.fixture
def two_disks(new_machine: Callable[..., machines.Machine], tmp_path: Path) -> machines.Machine:
    """A running domain with a qcow2 vda, a raw sda on virtio-scsi, and an empty CD drive."""
    first, second = machines.create(tmp_path / "a.qcow2"), machines.create(tmp_path / "b.raw", "raw")
    return new_machine(
        machines.SCSI + machines.disk(first, "vda") + machines.disk(second, "sda", "raw", "scsi")
        + "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/></disk>")
