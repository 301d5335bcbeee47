"""Where a volume is restored to, as users write it: a path, ``iscsi://HOST[:PORT]/IQN/LUN``, or ``none``."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from vmbackupd.errors import InvalidArgument

ISCSI_PORT = 3260

SYNTAX = ("VOLUME=TARGET, where TARGET is an absolute path (ending in .qcow2: a qcow2 file; an existing block device:"
          " that device; any other path: a raw file), iscsi://HOST[:PORT]/IQN/LUN, or none to leave the volume out")

# An IQN has colons but no slash (RFC 3720 3.2.6); a literal IPv6 address stands in brackets, as in every URL.
_ISCSI = re.compile(r"iscsi://(?P<host>\[[0-9A-Fa-f:.]+\]|[^/:\[\]@]+)(?::(?P<port>\d{1,5}))?"
                    r"/(?P<iqn>(?:iqn|eui|naa)\.[^/\s]+)/(?P<lun>\d{1,5})/?")


class TargetKind(StrEnum):
    """How a target stores the volume, which is also how it appears in the domain."""

    QCOW2 = "qcow2"
    RAW = "raw"
    BLOCK = "block"
    ISCSI = "iscsi"


@dataclass(frozen=True, slots=True)
class IscsiTarget:
    """One logical unit behind an iSCSI portal. ``host`` without brackets."""

    host: str
    port: int
    iqn: str
    lun: int

    @property
    def portal(self) -> str:
        """``HOST:PORT`` as QEMU's and libvirt's initiators take it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"iscsi://{self.portal}/{self.iqn}/{self.lun}"


@dataclass(frozen=True, slots=True)
class Target:
    """A place for one volume: a file or block device at ``path``, or a logical unit."""

    kind: TargetKind
    path: str | None = None
    iscsi: IscsiTarget | None = None

    @property
    def file(self) -> str:
        """The path of a target that has one."""
        assert self.path is not None
        return self.path

    @property
    def is_file(self) -> bool:
        """Whether the target is a regular file, existing or to be made."""
        return self.kind in (TargetKind.QCOW2, TargetKind.RAW)

    def __str__(self) -> str:
        return self.path if self.path is not None else str(self.iscsi)


def is_block_device(path: str) -> bool:
    """Whether ``path`` leads to a block device."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)
    except OSError:
        return False


def parse_target(volume: str, text: str, *, is_block: Callable[[str], bool] = is_block_device) -> Target | None:
    """The target ``text`` names for ``volume``; None for ``none``. Raises ``InvalidArgument``."""
    if text == "none":
        return None
    if text.startswith("iscsi:"):
        return Target(TargetKind.ISCSI, iscsi=_parse_iscsi(volume, text))
    if not text.startswith("/") or "\0" in text or text.endswith("/"):
        raise InvalidArgument(f"volume {volume}: {text!r} is not a target: expected {SYNTAX}")
    path = os.path.normpath(text)
    if is_block(path):
        return Target(TargetKind.BLOCK, path)
    if path.startswith("/dev/"):
        # A raw file made here by a typing mistake would fill the host's memory.
        raise InvalidArgument(f"volume {volume}: there is no block device {path}: connect the device, or name another"
                              " target")
    return file_target(path)


def file_target(path: str) -> Target:
    """The file at ``path``, its format told by its name."""
    return Target(TargetKind.QCOW2 if path.endswith(".qcow2") else TargetKind.RAW, path)


def _parse_iscsi(volume: str, text: str) -> IscsiTarget:
    found = _ISCSI.fullmatch(text)
    if found is None:
        hint = " (credentials in the target are not supported)" if "@" in text else ""
        raise InvalidArgument(f"volume {volume}: {text!r} is not an iSCSI target{hint}: expected iscsi://HOST[:PORT]/IQN/LUN,"
                              " for example iscsi://192.0.2.7/iqn.2024-01.org.example:disk1/1")
    port = int(found["port"] or ISCSI_PORT)
    if not 0 < port < 65536:
        raise InvalidArgument(f"volume {volume}: {text!r} has port {port}: a TCP port is 1 to 65535")
    return IscsiTarget(found["host"].strip("[]"), port, found["iqn"], int(found["lun"]))


def safe_name(volume: str) -> str:
    """``volume`` as a file name: identifiers of pass-through volumes hold colons and slashes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", volume).strip("._")
    return name[:200] or "volume"
