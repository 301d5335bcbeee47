"""One guest of the lab: its domain XML, and hands inside it."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

import libvirt
import libvirt_qemu

from tests.lab.iscsi import Lun
from tests.lab.services import LabError, until

if TYPE_CHECKING:
    from tests.lab.lab import Lab

LAB_CHANNEL = "org.vmbackupd.lab"
SPARE_PORTS = 10
"""PCI Express ports left free for hot-plugged disks."""
MOUNTS = {"root": "/", "data": "/mnt/data", "iscsi": "/mnt/iscsi", "lun": "/mnt/lun", "span": "/mnt/span"}
"""Volume → where the guest mounts it. ``span`` lies half on the virtual disk vdc, half on an iSCSI LUN."""
LOGS = {name: "/var/lib/writer/log" if name == "root" else f"{path}/log" for name, path in MOUNTS.items()}
"""Volume → the log that tests/lab/writer.py keeps on it."""
READY_TIMEOUT = float(os.environ.get("VMBACKUPD_LAB_BOOT_TIMEOUT", "240"))


class CommandFailed(Exception):
    """A command in the guest ended with another status than 0."""

    def __init__(self, command: object, status: int, out: bytes, err: bytes) -> None:
        self.status, self.out, self.err = status, out, err
        said = (err[-2000:] + out[-2000:]).decode(errors="replace")
        super().__init__(f"{command!r} ended with {status}: {said}")


def domain_xml(
    name: str,
    *,
    kvm: bool,
    kernel: Path,
    initrd: Path,
    cmdline: str,
    console: Path,
    disks: Sequence[tuple[str, Path | Lun, str, str]],
    luns: Sequence[Lun] = (),
    memory: int = 640,
    vcpus: int = 2,
) -> str:
    """The XML of a lab guest. ``disks``: (target, file or a LUN that QEMU makes a disk of, format, serial); ``luns``
    become ``device='lun'`` disks sda...; memory in MiB.
    """
    parts = [
        f"<domain type='{'kvm' if kvm else 'qemu'}'><name>{name}</name>",
        f"<memory unit='MiB'>{memory}</memory><vcpu>{vcpus}</vcpu>",
        "<os><type arch='x86_64' machine='q35'>hvm</type>",
        f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>{cmdline}</cmdline></os>",
        "<features><acpi/></features>",
        "<cpu mode='host-passthrough'/>" if kvm else "<cpu mode='maximum'/>",
        "<on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash><devices>",
        "" if kvm else f"<emulator>{ONE_THREAD}</emulator>",
    ]
    for target, source, form, serial in disks:
        kind = "network" if isinstance(source, Lun) else "file"
        where = _network_source(source) if isinstance(source, Lun) else f"<source file={quoteattr(str(source))}/>"
        parts.append(
            f"<disk type='{kind}' device='disk'><driver name='qemu' type='{form}' discard='unmap'/>"
            f"{where}<target dev='{target}' bus='virtio'/><serial>{serial}</serial></disk>"
        )
    for number, lun in enumerate(luns):
        parts.append(
            f"<disk type='network' device='lun'><driver name='qemu' type='raw'/>{_network_source(lun)}"
            f"<target dev='sd{chr(97 + number)}' bus='scsi'/>"
            f"<address type='drive' controller='0' bus='0' target='0' unit='{number}'/></disk>"
        )
    parts.append("<controller type='scsi' index='0' model='virtio-scsi'/><controller type='virtio-serial' index='0'/>")
    parts.append("<controller type='usb' model='none'/><controller type='pci' model='pcie-root'/>")
    parts += ["<controller type='pci' model='pcie-root-port'/>"] * (len(disks) + 3 + SPARE_PORTS)
    parts.append(
        "<interface type='user'><model type='virtio'/></interface>"
        f"<serial type='file'><source path={quoteattr(str(console))}/><target port='0'/></serial>"
        "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        f"<channel type='unix'><target type='virtio' name='{LAB_CHANNEL}'/></channel>"
        "<memballoon model='none'/></devices></domain>"
    )
    return "".join(parts)


def _network_source(lun: Lun) -> str:
    host, port = lun.portal.split(":")
    return f"<source protocol='iscsi' name='{lun.iqn}/{lun.lun}'><host name='{host}' port='{port}'/></source>"


ONE_THREAD = Path(__file__).parent / "qemu-one-thread"
HUMAN_MONITOR = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP


class LabAgent:
    """Speaks with the lab's own agent in the guest, over a channel that nobody else uses. Thread-safe."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._numbers = itertools.count(1)

    def call(self, command: str, timeout: float = 30.0, **arguments: Any) -> Any:
        """The agent's ``return``. Raises LabError on its ``error`` and when there is no answer within ``timeout``
        seconds.
        """
        with self._lock:
            end = time.monotonic() + timeout
            if self._socket is None:
                self._socket = self._connect(end)
            try:
                answer = self._ask(self._socket, {"execute": command, "arguments": arguments}, end)
            except (OSError, ValueError) as error:
                self._drop()
                raise LabError(f"the lab's agent does not answer {command}: {error}") from error
        if "error" in answer:
            raise LabError(f"{command}: {answer['error'].get('desc', answer['error'])}")
        return answer["return"]

    def _connect(self, end: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        number = next(self._numbers)
        try:
            connection.connect(self._path)
            # bytes wait in the port until the guest opens it, so that this also waits for a guest that boots
            connection.sendall(
                b"\xff" + json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}}).encode() + b"\n"
            )
            received = b""
            while not received.endswith(b'{"return": %d}\n' % number):
                received += self._receive(connection, end)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise LabError(f"the lab's agent does not answer: {error}") from error
            raise
        return connection

    def _ask(self, connection: socket.socket, message: dict[str, Any], end: float) -> dict[str, Any]:
        connection.settimeout(max(0.01, end - time.monotonic()))
        connection.sendall(json.dumps(message).encode() + b"\n")
        received = bytearray()
        while not received.endswith(b"\n"):
            received += self._receive(connection, end)
        answer: dict[str, Any] = json.loads(received)
        return answer

    @staticmethod
    def _receive(connection: socket.socket, end: float) -> bytes:
        connection.settimeout(max(0.01, end - time.monotonic()))
        part = connection.recv(1 << 20)
        if not part:
            raise ConnectionResetError("the channel was closed")
        return part

    def _drop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        with self._lock:
            self._drop()


class Guest:
    """A running guest. ``disks``: target → image that it was started with; ``luns``: name → Lun."""

    def __init__(
        self, lab: Lab, domain: libvirt.virDomain, console: Path, disks: dict[str, Path], luns: dict[str, Lun]
    ) -> None:
        self.lab, self.domain, self.console_path, self.disks, self.luns = lab, domain, console, disks, luns
        self.name: str = domain.name()
        self.uuid: str = domain.UUIDString()
        self._agent: LabAgent | None = None

    @property
    def domain_xml(self) -> str:
        """The live XML, or the inactive one of a domain that is off."""
        return str(self.domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))

    def channel_path(self, name: str) -> str:
        """The host's socket of the virtio-serial channel ``name``. Raises LabError if the domain has none."""
        for channel in ElementTree.fromstring(self.domain_xml).iter("channel"):
            target, source = channel.find("target"), channel.find("source")
            if target is not None and target.get("name") == name and source is not None:
                return str(source.get("path"))
        raise LabError(f"{self.name} has no channel {name}")

    def wait_agent(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until the lab's storage is mounted in the guest and libvirt's agent answers. Raises LabError with the
        console's end.
        """
        end = time.monotonic() + timeout
        try:
            self._lab_agent().call("guest-ping", timeout=timeout)
            self.exec("until [ -e /run/lab-ready ]; do sleep 0.1; done", timeout=end - time.monotonic())
            failed = self.exec("cat /run/lab-failed 2>/dev/null || true").decode()
            if failed:
                raise LabError(failed)
            until(self._answers, max(1.0, end - time.monotonic()), "guest agent answers through libvirt", 0.1)
        except LabError as error:
            raise LabError(f"{self.name}: {error}\nconsole:\n{self.console()[-4000:]}") from error

    def _answers(self) -> bool:
        try:
            libvirt_qemu.qemuAgentCommand(self.domain, '{"execute":"guest-ping"}', 5, 0)
        except libvirt.libvirtError:
            if not self.domain.isActive():
                raise LabError("the domain is off") from None
            return False
        return True

    def _lab_agent(self) -> LabAgent:
        if self._agent is None:
            self._agent = LabAgent(self.channel_path(LAB_CHANNEL))
        return self._agent

    def agent(self, command: str, timeout: float = 30.0, **arguments: Any) -> Any:
        """A command to the guest's *official* agent through libvirt, as the project sends it; what it returned.

        Underscores in argument names become dashes. Raises libvirt.libvirtError.
        """
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        return json.loads(libvirt_qemu.qemuAgentCommand(self.domain, json.dumps(message), int(timeout), 0))["return"]

    def exec(
        self, command: str | Sequence[str], *, input: bytes | None = None, timeout: float = 60.0, check: bool = True
    ) -> bytes:
        """Run a shell string or an argument list in the guest, as root; its standard output (at most 16 MiB).

        Works also while the official agent is frozen, restricted or busy. Raises CommandFailed (unless ``check`` is
        False), LabError.
        """
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else list(command)
        end = time.monotonic() + timeout
        arguments: dict[str, Any] = {"path": argv[0], "arg": argv[1:], "capture-output": True}
        if input is not None:
            arguments["input-data"] = base64.b64encode(input).decode()
        agent = self._lab_agent()
        pid = agent.call("guest-exec", **arguments)["pid"]
        pause = 0.01
        while True:
            status = agent.call("guest-exec-status", pid=pid)
            if status["exited"]:
                break
            if time.monotonic() > end:
                raise LabError(f"{self.name}: {command!r} still runs after {timeout:g} s")
            time.sleep(pause)
            pause = min(0.25, pause * 1.5)
        out, err = (base64.b64decode(status.get(key, "")) for key in ("out-data", "err-data"))
        code = int(status.get("exitcode", -int(status.get("signal", 0))))
        if check and code != 0:
            raise CommandFailed(command, code, out, err)
        return out

    def read_file(self, path: str) -> bytes:
        """The content of a file in the guest, at most 16 MiB."""
        return self.exec(["/bin/cat", path])

    def write_file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file in the guest."""
        self.exec(["/bin/sh", "-c", 'cat > "$0" && chmod "$1" "$0"', path, f"{mode:o}"], input=content)

    def console(self) -> str:
        """What the guest's kernel and services have printed."""
        return self.console_path.read_text(errors="replace") if self.console_path.exists() else ""

    def kernel_log(self, lines: int) -> str:
        """The end of the kernel's log. Raises LabError when the guest does not answer."""
        try:
            return self.exec(f"dmesg | tail -n {lines}", timeout=30).decode(errors="replace")
        except (CommandFailed, libvirt.libvirtError, OSError) as error:
            raise LabError(f"{self.name}: {error}") from error

    def monitor(self, command: str) -> str:
        """What QEMU's human monitor answers to ``command``. Raises libvirt.libvirtError."""
        return str(libvirt_qemu.qemuMonitorCommand(self.domain, command, HUMAN_MONITOR))

    def last_words(self) -> str:
        """Of a guest that does not answer: where its CPUs are, what its kernel says of tasks that are blocked, and what
        was on its console before. Raises LabError when QEMU does not answer either.
        """
        try:
            registers = self.monitor("info registers -a").splitlines()
            for key in ("7", "l", "w"):  # log level 7, backtraces of the CPUs, tasks that are blocked
                self.monitor(f"sendkey alt-sysrq-{key}")
        except (libvirt.libvirtError, OSError) as error:
            raise LabError(f"{self.name}: QEMU does not answer either: {error}") from error
        self._wait_console()
        return "\n".join([*(line for line in registers if "IP=" in line), self.console()[-30000:]])

    def _wait_console(self) -> None:
        """Until nothing has come to the console for two seconds."""
        length, since = -1, time.monotonic()
        while time.monotonic() < since + 2:
            if len(self.console()) != length:
                length, since = len(self.console()), time.monotonic()
            time.sleep(0.2)

    def hook_log(self) -> list[str]:
        """``freeze`` and ``thaw`` in the order in which the guest's fsfreeze hooks ran."""
        text = self.exec("cat /run/fsfreeze-hook.log 2>/dev/null || true").decode()
        return [line.split()[0] for line in text.splitlines()]

    def restart_agent(self, options: str) -> None:
        """Restart the official agent with further options; none: as it was."""
        self.write_file("/run/qemu-ga.env", f"QEMU_GA_OPTIONS={options}\n".encode())
        self.exec("systemctl restart qemu-guest-agent")
        until(self._answers, 30, "guest agent answers after its restart", 0.1)

    @contextlib.contextmanager
    def agent_restricted(self, option: str = "") -> Iterator[None]:
        """A block in which the official agent runs with ``option``; by default it refuses guest-exec and guest-file-*,
        as that of Red Hat Enterprise Linux up to 9.3.
        """
        files = [f"guest-file-{verb}" for verb in ("open", "close", "read", "write", "seek", "flush")]
        try:
            self.restart_agent(option or "-b" + ",".join(("guest-exec", "guest-exec-status", *files)))
            yield
        finally:
            self.restart_agent("")

    @contextlib.contextmanager
    def without_python(self) -> Iterator[None]:
        """A block in which the guest has no python3."""
        binary = self.exec("readlink -f /usr/bin/python3").decode().strip()
        self.exec(f"mv /usr/bin/python3 /usr/bin/python3.hidden && mv {binary} {binary}.hidden")
        try:
            yield
        finally:
            self.exec(f"mv /usr/bin/python3.hidden /usr/bin/python3 && mv {binary}.hidden {binary}")

    def login(self, lun: Lun, timeout: float = 60.0) -> str:
        """Let the guest's initiator log in to a LUN's target; the device (``/dev/sdX``)."""
        node = f"iscsiadm -m node -T {lun.iqn} -p {lun.portal_guest}"
        path = f"/dev/disk/by-path/ip-{lun.portal_guest}-iscsi-{lun.iqn}-lun-{lun.lun}"
        self.exec(f"{node} -o new && {node} --login && until [ -e {path} ]; do sleep 0.1; done", timeout=timeout)
        return self.exec(["readlink", "-f", path]).decode().strip()

    def logout(self, lun: Lun) -> None:
        """Undo ``login``; what was mounted from there must be unmounted."""
        node = f"iscsiadm -m node -T {lun.iqn} -p {lun.portal_guest}"
        self.exec(f"udevadm settle && {node} --logout && {node} -o delete")  # udev may be reading it still

    def shutdown(self, timeout: float = 120.0) -> None:
        """Power off cleanly from within and wait until the domain is off."""
        with contextlib.suppress(LabError):  # the agent may be gone before it answers
            self.exec("sync; systemctl poweroff --no-block || poweroff", timeout=10)
        until(lambda: not self.domain.isActive(), timeout, f"{self.name} is off", 0.2)
        self.close()

    def close(self) -> None:
        """Close the connection to the guest; the guest runs on."""
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def destroy(self) -> None:
        """Pull the plug, forget the domain and delete the images it was started with."""
        self.close()
        self.lab.guests.discard(self)
        self._stop()
        for path in self.disks.values():
            path.unlink(missing_ok=True)
        for iqn in {lun.iqn for lun in self.luns.values()}:
            self.lab.iscsi.delete_target(iqn)

    def _stop(self) -> None:
        self.lab.remove_domain(self.name)
