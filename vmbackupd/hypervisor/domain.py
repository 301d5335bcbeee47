"""libvirt's domain XML (https://libvirt.org/formatdomain.html) and QEMU's ``query-pci``, read into plain values.

Pure: no libvirt here. The XML comes from libvirt itself, so it is trusted to be XML; what it may lack is allowed for.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.base import DiskSource, DomainDisk, GuestAddress
from vmbackupd.hypervisor.guestagent import AGENT_PORT


@dataclass(frozen=True, slots=True)
class Mirror:
    """A copy or commit that runs on a disk: where to, and whether it has caught up."""

    job: str  # copy, active-commit
    path: str | None
    ready: bool


@dataclass(frozen=True, slots=True)
class ChainLink:
    """One image of a disk's chain as libvirt numbers it (``vda[3]``)."""

    source: DiskSource
    index: int | None


def parse(xml: str) -> ET.Element:
    """The root element of a domain XML."""
    try:
        root = ET.fromstring(xml)
    except ET.ParseError as error:
        raise HypervisorError(f"domain XML does not parse: {error}") from error
    if root.tag != "domain":
        raise HypervisorError(f"domain XML begins with <{root.tag}>, not <domain>")
    return root


def parse_checkpoint(xml: str) -> ET.Element | None:
    """The domain as it was when a ``<domaincheckpoint>`` was made, None if that is not told."""
    try:
        return ET.fromstring(xml).find("domain")
    except ET.ParseError as error:
        raise HypervisorError(f"checkpoint XML does not parse: {error}") from error


def disk_elements(root: ET.Element) -> Iterator[tuple[str, ET.Element]]:
    """(target, element) of each ``<disk>``."""
    for element in root.iterfind("./devices/disk"):
        target = element.find("target")
        if target is not None and target.get("dev"):
            yield target.get("dev", ""), element


def disk_element(root: ET.Element, target: str) -> ET.Element | None:
    return dict(disk_elements(root)).get(target)


def source_of(element: ET.Element) -> DiskSource | None:
    """The ``<source>`` of a ``<disk>`` or ``<backingStore>``; None for an empty drive or the end of a chain."""
    source = element.find("source")
    kind = element.get("type", "file")
    if source is None:
        return None
    form = _format(element)
    if kind in ("file", "block", "dir"):
        path = source.get({"file": "file", "block": "dev", "dir": "dir"}[kind])
        return DiskSource(kind, form, path=path) if path else None
    if kind == "network":
        host = source.find("host")
        port = host.get("port") if host is not None else None
        return DiskSource(kind, form, path=host.get("socket") if host is not None else None,
                          protocol=source.get("protocol"), name=source.get("name"),
                          host=host.get("name") if host is not None else None,
                          port=int(port) if port and port.isdecimal() else None)
    if kind == "volume":
        pool, volume = source.get("pool"), source.get("volume")
        return DiskSource(kind, form, name=f"{pool}/{volume}") if pool and volume else None
    # nvme, vhostuser, vhostvdpa: what there is to name them by
    return DiskSource(kind, form, path=source.get("path") or source.get("dev"))


def _format(element: ET.Element) -> str:
    """The driver type; libvirt takes a disk without one as raw. A ``<backingStore>`` has ``<format>`` instead."""
    for tag in ("driver", "format"):
        found = element.find(tag)
        if found is not None and found.get("type"):
            return found.get("type", "raw")
    return "raw"


def chain_of(element: ET.Element) -> list[ChainLink]:
    """The images of a disk, top first. Only the XML of a running domain has the backing files."""
    links: list[ChainLink] = []
    layer: ET.Element | None = element
    while layer is not None:
        source = source_of(layer)
        if source is None:
            break
        found = layer.find("source")
        number = (found.get("index") if found is not None else None) or layer.get("index")
        links.append(ChainLink(source, int(number) if number and number.isdecimal() else None))
        layer = layer.find("backingStore")
    return links


def mirror_of(element: ET.Element) -> Mirror | None:
    """The ``<mirror>`` of a disk on which a copy or an active commit runs."""
    mirror = element.find("mirror")
    if mirror is None:
        return None
    source = mirror.find("source")
    path = None if source is None else source.get("file") or source.get("dev")
    return Mirror(mirror.get("job", "copy"), path or mirror.get("file"), mirror.get("ready") == "yes")


def parse_disks(root: ET.Element) -> list[DomainDisk]:
    """Every disk, without size and without place in the guest."""
    return [_disk(target, element) for target, element in disk_elements(root)]


def _disk(target: str, element: ET.Element) -> DomainDisk:
    place = element.find("target")
    alias = element.find("alias")
    chain = chain_of(element)
    return DomainDisk(
        target=target, device=element.get("device", "disk"), bus="" if place is None else place.get("bus", ""),
        source=source_of(element), read_only=element.find("readonly") is not None,
        shareable=element.find("shareable") is not None, serial=_text(element, "serial"), wwn=_text(element, "wwn"),
        alias=None if alias is None else alias.get("name"), size=None, address=None,
        chain=tuple(link.source.path for link in chain if link.source.path and link.source.kind in ("file", "block")),
        transient=element.find("transient") is not None)


def _text(element: ET.Element, tag: str) -> str | None:
    text = element.findtext(tag)
    return text.strip() or None if text else None


def hostdevs(root: ET.Element) -> list[str]:
    """A readable line for each ``<hostdev>``: ``pci 0000:3b:00.0``, ``usb 0951:1666``, ``scsi scsi_host2 0:0:1``."""
    return [_hostdev(element) for element in root.iterfind("./devices/hostdev")]


def _hostdev(element: ET.Element) -> str:
    kind = element.get("type") or element.get("mode") or "hostdev"
    source = element.find("source")
    if source is None:
        return kind
    address = source.find("address")
    if kind == "pci" and address is not None:
        return f"pci {_pci(address)}"
    if kind == "usb":
        vendor, product = source.find("vendor"), source.find("product")
        if vendor is not None and product is not None:
            return f"usb {vendor.get('id', '').removeprefix('0x')}:{product.get('id', '').removeprefix('0x')}"
        if address is not None:
            return f"usb bus {address.get('bus')} device {address.get('device')}"
    if kind == "scsi":
        if source.get("protocol"):
            return f"scsi {source.get('protocol')} {source.get('name')}"
        adapter = source.find("adapter")
        if adapter is not None and address is not None:
            place = ":".join(address.get(key, "0") for key in ("bus", "target", "unit"))
            return f"scsi {adapter.get('name')} {place}"
    if kind == "mdev" and address is not None:
        return f"mdev {address.get('uuid')}"
    words: list[str] = [kind, *(f"{key}={value}" for key, value in sorted(source.attrib.items()))]
    return " ".join(words)


def nvram_path(root: ET.Element) -> str | None:
    """The file of the UEFI variables."""
    nvram = root.find("./os/nvram")
    if nvram is None:
        return None
    source = nvram.find("source")
    path = nvram.text.strip() if nvram.text else ""
    return path or (source.get("file") or source.get("dev") if source is not None else None)


def tpm_state(root: ET.Element, base: str) -> str | None:
    """The directory of an emulated TPM's state below libvirt's ``base`` (``/var/lib/libvirt/swtpm``)."""
    backend = root.find("./devices/tpm/backend[@type='emulator']")
    if backend is None:
        return None
    source = backend.find("source")
    given = None if source is None else source.get("path")
    version = "tpm1.2" if backend.get("version") == "1.2" else "tpm2"
    return given or f"{base}/{(root.findtext('uuid') or '').strip()}/{version}"


def channel(root: ET.Element, name: str) -> ET.Element | None:
    """The virtio-serial ``<channel>`` of that name."""
    for element in root.iterfind("./devices/channel"):
        target = element.find("target")
        if target is not None and target.get("type") == "virtio" and target.get("name") == name:
            return element
    return None


def has_agent(root: ET.Element) -> bool:
    """Whether there is a port for the guest agent."""
    return channel(root, AGENT_PORT) is not None


def virtio_scsi_controller(root: ET.Element) -> int | None:
    """The index of the first virtio-scsi controller."""
    for element in root.iterfind("./devices/controller[@type='scsi']"):
        if element.get("model", "").startswith("virtio-"):
            return int(element.get("index", "0"))
    return None


def pci_places(reply: object) -> dict[str, str]:
    """QEMU's device ids to the addresses the guest sees, from the answer to ``query-pci``.

    Bus numbers are the ones the guest's firmware wrote into the bridges: a device behind a bridge whose secondary
    bus is still 0 has no address yet and is left out.
    """
    places: dict[str, str] = {}

    def walk(devices: Any) -> None:
        for device in devices:
            if device["qdev_id"]:
                where = f"0000:{device['bus']:02x}:{device['slot']:02x}.{device['function']:x}"
                places[device["qdev_id"]] = where
            bridge = device.get("pci_bridge")
            if bridge is not None and bridge["bus"]["secondary"] != 0:
                walk(bridge.get("devices", ()))

    try:
        assert isinstance(reply, list)
        for bus in reply:
            walk(bus["devices"])
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise HypervisorError(f"QEMU's answer to query-pci is not understood: {error!r}") from error
    return places


def guest_address(element: ET.Element, root: ET.Element, places: Mapping[str, str]) -> GuestAddress | None:
    """Where the guest finds a disk: its own PCI function, or its controller's with target and unit."""
    address = element.find("address")
    if address is None:
        return None
    if address.get("type") == "pci":
        pci = _place(element, places)
        return GuestAddress(pci) if pci else None
    target = element.find("target")
    bus = "" if target is None else target.get("bus", "")
    if address.get("type") != "drive" or bus not in ("scsi", "sata", "ide"):
        return None
    controller = _controller(root, bus, address.get("controller", "0"))
    if controller is None:
        return None
    pci = _place(controller, places)
    if pci is None:
        return None
    number, unit = int(address.get("target", "0")), int(address.get("unit", "0"))
    if bus == "ide":
        number = int(address.get("bus", "0"))
    elif bus == "scsi" and not controller.get("model", "").startswith("virtio-"):
        number, unit = unit, 0  # other SCSI controllers have one LUN a target, and libvirt counts targets in ``unit``
    return GuestAddress(pci, number, unit)


def _controller(root: ET.Element, kind: str, index: str) -> ET.Element | None:
    for element in root.iterfind(f"./devices/controller[@type='{kind}']"):
        if element.get("index", "0") == index:
            return element
    return None


def _place(element: ET.Element, places: Mapping[str, str]) -> str | None:
    alias = element.find("alias")
    found = None if alias is None else places.get(alias.get("name", ""))
    if found is not None:
        return found
    address = element.find("address")
    # Devices built into the machine have no id in QEMU. They sit on the root bus, which is bus 0 to libvirt and guest.
    if address is not None and address.get("type") == "pci" and int(address.get("bus", "0"), 0) == 0:
        return _pci(address) if address.get("slot") else None
    return None


def _pci(address: ET.Element) -> str:
    domain, bus, slot, function = (int(address.get(key, "0"), 0) for key in ("domain", "bus", "slot", "function"))
    return f"{domain:04x}:{bus:02x}:{slot:02x}.{function:x}"
