"""The main job before your eyes: back a running guest up, destroy it, restore it, boot it, and look whether both
kinds of disk are at one instant. Run it with ``./dev demo``."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.integration.service import Service
from tests.lab import Lab
from tests.lab.guest import MOUNTS
from tests.lab.workload import Workload
from tests.lab.writer import Log
from vmbackupd.units import human

KIND = {"virtual": "virtual disk", "pass-through": "pass-through"}


class Timeline:
    """Prints each step with the time since the beginning and its own duration."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str, seconds: float | None = None) -> None:
        took = "" if seconds is None else f"{seconds:7.2f} s"
        print(f"{time.monotonic() - self._began:7.1f} s  {took:>9}  {text}", flush=True)

    @contextmanager
    def step(self, text: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.say(text, time.monotonic() - began)


def show_backup(timeline: Timeline, result: dict[str, Any], shown: dict[str, Any]) -> None:
    for step in result["timeline"]:
        timeline.say(f"    step {step['step']}", step["seconds"])
    timeline.say(
        f"    guest frozen for {shown['freeze_ms']:.0f} ms; T2 came {shown['t2'] - shown['t1']:.1f} s after T1"
    )
    for volume in shown["volumes"]:
        timeline.say(
            f"    {KIND[volume['kind']]:12} {volume['id']:48.48} {volume['method']:14} {human(volume['size']):>9}, "
            f"read {human(volume['bytes_read'])}, stored {human(volume['bytes_stored'])}, "
            f"{volume['reverted_chunks']} chunks reverted"
        )


def main() -> int:
    timeline = Timeline()
    with Lab() as lab, tempfile.TemporaryDirectory(dir=lab.dir) as directory:
        timeline.say(f"lab is up: libvirt, iSCSI target, bus ({'KVM' if lab.kvm else 'no usable KVM: emulated CPU'})")
        with Service(lab, Path(directory)) as service:
            return demonstrate(timeline, lab, service)


def demonstrate(timeline: Timeline, lab: Lab, service: Service) -> int:
    service.ctl("repository", "init")
    with timeline.step("guest booted: root on a plain qcow2, LVM on qcow2, iSCSI LUNs, a device='lun' disk"):
        guest = lab.start_guest("plain")
    workload = Workload(guest)
    workload.start()
    before = workload.round()
    timeline.say(f"a program in the guest writes to all {len(MOUNTS)} volumes in turn; it is at record {before}")
    with timeline.step("vmbackupctl backup plain"):
        result = service.ctl("backup", "plain")
    after = workload.round() + 1
    shown = service.ctl("show", result["backup"])
    show_backup(timeline, result, shown)
    timeline.say(f"the program wrote on: it is at record {after}")
    guest.destroy()
    timeline.say("the guest is destroyed, its disks and LUNs are deleted")
    pass_through = {volume["id"]: volume for volume in shown["volumes"] if volume["kind"] == "pass-through"}
    luns = {
        ident: lab.iscsi.create_lun(
            f"fresh{number}", size=volume["size"], target="fresh-guest" if ident.startswith("iscsi:") else "fresh-lun"
        )
        for number, (ident, volume) in enumerate(sorted(pass_through.items()))
    }
    words = [word for ident, lun in luns.items() for word in ("--volume", f"{ident}={lun.uri}")]
    with timeline.step("vmbackupctl restore: new qcow2 files, new LUNs, new domain 'restored'"):
        service.ctl(
            "restore", result["backup"], "--name", "restored", "--to", str(service.directory / "restored"), *words
        )
    inside = next(lun.iqn for ident, lun in luns.items() if ident.startswith("iscsi:"))
    with timeline.step("the restored guest booted"):
        restored = lab.boot_restored("restored", iqns=[inside])
    return verdict(timeline, workload.check(restored), before, after)


def verdict(timeline: Timeline, logs: dict[str, Log], before: int, after: int) -> int:
    for volume, log in logs.items():
        timeline.say(f"    {volume:6} ends with record {log.last}{', TORN' if log.torn else ', none torn'}")
    numbers = [log.last for log in logs.values()]
    spread = max(numbers) - min(numbers)
    torn = any(log.torn for log in logs.values())
    good = len(logs) == len(MOUNTS) and spread <= 1 and not torn and before <= min(numbers) <= after
    print(
        f"\n{'CONSISTENT' if good else 'NOT CONSISTENT'}: all volumes, on both kinds of disk, end within {spread} "
        f"record(s) of each other (records {before} to {after} were written around the backup)"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
