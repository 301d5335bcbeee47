"""The command of a machine that no libvirt ran, with its images in new places."""

from __future__ import annotations

import json
import shlex

import pytest

from vmbackupd.errors import HypervisorError
from vmbackupd.hypervisor.qmp.blocks import Image
from vmbackupd.hypervisor.qmp.stored import stored_images
from vmbackupd.model import Consistency, Method, VolumeKind, VolumeRecord
from vmbackupd.restore.address import IscsiTarget, Target, TargetKind
from vmbackupd.restore.command import CommandPlan, plan_command
from vmbackupd.restore.disks import PlacedVolume

LINE = ("qemu-system-x86_64 -name 'web 1' -blockdev driver=qcow2,node-name=a,file.driver=file,file.filename=/vm/a.qcow2"
        " -drive if=none,id=sda,format=raw,file=/vm/b -drive if=pflash,file=/vm/vars.fd,format=raw")
IMAGES = {"vda": Image("/vm/a.qcow2", "qcow2"), "sda": Image("/vm/b", "raw")}


def volume(name: str, target: Target | None) -> PlacedVolume:
    record = VolumeRecord(name, VolumeKind.VIRTUAL, Method.FREEZE_WINDOW, Consistency.FILESYSTEM, 1, "t")
    return PlacedVolume(record, target)


def qcow2(path: str) -> Target:
    return Target(TargetKind.QCOW2, path)


def planned(*volumes: PlacedVolume, line: str = LINE, files: dict[str, str] | None = None) -> CommandPlan:
    return plan_command(line, IMAGES, volumes, files=files or {}, path="/to/web1.start")


def test_paths_and_formats_are_changed_and_nothing_else() -> None:
    plan = planned(volume("vda", qcow2("/to/vda.qcow2")), volume("sda", qcow2("/to/sda.qcow2")),
                   files={"/vm/vars.fd": "/to/new_VARS.fd"})
    lines = plan.text.splitlines()
    assert lines[:2] == ["#!/bin/sh", "exec qemu-system-x86_64 \\"]
    words = shlex.split(plan.text.replace("\\\n", "").partition("exec ")[2])
    expected = LINE
    for old, new in (("/vm/a.qcow2", "/to/vda.qcow2"), ("/vm/vars.fd", "/to/new_VARS.fd"),
                     ("format=raw,file=/vm/b", "format=qcow2,file=/to/sda.qcow2")):
        expected = expected.replace(old, new)
    assert words == shlex.split(expected)
    assert plan.attached == {"vda", "sda"}
    assert len(plan.notes) == 1 and "MAC addresses and UUID" in plan.notes[0]
    assert plan.as_dict() == {"path": "/to/web1.start", "text": plan.text, "disks": ["sda", "vda"]}


def test_a_script_stays_as_it_is() -> None:
    script = "#!/bin/sh\n# web1\ntaskset 3 qemu-system-x86_64 -hda /vm/a.qcow2 # /vm/a.qcow2.old is another\n"
    plan = planned(volume("vda", qcow2("/to/vda.qcow2")), line=script)
    assert plan.text == script.replace("/vm/a.qcow2 ", "/to/vda.qcow2 ")


def test_what_has_to_be_done_by_hand_is_told() -> None:
    lun = Target(TargetKind.ISCSI, iscsi=IscsiTarget("h", 3260, "iqn.2024-01.org.example:x", 1))
    notes = planned(volume("vda", lun), volume("sda", None), volume("iscsi:x/1", lun)).notes
    assert [note.split(":")[0] for note in notes[:2]] == ["volume vda", "volume sda was left out"]
    assert "put iscsi://h:3260/iqn.2024-01.org.example:x/1 into the command by hand" in notes[0]
    assert len(notes) == 3
    raw = Target(TargetKind.RAW, "/to/a.raw")
    split = "qemu -blockdev file,filename=/vm/a.qcow2,node-name=f -blockdev qcow2,file=f"
    assert any("state the new format" in note for note in planned(volume("vda", raw), line=split).notes)
    assert any("by hand" in note for note in planned(volume("vda", raw), line="qemu -hda a.qcow2").notes)


def test_the_images_of_a_machine_are_in_its_state() -> None:
    def node(name: str, file: str, driver: str, ro: bool = False) -> dict[str, object]:
        return {"node-name": name, "file": file, "drv": driver, "ro": ro, "backing_file_depth": 0,
                "image": {"virtual-size": 1}}

    state = {
        "query-named-block-nodes": [node("n", "/vm/a.qcow2", "qcow2"), node("#block1", "/vm/b", "file"),
                                    node("c", "/code.fd", "raw", ro=True), node("v", "/vm/vars.fd", "raw")],
        "query-block": [
            {"device": "", "qdev": "/machine/peripheral/vda/virtio-backend", "inserted": {"node-name": "n"}},
            {"device": "hd", "qdev": "/machine/peripheral-anon/device[3]", "inserted": {"node-name": "#block1"}},
            {"device": "cd", "qdev": "cd"}, {"device": "unused"},
            {"device": "pflash0", "qdev": "/machine/system.flash0", "inserted": {"node-name": "c"}},
            {"device": "pflash1", "qdev": "/machine/system.flash1", "inserted": {"node-name": "v"}}],
    }
    assert stored_images(json.dumps(state)) == (
        {"vda": Image("/vm/a.qcow2", "qcow2"), "hd": Image("/vm/b", "raw")}, "/vm/vars.fd")
    for damaged in ("{", "[]", '{"query-block": []}', json.dumps(state | {"query-named-block-nodes": []})):
        with pytest.raises(HypervisorError, match="not understood"):
            stored_images(damaged)
