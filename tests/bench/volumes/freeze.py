"""How long a guest stands still: a whole backup of the project, beside what scripts do with virsh.

All are timed from sending the freeze to the confirmed thaw. The peer's snapshot is of the virtual disks alone; of LUNs
it has nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.bench.measure import Sample, run
from tests.bench.volumes.machine import Machine
from tests.bench.works import OURS

WORK = "freeze"
SCRIPT = """
virsh -q -c "$1" domfsfreeze "$2"
status=0
virsh -q -c "$1" snapshot-create-as "$2" $3 || status=$?
virsh -q -c "$1" domfsthaw "$2"
exit $status
"""


def one_round(machine: Machine) -> Iterator[tuple[str, str, Sample]]:
    """A backup; then freeze, snapshot and thaw as three commands; then as one, of which the command is timed."""
    backup = machine.backup()
    told = {"in_guest_ms": _between_hooks(machine), "suspend_ms": float(backup.shown["guest"]["suspend_ms"])}
    yield WORK, OURS, Sample(backup.shown["freeze_ms"] / 1000, backup.peak_rss, figures=told)
    if machine.compares("virsh"):
        yield WORK, "virsh", _virsh(machine, quiesce=False)
        yield WORK, "virsh-quiesce", _virsh(machine, quiesce=True)


def _virsh(machine: Machine, quiesce: bool) -> Sample:
    overlays = {target: machine.directory / f"{target}.overlay" for target in machine.disks}
    words = ["--no-metadata", "--disk-only", "--atomic"]
    words += [f"--diskspec {target},file={path}" for target, path in overlays.items()]
    words += [f"--diskspec {target},snapshot=no" for target in machine.passed_through]
    arguments = " ".join(words)
    if quiesce:
        done = machine.virsh("snapshot-create-as", machine.guest.name, "--quiesce", *arguments.split())
    else:
        done = run(["sh", "-ec", SCRIPT, "sh", machine.lab.libvirt_uri, machine.guest.name, arguments])
    in_guest = _between_hooks(machine)
    for target, path in overlays.items():
        machine.virsh("blockcommit", machine.guest.name, target, "--active", "--pivot", "--wait")
        path.unlink()
    return Sample(done.seconds, figures={"in_guest_ms": in_guest})


def _between_hooks(machine: Machine) -> float:
    """Milliseconds between the guest's own hooks before the last freeze and after its thaw, by the guest's clock."""
    lines = machine.guest.exec("tail -n 2 /run/fsfreeze-hook.log").decode().split()
    assert lines[::2] == ["freeze", "thaw"], lines
    return round((float(lines[3]) - float(lines[1])) * 1000, 1)
