"""The lab's iSCSI target: tgtd in userspace on 127.0.0.1, with LUNs in sparse raw files.

A guest reaches it through its user-mode network as 10.0.2.2, QEMU's own initiator as 127.0.0.1. Make node records by
hand in the guest: discovery answers with the address that the target listens on, which is another machine to the guest.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tests.lab.services import LabError, Processes
from tests.lab.volumes import copy_file

IQN_PREFIX = "iqn.2026-01.org.vmbackupd.lab"


@dataclass(frozen=True)
class Lun:
    """A LUN: ``path`` is the raw file behind it, ``portal`` its address on the host and ``portal_guest`` in a guest
    (``host:port``).
    """

    iqn: str
    lun: int
    path: Path
    serial: str
    portal: str
    portal_guest: str

    @property
    def uri(self) -> str:
        """``iscsi://PORTAL/IQN/LUN`` as QEMU and a restore take it on the host."""
        return f"iscsi://{self.portal}/{self.iqn}/{self.lun}"


class IscsiTarget:
    """tgtd with a control socket of its own. Targets are made when their first LUN is."""

    def __init__(self, processes: Processes, directory: Path) -> None:
        self._directory = directory
        self._processes = processes
        self._environment = {"TGT_IPC_SOCKET": str(directory / "tgt")}
        self._targets: dict[str, int] = {}
        self._luns: dict[str, list[Lun]] = {}
        self.port = _free_port()
        self.portal = f"127.0.0.1:{self.port}"
        self.portal_guest = f"10.0.2.2:{self.port}"
        processes.start("tgtd", ["tgtd", "-f", "-C", "0", "--iscsi", f"portal={self.portal}"], self._environment)
        processes.ready("tgtd", self._answers)

    def close(self) -> None:
        """End tgtd. It takes no notice of SIGTERM while it has targets."""
        self._processes.stop("tgtd", timeout=0)

    def _answers(self) -> bool:
        done = subprocess.run(
            check=False,
            args=["tgtadm", "-C", "0", "--mode", "system", "--op", "show"],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self._environment},
            capture_output=True,
        )
        return done.returncode == 0 and b"State: ready" in done.stdout

    def admin(self, *words: str) -> str:
        """Run tgtadm; its output. Raises LabError with its message."""
        done = subprocess.run(
            check=False,
            args=["tgtadm", "-C", "0", "--lld", "iscsi", *words],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **self._environment},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise LabError(f"tgtadm {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def create_lun(
        self, name: str, *, size: int | None = None, source: Path | None = None, target: str | None = None
    ) -> Lun:
        """A new LUN ``name`` of ``size`` bytes, empty, or with a copy of the raw image ``source`` (grown to ``size`` if
        given).

        ``target`` names the target (after the IQN's colon) and defaults to ``name``; LUNs of one target are numbered
        from 1.
        """
        iqn = f"{IQN_PREFIX}:{target or name}"
        path = self._directory / f"lun-{name}.raw"
        if path.exists():
            raise LabError(f"there is a LUN {name} already")
        if source is not None:
            copy_file(source, path)
        else:
            path.touch()
        if size is not None:
            with open(path, "r+b") as file:
                file.truncate(size)
        if iqn not in self._targets:
            fresh = str(max(self._targets.values(), default=0) + 1)
            self.admin("--mode", "target", "--op", "new", "--tid", fresh, "-T", iqn)
            self.admin("--mode", "target", "--op", "bind", "--tid", fresh, "-I", "ALL")
            self._targets[iqn], self._luns[iqn] = int(fresh), []
        tid, number = str(self._targets[iqn]), max((lun.lun for lun in self._luns[iqn]), default=0) + 1
        self.admin("--mode", "logicalunit", "--op", "new", "--tid", tid, "--lun", str(number), "-b", str(path))
        serial = f"lab-{name}"
        parameters = f"vendor_id=VMBKLAB,product_id=lun,scsi_sn={serial},scsi_id={serial},thin_provisioning=1"
        self.admin(
            "--mode", "logicalunit", "--op", "update", "--tid", tid, "--lun", str(number), "--params", parameters
        )
        lun = Lun(iqn, number, path, serial, self.portal, self.portal_guest)
        self._luns[iqn].append(lun)
        return lun

    def second_path(self, lun: Lun) -> Lun:
        """``lun`` as it is reached through another portal of the target, which is opened for it."""
        port = _free_port()
        self.admin("--mode", "portal", "--op", "new", "--param", f"portal=127.0.0.1:{port}")
        return replace(lun, portal=f"127.0.0.1:{port}", portal_guest=f"10.0.2.2:{port}")

    @contextlib.contextmanager
    def closed(self, iqn: str) -> Iterator[None]:
        """A block in which nobody new can log in to a target; the sessions that are there go on."""
        who = ("--tid", str(self._targets[iqn]), "-I", "ALL")
        self.admin("--mode", "target", "--op", "unbind", *who)
        try:
            yield
        finally:
            self.admin("--mode", "target", "--op", "bind", *who)

    def delete_target(self, iqn: str) -> None:
        """Drop a target with its sessions and LUNs, as a storage array that went away does; the files too."""
        self.admin("--mode", "target", "--op", "delete", "--force", "--tid", str(self._targets.pop(iqn)))
        for lun in self._luns.pop(iqn):
            lun.path.unlink()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
