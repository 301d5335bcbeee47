"""The definition of the restored domain, made from the one in the backup. Pure: XML in, XML out.

The restored machine must be able to run beside the one it was made from, so everything two domains cannot share is
made new or removed: name, UUID, MAC addresses, variable store, sockets, ports, host devices. What the guest can see
of its hardware stays: disks keep their targets and addresses, so that names in the guest do not change. Format of the
XML: https://libvirt.org/formatdomain.html
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.restore.devices import isolate_devices
from vmbackupd.restore.disks import PlacedVolume, rewrite_disks

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A definition and what its reader has to know.

    ``attached`` are the ids of the volumes that are disks of the domain; ``notes`` are sentences on everything that
    was dropped or changed beyond names; ``macs`` are (old, new) pairs in the order of the interfaces.
    """

    xml: str
    attached: frozenset[str]
    macs: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def fresh_mac() -> str:
    """A random address in the range QEMU and libvirt use for virtual machines."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def parse(xml: str) -> Element:
    """The root of a domain definition; raises ``RepositoryCorrupt`` where it is none."""
    try:
        # ElementTree forgets the prefixes it parsed; registering them keeps the definition readable.
        for _, (prefix, uri) in ElementTree.iterparse(io.StringIO(xml), events=["start-ns"]):
            if prefix and not prefix.startswith("ns"):
                ElementTree.register_namespace(prefix, uri)
        root = ElementTree.fromstring(xml)
    except (ElementTree.ParseError, ValueError) as error:
        raise RepositoryCorrupt(f"the domain definition in the backup is not XML ({error})") from error
    if root.tag != "domain" or root.find("devices") is None:
        raise RepositoryCorrupt(f"the domain definition in the backup is no libvirt domain (root element <{root.tag}>)")
    return root


def nvram_of(xml: str) -> tuple[bool, str | None]:
    """Whether the domain boots by UEFI with a variable store of its own, and the path of that store where it is
    stated."""
    os_element = parse(xml).find("os")
    if os_element is None:
        return False, None
    nvram = os_element.find("nvram")
    if nvram is None:
        return os_element.get("firmware") == "efi", None
    source = nvram.find("source")
    path = source.get("file") if source is not None else (nvram.text or "").strip()
    return True, path or None


def tpm_of(xml: str) -> str | None:
    """The version (``2.0``, ``1.2``) of the domain's emulated TPM, None without one."""
    backend = parse(xml).find("devices/tpm/backend[@type='emulator']")
    return None if backend is None else backend.get("version", "2.0")


def rewrite(xml: str, *, name: str, uuid: str, volumes: Sequence[PlacedVolume], nvram: str | None,
            mac: Callable[[], str] = fresh_mac) -> Rewritten:
    """The definition of the restored domain. ``nvram`` is the path of its own variable store, where it has one."""
    root = parse(xml)
    devices = root.find("devices")
    assert devices is not None
    notes: list[str] = []
    _identity(root, name, uuid)
    _labels(root, notes)
    _firmware(root, nvram, notes)
    macs = _addresses(devices, mac)
    attached = rewrite_disks(devices, volumes, notes)
    isolate_devices(devices, notes)
    if root.find(f"{{{QEMU_NAMESPACE}}}commandline") is not None:
        notes.append("the definition hands arguments straight to QEMU (qemu:commandline): they are kept as they were;"
                     " check them for paths and ports the original VM uses")
    ElementTree.indent(root)
    return Rewritten(ElementTree.tostring(root, encoding="unicode") + "\n", attached, macs, tuple(notes))


def _identity(root: Element, name: str, uuid: str) -> None:
    root.attrib.pop("id", None)
    _set_text(root, "name", name, 0)
    _set_text(root, "uuid", uuid, 1)
    for entry in root.iterfind("sysinfo/system/entry[@name='uuid']"):
        entry.text = uuid  # libvirt refuses a domain whose two UUIDs differ
    genid = root.find("genid")
    if genid is not None:
        genid.text = None  # libvirt makes a new one: it is how a guest learns that its time was turned back


def _set_text(root: Element, tag: str, text: str, position: int) -> None:
    element = root.find(tag)
    if element is None:
        element = Element(tag)
        root.insert(position, element)
    element.text = text


def _labels(root: Element, notes: list[str]) -> None:
    """Labels are made for one domain's UUID and files; without the elements libvirt makes new ones."""
    for label in root.findall("seclabel"):
        if label.get("type") == "none":
            continue
        if label.get("type") == "static":
            notes.append(f"static security label of model {label.get('model', 'unknown')} removed: the domain gets a"
                         " dynamic one")
        root.remove(label)


def _firmware(root: Element, path: str | None, notes: list[str]) -> None:
    os_element = root.find("os")
    if os_element is None:
        return
    nvram = os_element.find("nvram")
    if path is None:
        if nvram is not None:
            os_element.remove(nvram)
            notes.append("the backup holds no UEFI variable store: libvirt makes a new one from its template, and boot"
                         " entries have to be made again")
        return
    if nvram is None:
        nvram = ElementTree.SubElement(os_element, "nvram")
    for child in list(nvram):
        nvram.remove(child)
    nvram.attrib.pop("type", None)
    nvram.text = path


def _addresses(devices: Element, mac: Callable[[], str]) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    taken: set[str] = set()
    for interface in devices.iterfind("interface"):
        element = interface.find("mac")
        if element is None:
            element = ElementTree.SubElement(interface, "mac")
        new = mac()
        while new in taken:
            new = mac()
        taken.add(new)
        pairs.append((element.get("address", ""), new))
        element.set("address", new)
        element.attrib.pop("type", None)
    return tuple(pairs)
