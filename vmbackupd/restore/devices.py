"""Devices that tie a definition to one host or one running domain: made automatic again, or dropped with a note.

Format of the elements: https://libvirt.org/formatdomain.html#devices
"""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element

OUR_CHANNEL = re.compile(r"org\.vmbackupd\.j[0-9a-f]{8}\.")
CHARACTER_DEVICES = ("serial", "console", "channel", "parallel")

# Character device types without anything of the host in them.
_SHAREABLE_TYPES = ("null", "vc", "stdio", "spicevmc", "spiceport", "qemu-vdagent", "dbus")


def isolate_devices(devices: Element, notes: list[str]) -> None:
    """Make every device under ``<devices>`` one that a second domain on the same host can have."""
    _drop_own_channels(devices)
    _drop_aliases(devices)
    for tag in CHARACTER_DEVICES:
        for device in devices.findall(tag):
            _free_character_device(device, notes)
    for graphics in devices.findall("graphics"):
        _free_graphics(graphics, notes)
    for interface in devices.findall("interface"):
        _free_interface(devices, interface, notes)
    for vsock in devices.findall("vsock/cid"):
        vsock.attrib.pop("address", None)
        vsock.set("auto", "yes")
    _drop_host_devices(devices, notes)
    for filesystem in devices.findall("filesystem"):
        source = filesystem.find("source")
        shared = next(iter(source.attrib.values()), "unknown") if source is not None else "unknown"
        notes.append(f"host directory {shared} is shared with the guest and no part of the backup: both domains would"
                     " use it")


def _drop_own_channels(devices: Element) -> None:
    """The definition is saved during a backup, so it may hold that backup's own ports."""
    for channel in devices.findall("channel"):
        target = channel.find("target")
        if target is not None and OUR_CHANNEL.match(target.get("name", "")):
            devices.remove(channel)


def _drop_aliases(devices: Element) -> None:
    """Aliases are given to each run. Those that users choose (``ua-``) are kept: qemu:override refers to them."""
    for device in devices.iter():
        for alias in device.findall("alias"):
            if not alias.get("name", "").startswith("ua-"):
                device.remove(alias)


def _free_character_device(device: Element, notes: list[str]) -> None:
    target = device.find("target")
    name = target.get("name") if target is not None else None
    what = f"{device.tag} {name or (target.get('port', '') if target is not None else '')}".strip()
    for log in device.findall("log"):
        device.remove(log)
        notes.append(f"{what}: log file {log.get('file', 'unknown')} removed, it belongs to the original VM")
    device.attrib.pop("tty", None)
    kind = device.get("type", "pty")
    if kind in _SHAREABLE_TYPES:
        return
    sources = device.findall("source")
    automatic = kind == "pty" or (kind == "unix" and device.tag == "channel")
    if not automatic:
        shown = " ".join(source.get("path") or f"{source.get('host', '*')}:{source.get('service', '')}"
                         for source in sources)
        device.set("type", "pty")
        notes.append(f"{what}: was connected to {kind} {shown} of the host, now a terminal of its own")
        for protocol in device.findall("protocol"):
            device.remove(protocol)
    for source in sources:
        device.remove(source)  # libvirt makes a path that is the domain's own


def _free_graphics(graphics: Element, notes: list[str]) -> None:
    fixed = graphics.get("autoport") == "no" and graphics.get("port") not in (None, "-1")
    if fixed:
        notes.append(f"graphics {graphics.get('type')}: port {graphics.get('port')} is the original VM's, now chosen"
                     " automatically")
    if fixed or graphics.get("port") is not None:
        graphics.set("autoport", "yes")
    for key in ("port", "tlsPort", "websocket", "socket"):
        graphics.attrib.pop(key, None)
    for listen in graphics.findall("listen"):
        listen.attrib.pop("socket", None)


def _free_interface(devices: Element, interface: Element, notes: list[str]) -> None:
    if interface.get("type") == "hostdev":
        devices.remove(interface)
        notes.append("a host network device was passed to the guest: it still belongs to the original VM and was"
                     " dropped")
        return
    for target in interface.findall("target"):
        target.attrib.pop("dev", None)  # the name of the tap device on the host
        if not target.attrib:
            interface.remove(target)
    for parameters in interface.findall("virtualport/parameters"):
        parameters.attrib.pop("interfaceid", None)  # unique in a switch; libvirt makes a new one


def _drop_host_devices(devices: Element, notes: list[str]) -> None:
    for hostdev in devices.findall("hostdev"):
        devices.remove(hostdev)
        notes.append(f"host device ({_describe_hostdev(hostdev)}) was passed to the guest: it still belongs to the"
                     " original VM"
                     " and was dropped; add it to the restored domain when it is free")
    for lease in devices.findall("lease"):
        devices.remove(lease)
    for memory in devices.findall("memory"):
        path = memory.findtext("source/path")
        if path is not None:
            devices.remove(memory)
            notes.append(f"memory device on {path} is not part of the backup and was dropped")
    for tpm in devices.findall("tpm"):
        backend = tpm.find("backend")
        if backend is not None and backend.get("type") == "passthrough":
            devices.remove(tpm)
            notes.append("the host's TPM was passed to the guest: it still belongs to the original VM and was dropped")
        elif backend is not None:
            for source in backend.findall("source"):
                backend.remove(source)


def _describe_hostdev(hostdev: Element) -> str:
    source = hostdev.find("source")
    parts = [hostdev.get("type", "unknown")]
    if source is not None:
        for element in source.iter():
            parts.extend(f"{key}={value}" for key, value in element.attrib.items())
    return " ".join(parts)
