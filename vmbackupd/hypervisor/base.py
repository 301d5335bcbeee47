"""What the job layer may ask of a hypervisor, whichever it is.

Every method is a coroutine that never blocks the event loop. Errors: ``NotFound`` (no such domain), ``NotRunning``,
``GuestAgentUnavailable``, ``GuestAgentRefused``, ``HypervisorError`` for the rest, each naming the domain and the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vmbackupd.errors import HypervisorError


@dataclass(frozen=True, slots=True)
class DiskSource:
    """Where a disk's bytes come from, from the domain XML. ``format`` is the driver type, never probed."""

    kind: str  # file, block, network, volume, ...
    format: str  # qcow2, raw, ...
    path: str | None = None  # file or block
    protocol: str | None = None  # network: iscsi, rbd, ...
    name: str | None = None  # network: IQN/LUN for iscsi
    host: str | None = None
    port: int | None = None


@dataclass(frozen=True, slots=True)
class GuestAddress:
    """Where the guest finds a device: PCI address as the guest numbers it (``0000:03:00.0``), and behind a
    SCSI or SATA controller the target and unit on it."""

    pci: str
    target: int | None = None
    unit: int | None = None


@dataclass(frozen=True, slots=True)
class DomainDisk:
    """One ``<disk>`` of a domain. ``device`` is disk, lun, cdrom or floppy."""

    target: str
    device: str
    bus: str
    source: DiskSource | None
    read_only: bool
    shareable: bool
    serial: str | None
    wwn: str | None
    alias: str | None
    size: int | None  # bytes, None where it could not be read (empty drive)
    address: GuestAddress | None  # None for a domain that is off or a bus whose place in the guest is unknown
    chain: tuple[str, ...] = ()  # file paths, top image first
    transient: bool = False  # libvirt throws its changes away, and lets nobody snapshot it


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """A domain as it is now. ``config`` is its whole configuration, secrets too, as texts by the names they have in a
    backup: of libvirt ``domain.xml`` (live, or inactive when it is off) and ``domain-inactive.xml`` (persistent
    domains). ``has_agent``: there is a port for the guest agent; whether anybody answers there is asked with
    ``guest-ping``."""

    name: str
    uuid: str
    running: bool
    persistent: bool
    has_agent: bool
    config: Mapping[str, str]
    disks: tuple[DomainDisk, ...]
    hostdevs: tuple[str, ...]  # one readable line for each <hostdev>
    nvram: str | None  # path of the UEFI variable store
    tpm_state: str | None  # directory of the emulated TPM's state


@dataclass(frozen=True, slots=True)
class FleeceExport:
    """A disk that is served as of T2: the NBD export's name, and the name of the bitmap (``qemu:dirty-bitmap:NAME``) of
    what changed since the checkpoint that was asked for; None where there is none, and the disk is to be read whole."""

    name: str
    bitmap: str | None = None


BITMAP_PREFIX = "vmbackupd-"  # checkpoints and bitmaps whose names begin otherwise belong to others


def bitmap_name(checkpoint: str, target: str) -> str:
    """What the bitmap of one disk under ``checkpoint`` is called in its image. It names the disk, so that an image that
    moved from one target to another is never taken for the one that was recorded."""
    return f"{checkpoint}.{target}"


class HypervisorLost(HypervisorError):
    """The hypervisor's own service (libvirtd, QEMU's monitor) went away during a call: whether the call took effect has
    to be asked when it is back. The next call connects again."""

    code = "HypervisorLost"


class Hypervisor(Protocol):
    """One connection to a hypervisor. ``defines``: whether it takes new domains (:meth:`define`, :meth:`start`)."""

    defines: bool

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def domains(self) -> Sequence[tuple[str, str, bool]]:
        """(name, uuid, running) of every domain."""

    async def domain(self, name_or_uuid: str) -> DomainInfo: ...

    async def agent(self, uuid: str, command: str, arguments: Mapping[str, object] | None = None, *,
                    timeout: float = 10.0) -> object:
        """One qemu-guest-agent command; returns its ``return`` value."""

    async def attach_channel(self, uuid: str, name: str) -> str:
        """Hot-plug the virtio-serial port ``name``; returns the path of the unix socket on the host."""

    async def detach_channel(self, uuid: str, name: str) -> None:
        """Unplug it and wait until the guest has let go. A port that is not there is no error."""

    async def attach_scratch(self, uuid: str, path: str, serial: str) -> str:
        """Hot-plug the qcow2 ``path`` as a virtio-blk disk; returns its target."""

    async def detach_scratch(self, uuid: str, path: str) -> None:
        """Unplug the disk whose image (or whose chain's base) is ``path`` and wait; not there is no error."""

    async def snapshot(self, uuid: str, overlays: Mapping[str, str]) -> None:
        """External snapshot of all disks ``{target: overlay path}`` in one transaction. The overlay files are made by
        the call's own preparation (:meth:`prepare_overlays`) or, if absent, by libvirt."""

    async def prepare_overlays(self, uuid: str, overlays: Mapping[str, str]) -> None:
        """Create the overlay files beforehand, so that the snapshot itself is short."""

    async def drop_overlay(self, uuid: str, overlay: str, progress: Callable[[int, int], None] | None = None) -> None:
        """Undo of a snapshot of one disk, from whatever state it is in: commit the overlay into its base and pivot when
        it is the active layer (ending a stale block job first), commit offline when the domain is off and refers to
        it, then delete the file. An overlay that is in no chain is only deleted; absent is no error."""

    async def begin_bitmaps(self, uuid: str, name: str, targets: Sequence[str]) -> Mapping[str, str | None]:
        """Start recording which parts of each disk are written, under the checkpoint ``name`` (it begins with
        ``BITMAP_PREFIX``). ``{target: None}`` where it records from now on, else the reason why this disk has no bitmap
        (a format that keeps none, QEMU refused, ...). That one disk has none is no error.

        Called before the freeze, so that a bitmap holds a superset of what is written after T1: what is changed
        between T1 and T2, and then reverted in the backup, is changed again for the next one."""

    async def bitmap_reasons(self, uuid: str, name: str, targets: Sequence[str]) -> Mapping[str, str | None]:
        """Whether the bitmaps of ``name`` hold every write since they began: None, or why this disk has to be read
        whole (missing, inconsistent, not recording, another image under the target, ...)."""

    async def drop_bitmaps(self, uuid: str, name: str) -> None:
        """Forget the checkpoint ``name``, from whatever state it is in, and from a domain that is off too; one that is
        not there is no error. Nobody else's checkpoint or bitmap is touched."""

    async def bitmaps(self, uuid: str) -> Sequence[str]:
        """Names of our checkpoints of this domain, in no order."""

    async def begin_fleece(self, uuid: str, disks: Mapping[str, str], socket: str,
                           since: Mapping[str, str]) -> Mapping[str, FleeceExport]:
        """T2 of the second kind: serve all disks ``{target: path of a scratch image}`` as of one instant, read-only,
        over NBD on the unix socket, while the guest goes on. What the guest overwrites goes into the scratch images
        first. ``since`` names the checkpoint whose bitmap is to be served with a disk. The caller watches that the
        scratch images have room, and removes them. A ``lun`` is refused."""

    async def end_fleece(self, uuid: str) -> None:
        """End the job of :meth:`begin_fleece`. None that runs is no error; somebody else's is left alone."""

    async def define(self, xml: str) -> str:
        """Define a domain; returns its uuid."""

    async def undefine(self, uuid: str) -> None:
        """Forget a domain, with its NVRAM, TPM state and saved state. Its disks stay."""

    async def start(self, uuid: str) -> None:
        """Power on. Running already is no error."""

    async def destroy(self, uuid: str) -> None:
        """Power off at once. Off already is no error."""

    async def path_users(self, path: str) -> Sequence[str]:
        """Names of the domains, running or not, one of whose disks has ``path`` in its chain."""

    def watch(self, uuid: str, callback: Callable[[str], None]) -> Callable[[], None]:
        """Call ``callback`` in the event loop with ``started``, ``stopped`` (also a crash), ``agent-connected``,
        ``agent-disconnected``, and ``hypervisor-lost`` when libvirtd went away (it is looked for again, and a domain
        that ended meanwhile is ``stopped``). Returns the function that ends it. To be called after :meth:`open`."""
