"""A running guest backed up in full, after one percent of two files changed, and after nothing did; virtnbdbackup of
its virtual disks beside it. Each tool starts a chain of its own in an empty place in its turn."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.bench.measure import Sample, remove, run
from tests.bench.volumes.machine import Backup, Machine
from tests.bench.works import CHANGED_SHARE, OURS

FULL, CHANGED, UNCHANGED = "running-full", "running-one-percent", "running-unchanged"
WORKS = (FULL, CHANGED, UNCHANGED)
DISKS = f"{OURS}-disks"
"""Ours, what concerns the virtual disks: the same scope as the peer's."""
PEER = "virtnbdbackup"


def one_round(machine: Machine) -> Iterator[tuple[str, str, Sample]]:
    """Three backups by us, three by the peer."""
    machine.forget_checkpoints()
    machine.renew_repository()
    yield from _told(FULL, machine.backup("--full"))
    changed = machine.change(CHANGED_SHARE)
    yield from _told(CHANGED, machine.backup(), changed)
    yield from _told(UNCHANGED, machine.backup())
    if machine.compares(PEER):
        machine.forget_checkpoints()
        yield from _virtnbdbackup(machine)
        machine.forget_checkpoints()


def _told(work: str, backup: Backup, changed: int = 0) -> Iterator[tuple[str, str, Sample]]:
    """The backup as a whole, and its share of virtual disks."""
    virtual, outside = backup.volumes("virtual"), backup.volumes("pass-through")
    read = {kind: sum(volume["bytes_read"] for volume in volumes) for kind, volumes in (("v", virtual), ("p", outside))}
    figures = {
        "luns_read": read["p"],
        "guest_read": backup.guest_read,
        "changed": changed,
        "full_reads": sum(volume["change"]["method"] == "full" for volume in backup.shown["volumes"]),
    }
    yield work, OURS, Sample(backup.seconds, backup.peak_rss, sum(read.values()), backup.stored, figures)
    seconds = backup.seconds - backup.step("passthrough-copy") - backup.step("pre-copy")
    stored = sum(volume["bytes_stored"] for volume in virtual)
    yield work, DISKS, Sample(seconds, backup.peak_rss, read["v"], stored, backup.steps())


def _virtnbdbackup(machine: Machine) -> Iterator[tuple[str, str, Sample]]:
    target = machine.directory / "virtnbdbackup"
    for work, level in zip(WORKS, ("full", "inc", "inc"), strict=True):
        if work == CHANGED:
            machine.change(CHANGED_SHARE)
        before = _data(target)
        words = ["-U", machine.lab.libvirt_uri, "-d", machine.guest.name, "-l", level, "-o", target, "-z", "-n"]
        # it asks for a user where the URI has a socket; this libvirtd does not
        words += ["--user", "bench", "--password", "bench", "-S", machine.directory]
        words += ["-f", f"/tmp/vmbackupd-bench-{uuid.uuid4().hex[:8]}.sock"]
        done = run(["virtnbdbackup", *words])
        read = sum(map(int, re.findall(r"(\d+) bytes of data extents to backup", done.output)))
        yield work, PEER, Sample(done.seconds, done.peak_rss, read, _data(target) - before)
    remove(target)


def _data(target: Path) -> int:
    """Bytes of what it kept of the disks. Beside them it puts kernel and initrd, which the lab boots directly."""
    return sum(path.stat().st_size for path in target.glob("*.data"))
