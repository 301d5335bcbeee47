"""The guest that is measured, the daemon that backs it up, and what was counted around each backup."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tests.bench.measure import Finished, run, stored_below
from tests.bench.volumes import churn
from tests.integration.service import Service
from tests.lab import Lab
from tests.lab.guest import Guest

FILES = {"disk": "/mnt/bench-disk/data", "lun": "/mnt/bench-lun/data"}
"""Where the guest is written to: a file on a virtual disk and one on a ``device='lun'`` LUN, each on LVM."""
SCRIPT = "/run/bench-churn.py"
MAPS = "/sys/fs/bpf/vmbackupd"
"""Where the guest's trackers are pinned."""
SECTOR = 512


@dataclass(frozen=True)
class Backup:
    """A backup of the project: wall seconds of ``vmbackupctl backup``, the daemon's peak memory meanwhile, bytes that
    the guest read of its pass-through disks and that came into the repository, both as counted outside the project."""

    seconds: float
    peak_rss: int
    guest_read: int
    stored: int
    result: dict[str, Any]
    shown: dict[str, Any]

    def step(self, name: str) -> float:
        """Seconds of a step, 0 if there was none."""
        return sum(step["seconds"] for step in self.result["timeline"] if step["step"] == name)

    def steps(self) -> dict[str, float]:
        """Seconds of each step."""
        return {step["step"]: round(step["seconds"], 2) for step in self.result["timeline"]}

    def volumes(self, kind: str) -> list[dict[str, Any]]:
        return [volume for volume in self.shown["volumes"] if volume["kind"] == kind]


@dataclass
class Machine:
    """A running guest with both kinds of disk, and the daemon. ``seconds``: how long a writer writes at a time."""

    lab: Lab
    guest: Guest
    service: Service
    directory: Path
    seconds: float
    peers: bool
    turns: int = 0

    @property
    def disks(self) -> list[str]:
        """Targets of the virtual disks."""
        return list(self.guest.disks)

    @property
    def passed_through(self) -> list[str]:
        """Targets of the disks that QEMU passes through, ``device='lun'``."""
        disks = ElementTree.fromstring(self.guest.domain_xml).iterfind("devices/disk[@device='lun']/target")
        return [str(target.get("dev")) for target in disks]

    def compares(self, tool: str) -> bool:
        """Whether a peer is to have its turns, and is there."""
        return self.peers and shutil.which(tool) is not None

    def virsh(self, *words: object) -> Finished:
        """A virsh of its own, as scripts run it."""
        return run(["virsh", "--quiet", "-c", self.lab.libvirt_uri, *words])

    def backup(self, *words: str) -> Backup:
        """One backup, to its end."""
        os.sync()
        assert self.service.process is not None
        memory = Path(f"/proc/{self.service.process.pid}")
        (memory / "clear_refs").write_text("5")  # the peak begins anew
        read, stored = self.read_in_guest(), stored_below(self.service.repository)
        began = time.monotonic()
        result = self.service.ctl("backup", self.guest.name, *words)
        seconds = time.monotonic() - began
        [peak] = [line for line in (memory / "status").read_text().splitlines() if line.startswith("VmHWM:")]
        return Backup(
            seconds,
            int(peak.split()[1]) * 1024,
            self.read_in_guest() - read,
            stored_below(self.service.repository) - stored,
            result,
            self.service.ctl("show", result["backup"]),
        )

    def read_in_guest(self) -> int:
        """Bytes that the guest has read of its SCSI disks since it booted: all of them are pass-through."""
        lines = self.guest.exec("cat /sys/block/sd*/stat").decode().splitlines()
        return sum(int(line.split()[2]) for line in lines) * SECTOR

    def change(self, one_in: int) -> int:
        """Change one chunk in ``one_in`` of both files; bytes."""
        self.turns += 1
        told = [
            self.guest.exec(["python3", SCRIPT, "change", path, str(one_in), str(self.turns)])
            for path in FILES.values()
        ]
        return sum(map(int, told)) * churn.CHUNK

    def tracked(self) -> bool:
        """Whether trackers are at work in the guest."""
        return bool(self.guest.exec(f"ls {MAPS} 2>/dev/null || true").split())

    def untrack(self) -> None:
        """Unpin the guest's trackers, which ends them."""
        self.guest.exec(f"rm -rf {MAPS}")

    def renew_repository(self) -> None:
        """An empty one in its place, so that a full backup has everything to store."""
        self.service.stop()
        shutil.rmtree(self.service.repository)
        self.service.start()
        self.service.ctl("repository", "init")

    def forget_checkpoints(self) -> None:
        """Delete all checkpoints, whoever made them: one tool refuses a guest that has another's."""
        for name in self.virsh("checkpoint-list", self.guest.name, "--name", "--topological").output.split()[::-1]:
            self.virsh("checkpoint-delete", self.guest.name, name)


@contextmanager
def prepared(parent: Path, size: int, seconds: float, peers: bool) -> Iterator[Machine]:
    """The guest, with ``size`` bytes of a virtual disk and as many of a LUN to write to, all below ``parent``."""
    os.environ["VMBACKUPD_LAB_DIR"] = str(parent)
    with Lab() as lab, tempfile.TemporaryDirectory(dir=lab.dir) as directory:
        guest = lab.start_guest("big", "bench", disks={"vdd": size}, direct_luns={"bench": size})
        _lay_out(guest)
        with Service(lab, Path(directory)) as service:
            service.ctl("repository", "init")
            yield Machine(lab, guest, service, Path(directory), seconds, peers)


def _lay_out(guest: Guest) -> None:
    """A logical volume with a filesystem and a file on each of the two."""
    guest.write_file(SCRIPT, Path(churn.__file__).read_bytes())
    lun = guest.exec(f"lsblk -dnpo NAME,SERIAL | grep {guest.luns['bench'].serial}").decode().split()[0]
    for seed, ((name, path), device) in enumerate(zip(FILES.items(), ("/dev/vdd", lun), strict=True)):
        group, mount = f"vgbench{name}", Path(path).parent
        guest.exec(
            f"set -e; vgcreate -q {group} {device}; lvcreate -q -Wn -l 90%VG -n bench {group}; mkdir -p {mount}\n"
            f"mkfs.ext4 -q -m 0 -E lazy_itable_init=0 /dev/{group}/bench; mount /dev/{group}/bench {mount}",
        )
        guest.exec(["python3", SCRIPT, "fill", path, "80", str(seed)], timeout=300)
