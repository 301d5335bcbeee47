"""What a job may not leave changed in a guest and on its host."""

from __future__ import annotations

from dataclasses import dataclass

from tests.integration.service import Service
from tests.lab import Lab
from tests.lab.guest import Guest


@dataclass(frozen=True)
class State:
    """What may not differ after a job: dm tables, devices, channels and images of the domain, files and processes."""

    tables: str
    devices: str
    xml: str
    files: frozenset[str]
    processes: str

    @classmethod
    def of(cls, lab: Lab, guest: Guest, service: Service) -> State:
        files = {
            str(path.relative_to(lab.dir))
            for path in lab.dir.rglob("*")
            if path.suffix in (".qcow2", ".t2") or ".qcow2." in path.name or "scratch" in path.name
        }
        files |= {str(path) for path in service.scratch.glob("*")} if service.scratch.exists() else set()
        files |= {path.name for path in (service.state / "journal").glob("*")}
        return cls(
            guest.exec("dmsetup table; dmsetup info -c --noheadings -o name,suspended").decode(),
            guest.exec("ls /sys/block /dev/virtio-ports; find /run/udev/rules.d -type f 2>/dev/null || true").decode(),
            "\n".join(line for line in guest.domain_xml.splitlines() if "<source" in line or "org.vmbackupd" in line),
            frozenset(files),
            guest.exec("ps -eo args= | grep -v 'ps -eo' | grep -e vmbackupd- -e 'vmbackupd\\.pyz' || true").decode(),
        )
