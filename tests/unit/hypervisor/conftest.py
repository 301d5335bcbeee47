"""A libvirtd and bare machines, shared by the hypervisor's tests."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import require
from tests.lab.qemu import Qemu
from tests.lab.services import Processes, until
from tests.unit.hypervisor import machine as machines
from tests.unit.hypervisor.plain import FEW_DISKS, PlainQemu


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


@pytest.fixture
def new_qemu(tmp_path: Path) -> Iterator[Callable[..., PlainQemu]]:
    """Make and start a QEMU that no libvirt runs, from further words of its command line."""
    require("qemu-system-x86_64", shutil.which("qemu-system-x86_64") is not None)
    sockets = Path(tempfile.mkdtemp(prefix="vmbk-qmp-", dir="/tmp"))  # short: the paths of unix sockets
    processes = Processes(sockets)

    def make(words: str = "", *, name: str = "bare", uuid: str | None = None, start: bool = True) -> PlainQemu:
        argv = ["-M", "q35,accel=tcg", "-m", "64", *words.format(dir=tmp_path).split()]
        qemu = Qemu(name, processes, sockets, argv, uuid=uuid)
        if start:
            qemu.start()
        return PlainQemu(qemu, tmp_path)

    yield make
    processes.close()


@pytest.fixture
def few_disks(new_qemu: Callable[..., PlainQemu], tmp_path: Path) -> PlainQemu:
    """A running QEMU with a qcow2 ``vda``, a raw ``sda`` on virtio-scsi, an empty CD drive, and free PCI ports."""
    machines.create(tmp_path / "a.qcow2")
    machines.create(tmp_path / "b.raw", "raw")
    return new_qemu(FEW_DISKS)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[str]:
    """A raw disk vdb that QEMU reaches over NBD: there is no file to put an overlay beside."""
    image, socket = machines.create(tmp_path / "net.raw", "raw"), tmp_path / "net.sock"
    server = subprocess.Popen(["qemu-nbd", "-t", "-f", "raw", "-k", str(socket), "-x", "d", str(image)])
    try:
        until(socket.exists, 10, "qemu-nbd listens")
        yield ("<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='d'>"
               f"<host transport='unix' socket='{socket}'/></source><target dev='vdb' bus='virtio'/></disk>")
    finally:
        server.terminate()
        server.wait()
