"""QEMU's answers about its block layer (qemu: qapi/block-core.json), read into plain values. Pure."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.base import DiskSource
from vmbackupd.hypervisor.dirtybitmaps import Bitmap, bitmaps_of

PROTOCOLS = {"file", "host_device", "iscsi", "nbd", "rbd", "nfs", "ssh", "curl", "http", "https", "nvme", "gluster"}

_FDSET = "/dev/fdset/"
ISCSI_PORT = 3260
FILTERS = {"mirror_top", "commit_top", "backup-top", "copy-before-write", "copy-on-read", "throttle", "compress",
           "preallocate", "snapshot-access", "blkdebug", "blklogwrites", "blkreplay"}


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a disk's chain, its file as QEMU was told it (perhaps relative, perhaps no path)."""

    file: str
    format: str


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the block graph: QEMU's driver of it, and the images it leads to, top first. ``depth`` counts those
    below the first that QEMU has open; ``size`` in bytes."""

    name: str
    driver: str
    images: tuple[Image, ...]
    size: int
    read_only: bool
    depth: int
    bitmaps: Mapping[str, Bitmap]

    @property
    def is_format(self) -> bool:
        """Whether it makes an image of a file or device: neither that one's bytes, nor a filter, which has the file
        name of what it filters."""
        return self.driver not in PROTOCOLS and self.driver not in FILTERS


@dataclass(frozen=True, slots=True)
class Drive:
    """What ``query-block`` says of one backend that a device uses. ``qdev`` is the device's id or its path in the
    object tree; ``node`` the top node, None for an empty drive."""

    backend: str
    qdev: str
    node: str | None


@contextmanager
def understood(command: str) -> Iterator[None]:
    """A block that takes apart the answer to ``command``."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise HypervisorError(f"QEMU's answer to {command} is not understood: {error!r}") from error


def drives(reply: Any) -> list[Drive]:
    """The backends of ``query-block`` that are plugged into a device."""
    with understood("query-block"):
        return [Drive(item["device"], item["qdev"], item["inserted"]["node-name"] if item.get("inserted") else None)
                for item in reply if item.get("qdev")]


def nodes(reply: Any) -> dict[str, Node]:
    """The nodes of ``query-named-block-nodes`` by name."""
    with understood("query-named-block-nodes"):
        return {item["node-name"]: _node(item) for item in reply}


def _node(item: Mapping[str, Any]) -> Node:
    images = [Image(item["file"], _format(item["drv"]))]
    below = item["image"].get("backing-image")
    while below is not None:
        images.append(Image(below["filename"], _format(below.get("format", "raw"))))
        below = below.get("backing-image")
    return Node(item["node-name"], item["drv"], tuple(images), int(item["image"]["virtual-size"]), bool(item["ro"]),
                int(item["backing_file_depth"]), bitmaps_of(item))


def _format(driver: str) -> str:
    return "raw" if driver in PROTOCOLS else driver


def local_path(file: str, directory: str) -> str | None:
    """The path behind a file name of QEMU's, None where it is none. ``directory`` is what relative ones begin at."""
    if file.startswith("json:"):
        inner = _innermost(file)
        if inner.get("driver") not in ("file", "host_device") or not isinstance(inner.get("filename"), str):
            return None
        file = str(inner["filename"])
    head = file.split("/", 1)[0]
    if ":" in head:  # a protocol, as QEMU tells one from a path (block.c, path_has_protocol)
        if not file.startswith("file:"):
            return None
        file = file.removeprefix("file:")
    if file.startswith(_FDSET):
        return None  # a descriptor that somebody handed to QEMU: nobody else can open it by that name
    return os.path.normpath(os.path.join(directory, file)) if file else None


def _innermost(file: str) -> Mapping[str, Any]:
    """The options of the node at the bottom of a ``json:`` file name."""
    with understood("query-block"):
        options: Mapping[str, Any] = json.loads(file.removeprefix("json:"))
        while isinstance(options.get("file"), dict):
            options = options["file"]
        flat = {key.rsplit("file.", 1)[-1]: value for key, value in options.items() if key.startswith("file.")}
        return flat or options


def source(image: Image, directory: str) -> DiskSource:
    """Where the bytes of ``image`` come from."""
    path = local_path(image.file, directory)
    if path is not None:
        return DiskSource("block" if _is_block(path) else "file", image.format, path=path)
    if image.file.startswith(_FDSET):
        return DiskSource("network", image.format, protocol="file descriptor", name=image.file)
    if image.file.startswith("json:"):
        options = _innermost(image.file)
        protocol = str(options.get("driver"))
        parts = urlsplit(f"//{options.get('portal') or ''}")
        name = f"{options.get('target')}/{options.get('lun', 0)}" if protocol == "iscsi" else image.file
    else:
        parts = urlsplit(image.file)
        protocol = parts.scheme
        name = parts.path.strip("/") if protocol == "iscsi" else image.file
    if protocol != "iscsi":
        return DiskSource("network", image.format, protocol=protocol, name=name)
    return DiskSource("network", image.format, protocol=protocol, name=name, host=parts.hostname,
                      port=parts.port or ISCSI_PORT)


def _is_block(path: str) -> bool:
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False
