"""The lab itself: one directory, its services, and the guests that live in them."""

from __future__ import annotations

import atexit
import fcntl
import os
import secrets
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import libvirt

from tests.lab import image
from tests.lab.guest import Guest, domain_xml
from tests.lab.iscsi import IscsiTarget, Lun
from tests.lab.qemu import PlainGuest
from tests.lab.services import LabError, Processes, kept, open_libvirt, start_bus, start_libvirt
from tests.lab.volumes import copy_file

LOCK = Path("/tmp/vmbackupd-lab.lock")
CMDLINE = (
    "console=ttyS0 loglevel=4 rw mitigations=off random.trust_cpu=on audit=0 apparmor=0 tsc=reliable no_timer_check "
    "net.ifnames=0 systemd.show_status=no 8250.nr_uarts=1 cryptomgr.notests sysrq_always_enabled"
)
KINDS = {
    "plain": (image.STANDARD, "plain", 640),
    "lvm": (image.STANDARD, "root", 640),
    "big": ("big", "plain", 1024),
    "trixie": ("trixie", "plain", 640),
    "bullseye": ("bullseye", "plain", 640),
}
"""Kind of guest → (system, a key of image.SYSTEMS; template of its root disk; memory in MiB)."""
VIRTUAL = {"vdb": "data", "vdc": "spana"}
"""Virtual disks that every guest has besides its root: target → template."""
UNDEFINE = (
    libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
    | libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
)


class Lab:
    """``with Lab() as lab``: everything it started is gone at the end, also after a failure, a SIGINT or a SIGKILL.

    ``dir`` holds all files (short path), ``bus_address`` and ``libvirt_uri`` are for the daemon under test, ``iscsi``
    makes LUNs, ``processes`` starts programs that shall not outlive the lab. Environment: VMBACKUPD_LAB_DIR (parent of
    ``dir``), VMBACKUPD_LAB_CACHE, VMBACKUPD_LAB_KVM (0 or 1 instead of trying), VMBACKUPD_LAB_KEEP (leave ``dir``
    behind). One lab at a time runs on a machine; a second one waits.
    """

    dir: Path
    bus_address: str
    libvirt_uri: str
    iscsi: IscsiTarget
    processes: Processes
    connection: libvirt.virConnect
    kvm: bool

    def __init__(self) -> None:
        self.guests: set[Guest] = set()
        self._lock: int | None = None
        self._open = False

    def __enter__(self) -> Lab:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            print(f"lab: closing failed too, after {error!r}", file=sys.stderr)

    def start(self) -> None:
        """Build the images if need be, and start the services. Raises ImageError, LabError."""
        self.images = image.ensure()
        self._lock = _take_lock()
        try:
            self.kvm = _usable_kvm(self.images)
            self.dir = _directory()
            self.processes = Processes(self.dir, self._lock)
            self._open = True
            atexit.register(self.close)
            self.bus_address = start_bus(self.processes, self.dir)
            self.iscsi = IscsiTarget(self.processes, self.dir)
            self.libvirt_uri = start_libvirt(self.processes, self.dir)
            self.connection = open_libvirt(self.libvirt_uri)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop everything and wait for it; idempotent. Raises the first error met, after all was tried."""
        error: Exception | None = None
        if self._open:
            self._open = False
            atexit.unregister(self.close)
            if hasattr(self, "connection"):
                for guest in self.guests:
                    error = kept(error, guest.close)
                error = kept(error, self._remove_domains)
                error = kept(error, self.connection.close)
            if hasattr(self, "iscsi"):
                error = kept(error, self.iscsi.close)
            error = kept(error, self.processes.close)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if error is not None:
            raise error

    def _remove_domains(self) -> None:
        error: Exception | None = None
        for domain in self.connection.listAllDomains():
            name = domain.name()
            error = kept(error, lambda name=name: self.remove_domain(name))  # type: ignore[misc]
        if error is not None:
            raise error

    def remove_domain(self, name: str) -> None:
        """Destroy and undefine the domain ``name``; no error if there is none."""
        try:
            domain = self.connection.lookupByName(name)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return
            raise
        if domain.isActive():
            domain.destroy()
        if domain.isPersistent():
            domain.undefineFlags(UNDEFINE)

    def start_guest(
        self,
        kind: str = "plain",
        name: str | None = None,
        *,
        cmdline: str = "",
        wait: bool = True,
        libvirt: bool = True,
        disks: Mapping[str, int] | None = None,
        luns: Mapping[str, int] | None = None,
        direct_luns: Mapping[str, int] | None = None,
        formats: Mapping[str, str] | None = None,
    ) -> Guest:
        """Boot a new guest of a kind (a key of KINDS; all but ``lvm`` have an ext4 root on the whole of vda). Waits for
        agent and mounts.

        vda root, vdb VG vgdata, vdc one half of VG vgspan, sda (``device='lun'``) VG vglun; over its own iSCSI
        initiator VG vgiscsi and the other half of vgspan. On top of these come empty ones, each with its size in bytes:
        virtual ``disks`` by target (``vdd``...), ``luns`` of the guest's own initiator by name, ``direct_luns``
        (``device='lun'``: sdb...) by name. ``formats`` gives virtual disks other images than qcow2, by target:
        ``raw``, ``vmdk``, ``vpc``, or ``iscsi`` (raw, over QEMU's own initiator). ``cmdline`` is added to the kernel's
        (``vmbk.agent=noexec``: the agent refuses guest-exec). Without ``libvirt`` it is a QEMU process with the same
        devices.
        """
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r}: one of {', '.join(KINDS)}")
        name = name or kind
        system, root, memory = KINDS[kind]
        images = image.ensure(system)
        paths = self._disks(name, images.disk(root), disks or {})
        known = self._luns(name, luns or {}, direct_luns or {})
        shapes = {target: (formats or {}).get(target, "qcow2") for target in paths}
        sources = {target: self._in_format(name, target, paths, shape) for target, shape in shapes.items()}
        words = [
            CMDLINE,
            "root=/dev/mapper/vgroot-root" if root == "root" else "root=/dev/vda",
            f"systemd.hostname={name}",
            f"vmbk.portal={self.iscsi.portal_guest} vmbk.iqn={known['iscsi'].iqn}",
            cmdline,
        ]
        console = self.dir / f"{name}.console"
        xml = domain_xml(
            name,
            kvm=self.kvm,
            kernel=images.kernel,
            initrd=images.initrd,
            cmdline=" ".join(words).strip(),
            console=console,
            disks=[
                (target, source, "raw" if isinstance(source, Lun) else shapes[target], f"{name}-{target}")
                for target, source in sources.items()
            ],
            luns=[known[lun] for lun in ("lun", *(direct_luns or {}))],
            memory=memory,
        )
        if libvirt:
            domain = self.connection.defineXML(xml)
            domain.create()
            guest = Guest(self, domain, console, paths, known)
        else:
            guest = PlainGuest(self, name, xml, console, paths, known)
        self.guests.add(guest)
        if wait:
            guest.wait_agent()
        return guest

    def _disks(self, name: str, root: Path, extra: Mapping[str, int]) -> dict[str, Path]:
        """Virtual disks of a new guest: target → qcow2."""
        paths = {target: self.dir / f"{name}-{target}.qcow2" for target in ("vda", *VIRTUAL, *extra)}
        copy_file(root, paths["vda"])
        for target, template in VIRTUAL.items():
            copy_file(self.images.disk(template), paths[target])
        for target, size in extra.items():
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", paths[target], str(size)], check=True)
        return paths

    def _in_format(self, name: str, target: str, paths: dict[str, Path], form: str) -> Path | Lun:
        """The image of a virtual disk, converted; ``paths`` is told where it lies now."""
        if form == "qcow2":
            return paths[target]
        old = paths[target]
        new = paths[target] = old.with_suffix(f".{'raw' if form == 'iscsi' else form}")
        subprocess.run(["qemu-img", "convert", "-O", new.suffix[1:], str(old), str(new)], check=True)
        old.unlink()
        return self.iscsi.create_lun(f"{name}-{target}", source=new) if form == "iscsi" else new

    def _luns(self, name: str, inside: Mapping[str, int], direct: Mapping[str, int]) -> dict[str, Lun]:
        """LUNs of a new guest by name: those of its own initiator in one target, those that QEMU passes in another."""
        own, passed = f"{name}-guest", f"{name}-lun"
        found = {
            "iscsi": self.iscsi.create_lun(f"{name}-iscsi", source=self.images.disk("iscsi"), target=own),
            "span": self.iscsi.create_lun(f"{name}-span", source=self.images.disk("spanb"), target=own),
            "lun": self.iscsi.create_lun(f"{name}-lun", source=self.images.disk("lun"), target=passed),
        }
        for lun, size in inside.items():
            found[lun] = self.iscsi.create_lun(f"{name}-{lun}", size=size, target=own)
        for lun, size in direct.items():
            found[lun] = self.iscsi.create_lun(f"{name}-{lun}", size=size, target=passed)
        return found

    def boot_restored(
        self, name: str, *, iqns: Sequence[str] | None = None, lun: Lun | None = None, wait: bool = True
    ) -> Guest:
        """Boot a domain that something else defined in the lab's libvirtd (a restored lab guest), and wait for it.

        ``iqns``: the targets that the guest's initiator shall log in to, instead of those of the original; ``lun``:
        what ``sda`` shall be. Both keep a copy from writing to the original's LUNs. The console goes to a file of its
        own.
        """
        root = ElementTree.fromstring(
            self.connection.lookupByName(name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE)
        )
        line = root.find("os/cmdline")
        if iqns is not None and line is not None:
            words = [word for word in (line.text or "").split() if not word.startswith(("vmbk.iqn=", "vmbk.portal="))]
            line.text = " ".join([*words, f"vmbk.portal={self.iscsi.portal_guest} vmbk.iqn={','.join(iqns)}"])
        if lun is not None:
            for disk in root.iterfind("devices/disk[@device='lun']"):
                source = disk.find("source")
                assert source is not None
                source.set("name", f"{lun.iqn}/{lun.lun}")
        console = self.dir / f"{name}.console"
        for source in root.iterfind("devices/serial/source"):
            source.set("path", str(console))
        for source in root.iterfind("devices/console/source"):
            source.set("path", str(console))
        domain = self.connection.defineXML(ElementTree.tostring(root, encoding="unicode"))
        if not domain.isActive():
            domain.create()
        disks = {}
        for disk in root.iterfind("devices/disk"):
            source, target = disk.find("source"), disk.find("target")
            if source is not None and target is not None and source.get("file"):
                disks[str(target.get("dev"))] = Path(str(source.get("file")))
        guest = Guest(self, domain, console, disks, {})
        self.guests.add(guest)
        if wait:
            guest.wait_agent()
        return guest


def _take_lock() -> int:
    lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"lab: another lab runs on this machine; waiting for {LOCK}", file=sys.stderr, flush=True)
        began = time.monotonic()
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(f"lab: waited {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return lock


def _directory() -> Path:
    """A new directory with a short name: unix sockets far below it must fit in 107 bytes."""
    parent = Path(os.environ.get("VMBACKUPD_LAB_DIR", "/var/tmp"))
    while True:
        path = parent / f"vl{secrets.token_hex(2)}"
        try:
            path.mkdir(mode=0o711, parents=True)
        except FileExistsError:
            continue
        return path


def _usable_kvm(images: image.Images) -> bool:
    """Whether KVM really boots a guest here (a /dev/kvm may exist and not). The answer is kept until the host boots
    again.
    """
    given = os.environ.get("VMBACKUPD_LAB_KVM")
    if given in ("0", "1"):
        return given == "1"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = image.cache_directory() / f"kvm-{boot}"
    if known.exists():
        return known.read_text() == "yes"
    command = [
        "qemu-system-x86_64", "-machine", "q35,accel=kvm", "-cpu", "host", "-m", "512", "-nodefaults", "-no-reboot",
        "-display", "none", "-serial", "stdio", "-kernel", str(images.kernel), "-initrd", str(images.initrd),
        "-append", "console=ttyS0 panic=-1 rdinit=/no/such root=/no/such",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=20)
        usable = b"Kernel panic" in done.stdout  # that far the kernel has come up
    except (subprocess.TimeoutExpired, OSError):
        usable = False
    for stale in known.parent.glob("kvm-*"):
        stale.unlink(missing_ok=True)
    known.write_text("yes" if usable else "no")
    return usable


__all__ = ["Guest", "Lab", "LabError"]
