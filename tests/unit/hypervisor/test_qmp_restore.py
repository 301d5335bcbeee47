"""From a running QEMU to its backup's configuration, and from that to a command that starts it on restored images."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

from tests.unit.hypervisor.machine import pattern, tool
from tests.unit.hypervisor.plain import PlainQemu
from vmbackupd.hypervisor.qmp.description import COMMAND_LINE, STATE
from vmbackupd.hypervisor.qmp.stored import stored_images
from vmbackupd.model import Consistency, Method, VolumeKind, VolumeRecord
from vmbackupd.restore.address import Target, TargetKind
from vmbackupd.restore.command import plan_command
from vmbackupd.restore.disks import PlacedVolume


def placed(name: str, path: Path) -> PlacedVolume:
    record = VolumeRecord(name, VolumeKind.VIRTUAL, Method.FREEZE_WINDOW, Consistency.FILESYSTEM, 32 << 20, "t")
    return PlacedVolume(record, Target(TargetKind.QCOW2, str(path)))


def test_the_command_of_a_machine_starts_it_on_restored_images(few_disks: PlainQemu, tmp_path: Path) -> None:
    """Both images are restored to qcow2 files, of which one was raw: its format is another in the command, too."""
    config = few_disks.work(lambda hv, uuid: hv.domain(uuid)).config
    few_disks.qemu.write("/machine/peripheral/vda/virtio-backend", 1, "0", "64k")
    few_disks.qemu.write("sda", 2, "0", "64k")
    few_disks.qemu.kill()
    to = tmp_path / "restored"
    to.mkdir()
    shutil.copy(tmp_path / "a.qcow2", to / "vda.qcow2")
    tool("qemu-img", "convert", "-O", "qcow2", str(tmp_path / "b.raw"), str(to / "sda.qcow2"))
    images, flash = stored_images(config[STATE])
    assert flash is None
    plan = plan_command(config[COMMAND_LINE], images, [placed(name, to / f"{name}.qcow2") for name in images],
                        files={}, path=str(to / "bare.start"))
    assert plan.attached == {"vda", "sda"} and len(plan.notes) == 1
    few_disks.qemu.argv = shlex.split(plan.text.partition("exec ")[2].replace("\\\n", ""))
    few_disks.qemu.start()
    disks = {disk.target: disk for disk in few_disks.work(lambda hv, uuid: hv.domain(uuid)).disks}
    assert {name: (disks[name].chain, disks[name].size) for name in images} == {
        name: ((str(to / f"{name}.qcow2"),), 32 << 20) for name in images}
    few_disks.qemu.write("sda", 3, "64k", "64k")
    assert pattern(to / "sda.qcow2", "qcow2", 3, "64k", "64k") and pattern(to / "sda.qcow2", "qcow2", 2, "0", "64k")
    assert pattern(tmp_path / "b.raw", "raw", 0, "64k", "64k")
