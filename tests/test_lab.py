"""The lab keeps what it promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import libvirt
import pytest

from tests.lab import silence, volumes, writer
from tests.lab.guest import MOUNTS, CommandFailed, Guest
from tests.lab.lab import Lab
from tests.lab.services import LabError, until
from tests.lab.workload import Workload


def test_a_record_verifies_and_damage_is_found() -> None:
    log = b"".join(writer.record(0, number, 1.5) for number in range(1, 9))
    assert writer.check(log) == writer.Log(8, False, 1.5)
    assert writer.check(log[:-1]) == writer.Log(7, True, 1.5)
    assert writer.check(b"") == writer.Log(0, False, 0.0)
    for damaged in (log[:100] + b"x" + log[101:], log[writer.RECORD :], log + log, log[: writer.RECORD] + log):
        with pytest.raises(writer.WriterError):
            writer.check(damaged)
    with pytest.raises(writer.WriterError):
        writer.check(log, 1)


def test_a_churn_file_verifies_against_its_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    rounds = writer.CHURN_BLOCKS + 3
    subprocess.run([sys.executable, writer.__file__, f"--rounds={rounds}", str(path)], check=True)
    churn = Path(f"{path}.churn").read_bytes()
    writer.check_churn(churn, rounds)
    writer.check_churn(churn, rounds - 1)  # cut between churn block and record
    for wrong in (rounds - 2, rounds + 1):
        with pytest.raises(writer.WriterError):
            writer.check_churn(churn, wrong)
    with pytest.raises(writer.WriterError):
        writer.check_churn(churn[:5000] + b"x" + churn[5001:], rounds)


def test_logs_of_different_instants_are_told_apart() -> None:
    def logs(*numbers: int) -> dict[str, writer.Log]:
        return {str(place): writer.Log(number, False, 0.0) for place, number in enumerate(numbers)}

    for together in ((), (4,), (4, 4, 4), (5, 5, 4)):
        writer.check_together(logs(*together))
    for apart in ((4, 5), (5, 4, 5), (6, 4), (6, 5, 4)):
        with pytest.raises(writer.WriterError):
            writer.check_together(logs(*apart))


def test_a_command_in_the_guest(plain_guest: Guest) -> None:
    assert plain_guest.exec("echo hello") == b"hello\n"
    assert plain_guest.exec(["/bin/cat"], input=bytes(range(256)) * 1000) == bytes(range(256)) * 1000
    with pytest.raises(CommandFailed) as caught:
        plain_guest.exec("echo out; echo err >&2; exit 7")
    assert (caught.value.status, caught.value.out, caught.value.err) == (7, b"out\n", b"err\n")
    plain_guest.write_file("/run/some file", b"\0content", 0o600)
    assert plain_guest.read_file("/run/some file") == b"\0content"
    assert "guest-exec" in {command["name"] for command in plain_guest.agent("guest-info")["supported_commands"]}
    assert "lab-storage: ready" in plain_guest.console()


@pytest.mark.parametrize("fixture", ["plain_guest", "lvm_guest"])
def test_every_volume_is_there(fixture: str, request: pytest.FixtureRequest, lab: Lab) -> None:
    guest: Guest = request.getfixturevalue(fixture)
    lines = guest.exec(["findmnt", "-rno", "TARGET,SOURCE,FSTYPE"]).decode().splitlines()
    mounts = {line.split()[0]: line.split()[1:] for line in lines}
    for name, path in MOUNTS.items():
        root = "/dev/mapper/vgroot-root" if fixture == "lvm_guest" else "/dev/vda"
        assert mounts[path] == [root if name == "root" else f"/dev/mapper/vg{name}-{name}", "ext4"]
    iscsi = guest.exec("for disk in /sys/block/sd*; do readlink -f $disk | grep -c /session || true; done").split()
    assert iscsi == [b"0", b"1", b"1"]
    segments = guest.exec(["dmsetup", "table", "vgspan-span"]).decode().splitlines()
    assert len(segments) == 2 and len({line.split()[3] for line in segments}) == 2


def test_the_lun_is_real_passthrough(plain_guest: Guest) -> None:
    assert "scsi-block" in plain_guest.monitor("info qtree")
    assert plain_guest.exec("cat /sys/block/sda/device/vendor").strip() == b"VMBKLAB"


def test_a_guest_that_falls_silent_leaves_its_last_words(plain_guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(command: str, **_: object) -> bytes:
        raise LabError("no answer to " + command)

    with monkeypatch.context() as patch:
        patch.setattr(plain_guest, "exec", silent)
        patch.setattr(silence, "SILENT", {})
        said = silence.words_of(plain_guest)
        assert silence.silent_among(["lab"]) is None
        assert "no answer to dmesg" in (silence.silent_among(["lab", "plain_guest"]) or "")
    plain_guest.exec("dmesg --console-level 4")
    assert re.search("^[RE]IP=", said, re.MULTILINE)
    assert "sysrq: Show backtrace of all active CPUs" in said
    assert "sysrq: Show Blocked State" in said


TRACERS = """
cd /sys/kernel/tracing/events/block
dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null & one=$!
dd if=/dev/vda of=/dev/null bs=4k iflag=direct 2>/dev/null & two=$!
for round in $(seq 400); do echo 1 > enable; echo 0 > enable; done
kill $one $two 2>/dev/null || true
wait
"""


def test_tracers_come_and_go_while_disks_work(plain_guest: Guest) -> None:
    """A kernel that has to patch itself for them dies of it where QEMU 7.2 emulates its CPUs."""
    plain_guest.exec(TRACERS, timeout=120)


def test_the_writer_writes_and_its_images_verify(plain_guest: Guest, tmp_path: Path) -> None:
    work = Workload(plain_guest)
    work.start()
    work.wait(20)
    work.stop()
    logs = work.check()
    assert list(logs) == list(MOUNTS) and min(log.last for log in logs.values()) >= 20
    plain_guest.exec("sync")
    plain_guest.agent("guest-fsfreeze-freeze")
    try:
        images = [plain_guest.luns[name].path for name in ("lun", "iscsi", "span")]
        for target in ("vdb", "vdc"):
            raw = tmp_path / f"{target}.raw"
            subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", plain_guest.disks[target], raw], check=True)
            images.append(raw)
        found = volumes.logical_volumes(images)
        extracted = {
            name: found[f"vg{name}/{name}"].extract(tmp_path / f"{name}.ext4") for name in MOUNTS if name != "root"
        }
    finally:
        plain_guest.agent("guest-fsfreeze-thaw")
    for index, name in enumerate(MOUNTS):
        if name == "root":
            continue
        assert not volumes.needs_recovery(extracted[name])
        volumes.check_filesystem(extracted[name])
        log = writer.check(volumes.read_file(extracted[name], "/log"), index)
        assert log == logs[name]
        writer.check_churn(volumes.read_file(extracted[name], "/log.churn"), log.last)


def test_a_freeze_runs_the_hooks_and_blocks_writers(plain_guest: Guest) -> None:
    before = plain_guest.hook_log()
    assert plain_guest.agent("guest-fsfreeze-freeze") == 5
    try:
        assert plain_guest.agent("guest-fsfreeze-status") == "frozen"
        with pytest.raises(libvirt.libvirtError, match="frozen"):
            plain_guest.agent("guest-exec", path="/bin/true")
        assert plain_guest.hook_log() == [*before, "freeze"]  # the lab's own agent still answers
    finally:
        assert plain_guest.agent("guest-fsfreeze-thaw") == 5
    assert plain_guest.agent("guest-fsfreeze-status") == "thawed"
    assert plain_guest.hook_log() == [*before, "freeze", "thaw"]


def test_hot_plug_of_channel_and_disk(lab: Lab, plain_guest: Guest, tmp_path: Path) -> None:
    channel = "<channel type='unix'><target type='virtio' name='org.vmbackupd.j00000000.d0'/></channel>"
    image = lab.dir / "hotplug.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M"], check=True)
    disk = (
        f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{image}'/>"
        "<target dev='vdz' bus='virtio'/><serial>hotplugged</serial></disk>"
    )
    live = libvirt.VIR_DOMAIN_AFFECT_LIVE
    plain_guest.domain.attachDeviceFlags(channel, live)
    plain_guest.domain.attachDeviceFlags(disk, live)
    try:
        path = plain_guest.channel_path("org.vmbackupd.j00000000.d0")
        assert os.path.exists(path) and len(path) < 108
        for appears in (
            "grep -q hotplugged /sys/block/vd*/serial",
            f"[ -e /dev/virtio-ports/{os.path.basename(path)} ]",
        ):
            plain_guest.exec(f"until {appears}; do sleep 0.1; done", timeout=30)
    finally:
        plain_guest.domain.detachDeviceFlags(disk, live)
        # libvirt finds a channel by its whole definition only
        channels = ElementTree.fromstring(plain_guest.domain_xml).iter("channel")
        plugged = [element for element in channels if b"j00000000" in ElementTree.tostring(element)]
        plain_guest.domain.detachDeviceFlags(ElementTree.tostring(plugged[0], encoding="unicode"), live)
        until(lambda: "vdz" not in plain_guest.domain_xml, 30, "the disk is unplugged")
        until(lambda: "j00000000" not in plain_guest.domain_xml, 30, "the channel is unplugged")


def test_external_snapshot_and_commit(lab: Lab, plain_guest: Guest) -> None:
    overlay = lab.dir / "overlay.qcow2"
    snapshot = (
        "<domainsnapshot><disks>"
        f"<disk name='vdb' snapshot='external'><driver type='qcow2'/><source file='{overlay}'/></disk>"
        "<disk name='vda' snapshot='no'/><disk name='vdc' snapshot='no'/><disk name='sda' snapshot='no'/>"
        "</disks></domainsnapshot>"
    )
    flags = (
        libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
        | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
    )
    plain_guest.domain.snapshotCreateXML(snapshot, flags)
    assert str(overlay) in plain_guest.domain_xml
    plain_guest.exec("echo kept > /mnt/data/through-overlay; sync")
    plain_guest.domain.blockCommit("vdb", None, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)  # type: ignore[arg-type]

    def merged() -> bool:
        return "ready='yes'" in plain_guest.domain_xml

    until(merged, 60, "the overlay is merged")
    plain_guest.domain.blockJobAbort("vdb", libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
    until(lambda: str(overlay) not in plain_guest.domain_xml, 30, "the guest is back on its image")
    overlay.unlink()
    assert plain_guest.exec("cat /mnt/data/through-overlay; rm /mnt/data/through-overlay") == b"kept\n"


def test_an_agent_that_hangs_is_restarted_at_once(plain_guest: Guest) -> None:
    """Stopped, it hangs as one whose handler of SIGTERM waits for a lock."""
    assert plain_guest.exec("systemctl show --property=KillSignal --value qemu-guest-agent") == b"9\n"
    plain_guest.exec("systemctl kill --signal=STOP qemu-guest-agent")
    plain_guest.restart_agent("")
    assert plain_guest.agent("guest-ping") == {}


def test_a_restricted_agent_and_a_guest_without_python(plain_guest: Guest) -> None:
    with plain_guest.agent_restricted(), pytest.raises(libvirt.libvirtError, match="disabled"):
        plain_guest.agent("guest-exec", path="/bin/true")
    assert plain_guest.agent("guest-exec", path="/bin/true")["pid"] > 0
    with plain_guest.without_python():
        assert plain_guest.exec("command -v python3 || true") == b""
    assert plain_guest.exec("python3 -c 'print(1)'") == b"1\n"


def test_a_lun_comes_and_goes(lab: Lab, plain_guest: Guest) -> None:
    lun = lab.iscsi.create_lun("extra", size=16 << 20)
    device = plain_guest.login(lun)
    plain_guest.exec(f"mkfs.ext4 -q {device} && mount {device} /mnt && echo there > /mnt/file && umount /mnt")
    plain_guest.logout(lun)
    assert volumes.read_file(lun.path, "/file") == b"there\n"
    lab.iscsi.delete_target(lun.iqn)
    assert not lun.path.exists()


def processes_below(directory: Path) -> list[str]:
    """Command lines of processes that mention ``directory``, this one excepted."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            try:
                words = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(directory) in words:
                found.append(words)
    return found


def test_nothing_outlives_a_killed_lab(tmp_path: Path) -> None:
    """A process that holds services below a directory is killed with SIGKILL: services and directory go."""
    from tests.conftest import missing, require

    require(", ".join(missing()), not missing())
    directory = tmp_path / "l"
    directory.mkdir()
    program = (
        "import os, sys, time; from pathlib import Path\n"
        "from tests.lab.services import Processes, start_bus, start_libvirt\n"
        "directory = Path(sys.argv[1]); held = os.open('/dev/null', os.O_RDONLY)\n"
        "p = Processes(directory, held); start_bus(p, directory); start_libvirt(p, directory)\n"
        "p.start('orphan', ['sh', '-c', 'setsid sh -c \"sleep 1000; :\" \"$0\" &', str(directory)])\n"
        "print('up', flush=True); time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "up\n"
        assert len(processes_below(directory)) >= 4
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    began = time.monotonic()
    until(lambda: not directory.exists() and not processes_below(directory), 30, "everything is gone")
    assert time.monotonic() - began < 30
