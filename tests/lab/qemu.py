"""QEMU processes that no libvirt runs: their command lines, and a monitor of the test's own."""

from __future__ import annotations

import contextlib
import json
import socket
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from tests.lab.guest import LAB_CHANNEL, Guest, LabAgent
from tests.lab.iscsi import Lun
from tests.lab.services import LabError, Processes, until

if TYPE_CHECKING:
    from tests.lab.lab import Lab

AGENT_PORT = "org.qemu.guest_agent.0"


class Monitor:
    """A QMP client for tests: one command after the other, events passed over. Raises LabError with QEMU's error."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._stream = self._socket.makefile("rwb")
        self._stream.readline()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """The ``return`` value. Underscores in argument names become dashes."""
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._stream.write(json.dumps({"execute": command, "arguments": words}).encode() + b"\n")
        self._stream.flush()
        while True:
            answer = json.loads(self._stream.readline())
            if "error" in answer:
                raise LabError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


@contextlib.contextmanager
def monitor(path: Path) -> Iterator[Monitor]:
    """A block with a connection to the monitor at ``path``."""
    opened = Monitor(path)
    try:
        yield opened
    finally:
        opened.close()


class Qemu:
    """One QEMU process with two monitors: ``qmp`` for the service under test, ``own`` for the test. Its sockets lie in
    ``directory``, whose path has to be short. ``processes`` holds it, so that it cannot outlive the test."""

    def __init__(
        self, name: str, processes: Processes, directory: Path, words: Sequence[str | Path], *, uuid: str | None = None
    ) -> None:
        self.name, self.directory, self.uuid, self._processes = name, directory, uuid, processes
        self.qmp, self.own = directory / f"{name}.qmp", directory / f"{name}.own"
        self.agent = directory / f"{name}.agent"
        self.argv = [
            "qemu-system-x86_64", "-name", name, "-nodefaults", "-display", "none", "-no-user-config",
            *(["-uuid", uuid] if uuid else []),
            "-qmp", f"unix:{self.qmp},server=on,wait=off", "-qmp", f"unix:{self.own},server=on,wait=off",
            *(str(word) for word in words),
        ]  # fmt: skip
        self.started = False

    @property
    def agent_words(self) -> list[str]:
        """The guest agent's port, for a machine with a virtio-serial controller."""
        return channel_words(AGENT_PORT, self.agent)

    def copy(self, name: str, argv: Sequence[str]) -> Qemu:
        """Another machine, with sockets of its own name, that ``argv`` starts."""
        other = Qemu(name, self._processes, self.directory, ())
        other.argv = list(argv)
        return other

    def start(self) -> None:
        """Start it, and wait until it answers."""
        for path in (self.qmp, self.own):
            path.unlink(missing_ok=True)  # a QEMU that was killed leaves its sockets
        self._processes.start(self.name, self.argv)
        self.started = True
        self._processes.ready(self.name, self._listens)

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(self.own))
            except OSError:
                return False
        return True

    @property
    def running(self) -> bool:
        return self.started and self._processes.status(self.name) is None

    def kill(self) -> None:
        """End it like a crash would."""
        if self.started:
            self.started = False
            self._processes.stop(self.name, timeout=0)

    def wait(self) -> None:
        """Wait for its end."""
        until(lambda: not self.running, 60, f"QEMU {self.name} ends")
        self.kill()

    def execute(self, command: str, **arguments: Any) -> Any:
        """A command on the test's own monitor."""
        with monitor(self.own) as opened:
            return opened.execute(command, **arguments)

    def write(self, device: str, number: int, at: str, length: str) -> None:
        """Write a byte pattern as the guest's device ``device`` (a path in QEMU's object tree) would, and flush."""
        for command in (f"write -P {number} {at} {length}", "flush"):
            said = self.execute("human-monitor-command", command_line=f'qemu-io -d {device} "{command}"')
            assert not said, said  # what qemu-io has to say goes to the stdout of QEMU

    def close(self) -> None:
        self.kill()
        for path in (self.qmp, self.own, self.agent):
            path.unlink(missing_ok=True)


def channel_words(name: str, path: Path) -> list[str]:
    """A virtio-serial port on a socket that QEMU listens at."""
    label = path.name.replace(".", "-")
    return [
        "-chardev", f"socket,path={path},server=on,wait=off,id={label}",
        "-device", f"virtserialport,chardev={label},name={name},id={label}-port",
    ]  # fmt: skip


def words_of(xml: str) -> list[str]:
    """The command line of QEMU with the devices of a lab guest's domain XML (``domain_xml``), but for the channels.
    Disks have their targets as ids."""
    root = ElementTree.fromstring(xml)
    kvm = root.get("type") == "kvm"
    words = [
        "-machine", "q35", "-accel", "kvm" if kvm else "tcg,thread=single", "-cpu", "host" if kvm else "max",
        "-m", root.findtext("memory") or "", "-smp", root.findtext("vcpu") or "",
        "-kernel", root.findtext("os/kernel") or "", "-initrd", root.findtext("os/initrd") or "",
        "-append", root.findtext("os/cmdline") or "",
        "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net",
        "-device", "virtio-serial-pci", "-device", "virtio-scsi-pci,id=scsi0",
    ]  # fmt: skip
    for console in root.iterfind("devices/serial/source"):
        words += ["-serial", f"file:{console.get('path')}"]
    for number, _ in enumerate(root.iterfind("devices/controller[@model='pcie-root-port']")):
        words += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1}"]
    for number, disk in enumerate(root.iterfind("devices/disk")):
        words += _disk_words(disk, number)
    return words


def _disk_words(disk: ElementTree.Element, number: int) -> list[str]:
    source, target, driver = (disk.find(tag) for tag in ("source", "target", "driver"))
    assert source is not None and target is not None and driver is not None
    name = target.get("dev")
    if disk.get("type") == "file":
        file = f"file.driver=file,file.filename={source.get('file')}"
    else:
        host, (iqn, lun) = source.find("host"), str(source.get("name")).split("/")
        assert host is not None
        portal = f"{host.get('name')}:{host.get('port')}"
        file = f"file.driver=iscsi,file.transport=tcp,file.portal={portal},file.target={iqn},file.lun={lun}"
    if disk.get("device") == "lun":
        address = disk.find("address")
        assert address is not None
        device = f"scsi-block,bus=scsi0.0,scsi-id={address.get('target')},lun={address.get('unit')}"
    else:
        device = f"virtio-blk-pci,bus=port{number},serial={disk.findtext('serial')}"
    return [
        "-blockdev", f"driver={driver.get('type')},node-name=node-{name},discard=unmap,{file}",
        "-device", f"{device},drive=node-{name},id={name}",
    ]  # fmt: skip


class PlainGuest(Guest):
    """A guest of the lab that runs without libvirt; ``qemu`` is its process. Everything that is done inside the guest
    is as with :class:`Guest`; there is no ``domain``."""

    def __init__(
        self, lab: Lab, name: str, xml: str, console: Path, disks: dict[str, Path], luns: dict[str, Lun]
    ) -> None:
        self.lab, self.console_path, self.disks, self.luns = lab, console, disks, luns
        self.name, self.uuid = name, str(uuid.uuid4())
        self.qemu = Qemu(name, lab.processes, lab.dir, words_of(xml), uuid=self.uuid)
        self.qemu.argv += self.qemu.agent_words + channel_words(LAB_CHANNEL, lab.dir / f"{name}.lab")
        self._agent = None
        self.qemu.start()

    def channel_path(self, name: str) -> str:
        return str(self.lab.dir / f"{self.name}.lab")

    def _answers(self) -> bool:
        if not self.qemu.running:
            raise LabError(f"QEMU has ended: {self.lab.processes.log(self.name)}")
        try:
            self.agent("guest-ping", timeout=5)
        except LabError:
            return False
        return True

    def agent(self, command: str, timeout: float = 30.0, **arguments: Any) -> Any:
        """A command to the guest's official agent, on its port, which is let go of at once. Raises LabError."""
        official = LabAgent(str(self.qemu.agent))
        try:
            words = {key.replace("_", "-"): value for key, value in arguments.items()}
            return official.call(command, timeout, **words)
        finally:
            official.close()

    def monitor(self, command: str) -> str:
        return str(self.qemu.execute("human-monitor-command", command_line=command))

    def _stop(self) -> None:
        self.qemu.close()
