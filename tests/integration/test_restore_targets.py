"""Restores to every kind of target, with real images, a real repository, qemu-storage-daemon, tgtd and libvirt's test
driver."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import libvirt
import pytest

from tests.conftest import require
from tests.integration.restore_kit import LUN_ID, Kit, loop_device, make_kit, same, save, snapshot_of
from vmbackupd.errors import InvalidArgument, NotFound, TargetRefused
from vmbackupd.hypervisor.libvirt import LibvirtHypervisor
from vmbackupd.hypervisor.storage_daemon import ImageSpec
from vmbackupd.job.options import RestoreOptions
from vmbackupd.model import RevertMode
from vmbackupd.restore.execute import execute
from vmbackupd.restore.plan import RestorePlan, VolumePlan
from vmbackupd.restore.planner import make_plan
from vmbackupd.units import MiB

if TYPE_CHECKING:
    from tests.lab.iscsi import IscsiTarget


class Watcher:
    """Observer and journal of a restore. ``at`` runs something when a step begins or bytes have moved."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.warnings: list[str] = []
        self.done: tuple[int, int] = (0, 0)
        self.pending: list[tuple[str, str]] = []
        self.foreign: set[str] = set()
        self.at: Callable[[str], None] = lambda what: None

    def step(self, name: str) -> None:
        self.steps.append(name)
        self.at(name)

    def progress(self, done: int, total: int) -> None:
        self.done = (done, total)
        self.at("progress")

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def effect(self, undo: str, argument: str) -> Callable[[], None]:
        if undo in ("unlink", "rmdir") and argument not in self.foreign:
            assert not os.path.lexists(argument), f"told of {undo} {argument} too late"
        self.pending.append((undo, argument))
        return lambda: self.pending.remove((undo, argument))


def run(tmp_path: Path, test: Callable[[Kit], Awaitable[None]], mode: RevertMode = RevertMode.BACKUP) -> None:
    async def go() -> None:
        kit = await make_kit(tmp_path, mode)
        with closing(kit.repository):
            await test(kit)

    asyncio.run(go())


async def plan_of(kit: Kit, hypervisor: LibvirtHypervisor | None = None, **options: object) -> RestorePlan:
    return await make_plan(kit.manifest, RestoreOptions(**options), repository=kit.repository,  # type: ignore[arg-type]
                           hypervisor=hypervisor, storage_daemon=kit.storage_daemon)


async def carry_out(kit: Kit, plan: RestorePlan, watcher: Watcher | None = None,
                    hypervisor: LibvirtHypervisor | None = None) -> dict[str, object]:
    watcher = watcher or Watcher()
    return await execute(plan, repository=kit.repository, manifest=kit.manifest, storage_daemon=kit.storage_daemon,
                         hypervisor=hypervisor, observer=watcher, on_effect=watcher.effect)


async def refused(kit: Kit, words: str, **options: object) -> None:
    plan = await plan_of(kit, **options)
    with pytest.raises(TargetRefused, match=words) as caught:
        await carry_out(kit, plan)
    assert "web1" in str(caught.value) and plan.problems


def only(kit: Kit, volume: str, target: object) -> dict[str, object]:
    """``volume`` goes to ``target``, the others to a new directory."""
    number = sum(1 for name in os.listdir(kit.directory) if name.startswith("others-"))
    return {"volumes": {volume: str(target)}, "directory": str(kit.directory / f"others-{number}")}


def plan_for(plan: RestorePlan, volume: str) -> VolumePlan:
    return next(item for item in plan.volumes if item.record.id == volume)


# --- files

@pytest.mark.parametrize("mode", list(RevertMode))
def test_everything_into_a_directory(tmp_path: Path, mode: RevertMode) -> None:
    """The same bytes, whether the revert was done at backup time or is left to the restore."""
    new = tmp_path / "new/web1"

    async def test(kit: Kit) -> None:
        plan = await plan_of(kit, directory=str(new))
        assert not plan.problems and [volume.writing for volume in plan.volumes] == ["create"] * 3
        watcher = Watcher()
        result = await carry_out(kit, plan, watcher)
        assert sorted(os.listdir(new)) == ["iscsi_iqn.2024-01.org.example_data_1.raw", "vda.qcow2", "vdb.qcow2"]
        assert same(new / "vda.qcow2", kit.expected("vda"), ("qcow2", "raw"))
        assert same(new / "vdb.qcow2", kit.expected("vdb"), ("qcow2", "raw"))
        assert same(new / "iscsi_iqn.2024-01.org.example_data_1.raw", kit.expected(LUN_ID))
        reverted = result["reverted_chunks"]
        assert isinstance(reverted, dict)
        assert (reverted["vda"] > 0) == (mode is RevertMode.RESTORE) and reverted["vdb"] == 0
        assert watcher.done == (plan.size, plan.size)
        assert subprocess.run(["qemu-img", "check", "-q", str(new / "vda.qcow2")], check=False).returncode == 0
        assert os.stat(new / "vda.qcow2").st_blocks * 512 < plan.size / 2, "holes were written out"

    run(tmp_path, test, mode)


def test_a_backup_that_kept_both_reverts_on_request(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        for wanted, reverts in ((RevertMode.RESTORE, True), (RevertMode.BACKUP, False)):
            target = tmp_path / f"{wanted.value}.raw"
            plan = await plan_of(kit, **only(kit, "vda", target), revert=wanted)
            assert plan_for(plan, "vda").revert is reverts
            await carry_out(kit, plan)
            assert same(target, kit.expected("vda"))

    run(tmp_path, test, RevertMode.BOTH)


def test_a_revert_that_was_left_out_cannot_be_claimed(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        with pytest.raises(InvalidArgument, match="revert left to the restore"):
            await plan_of(kit, directory=str(tmp_path / "new"), revert=RevertMode.BACKUP)

    run(tmp_path, test, RevertMode.RESTORE)


def test_a_plan_touches_nothing(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        (tmp_path / "there.raw").write_bytes(b"x" * MiB)
        before = snapshot_of(tmp_path)
        plan = await plan_of(kit, volumes={"vdb": str(tmp_path / "there.raw")}, directory=str(tmp_path / "a/b"))
        assert plan.problems and plan.directories == (str(tmp_path / "a"), str(tmp_path / "a/b"))
        run_directory = str(tmp_path / "run")
        assert {name: entry for name, entry in snapshot_of(tmp_path).items() if not name.startswith(run_directory)} == {
            name: entry for name, entry in before.items() if not name.startswith(run_directory)}

    run(tmp_path, test)


def test_what_is_there_needs_force(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        raw, image = tmp_path / "old.raw", tmp_path / "old.qcow2"
        save(raw, bytes(10 * MiB) + b"precious" + bytes(20 * MiB))
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
        for target in (raw, image):
            before = target.read_bytes()
            await refused(kit, "is not empty.*--force", **only(kit, "vdb", target))
            assert target.read_bytes() == before
            await carry_out(kit, await plan_of(kit, **only(kit, "vdb", target), force=True))
            assert same(target, kit.expected("vdb"), (target.suffix.strip(".").replace("old", "raw"), "raw"))
        assert raw.stat().st_size == 8 * MiB

    run(tmp_path, test)


def test_a_file_of_zeros_is_written_in_place(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        target = tmp_path / "preallocated.raw"
        target.write_bytes(bytes(8 * MiB))
        inode = target.stat().st_ino
        plan = await plan_of(kit, **only(kit, "vdb", target))
        await carry_out(kit, plan)
        assert target.stat().st_ino == inode and same(target, kit.expected("vdb"))

    run(tmp_path, test)


def test_too_small_is_refused_with_force_too(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        target = tmp_path / "small.raw"
        target.write_bytes(bytes(8 * MiB - 512))
        await refused(kit, "too small", **only(kit, "vdb", target), force=True)
        assert target.read_bytes() == bytes(8 * MiB - 512)

    run(tmp_path, test)


def test_an_image_that_is_open_elsewhere_is_refused_with_force_too(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        for target in (tmp_path / "open.raw", tmp_path / "open.qcow2"):
            subprocess.run(["qemu-img", "create", "-q", "-f", target.suffix[1:], str(target), "8M"], check=True)
            async with kit.storage_daemon() as other:
                await other.export("x", ImageSpec(target.suffix[1:], str(target)), writable=True)
                await refused(kit, "QEMU process has it open", **only(kit, "vdb", target), force=True)

    run(tmp_path, test)


def test_an_image_opened_after_the_plan_is_refused_at_once(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        target = tmp_path / "open.raw"
        target.write_bytes(bytes(8 * MiB))
        plan = await plan_of(kit, **only(kit, "vdb", target))
        async with kit.storage_daemon() as other:
            await other.export("x", ImageSpec("raw", str(target)), writable=True)
            with pytest.raises(TargetRefused, match="QEMU process has it open"):
                await carry_out(kit, plan)
        assert target.read_bytes() == bytes(8 * MiB)

    run(tmp_path, test)


def test_a_failure_removes_everything_that_was_made(tmp_path: Path) -> None:
    """Somebody takes the name of one of three files before it is complete."""
    async def test(kit: Kit) -> None:
        plan = await plan_of(kit, directory=str(tmp_path / "new"))
        watcher = Watcher()
        watcher.foreign.add(str(tmp_path / "new/vdb.qcow2"))

        def spoil(what: str) -> None:
            if what == "write-volumes":
                (tmp_path / "new/vdb.qcow2").write_bytes(b"somebody else's")

        watcher.at = spoil
        with pytest.raises(TargetRefused, match="was not there when the work began"):
            await carry_out(kit, plan, watcher)
        assert os.listdir(tmp_path / "new") == ["vdb.qcow2"], "only what is not ours stays"
        assert watcher.pending == [("rmdir", str(tmp_path / "new"))]

    run(tmp_path, test)


@pytest.mark.parametrize("moment", ["prepare-targets", "write-volumes", "progress", "finish-targets"])
def test_a_cancellation_removes_everything_that_was_made(tmp_path: Path, moment: str) -> None:
    async def test(kit: Kit) -> None:
        old = tmp_path / "old.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(old), "1M"], check=True)
        before = old.read_bytes()
        plan = await plan_of(kit, directory=str(tmp_path / "new/deep"), volumes={"vdb": str(old)}, force=True)
        watcher = Watcher()
        task = asyncio.create_task(carry_out(kit, plan, watcher))

        def stop(what: str) -> None:
            if what == moment:
                task.cancel()

        watcher.at = stop
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not (tmp_path / "new").exists() and watcher.pending == []
        assert old.read_bytes() == before and not (tmp_path / "old.qcow2.part").exists()
        assert list((tmp_path / "run").iterdir()) == []

    run(tmp_path, test, RevertMode.RESTORE)


def test_a_damaged_repository_leaves_nothing(tmp_path: Path) -> None:
    async def test(kit: Kit) -> None:
        plan = await plan_of(kit, directory=str(tmp_path / "new"))
        damage(tmp_path / "repository")
        watcher = Watcher()
        with pytest.raises(Exception, match="volume"):
            await carry_out(kit, plan, watcher)
        assert not (tmp_path / "new").exists() and watcher.pending == []

    run(tmp_path, test)


def damage(repository: Path) -> None:
    """Flip a byte in the middle of every large file."""
    for path in repository.rglob("*"):
        if path.is_file() and path.stat().st_size > 64 * 1024:
            with open(path, "r+b") as file:
                for at in range(1000, path.stat().st_size, 50_000):
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 0x41]))


# --- block devices

@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    require("root and loop devices", os.geteuid() == 0 and os.path.exists("/dev/loop-control"))
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(12 * MiB)
    with loop_device(image) as device:
        yield device, image


def test_a_block_device_is_written_and_its_rest_left_alone(tmp_path: Path, disk: tuple[str, Path]) -> None:
    device, _ = disk

    async def test(kit: Kit) -> None:
        with open(device, "r+b", buffering=0) as file:
            file.seek(10 * MiB)
            file.write(b"r" * MiB)
        await refused(kit, "is not empty.*--force", **only(kit, "vdb", device))
        with open(device, "r+b", buffering=0) as file:
            file.write(b"old" * MiB)  # zeros have to be written over it
        plan = await plan_of(kit, **only(kit, "vdb", device), force=True)
        assert any("larger" in note for note in plan.notes)
        await carry_out(kit, plan)
        with open(device, "rb", buffering=0) as file:
            assert file.read(8 * MiB) == bytes(kit.t1["vdb"])
            file.seek(10 * MiB)
            assert file.read(MiB) == b"r" * MiB

    run(tmp_path, test)


def test_a_block_device_that_is_too_small_is_refused(tmp_path: Path, disk: tuple[str, Path]) -> None:
    async def test(kit: Kit) -> None:
        await refused(kit, "too small", **only(kit, "vda", disk[0]), force=True)

    run(tmp_path, test)


def test_a_block_device_in_use_is_refused_with_force_too(tmp_path: Path, disk: tuple[str, Path]) -> None:
    device, _ = disk

    async def test(kit: Kit) -> None:
        plan = await plan_of(kit, **only(kit, "vdb", device))
        subprocess.run(["mkfs.ext4", "-q", device], check=True)
        (tmp_path / "mnt").mkdir()
        subprocess.run(["mount", device, str(tmp_path / "mnt")], check=True)
        try:
            await refused(kit, "is mounted at", **only(kit, "vdb", device), force=True)
            with pytest.raises(TargetRefused, match="in use"):
                await carry_out(kit, plan)  # mounted since it was planned
        finally:
            subprocess.run(["umount", str(tmp_path / "mnt")], check=True)
        await refused(kit, "an ext filesystem", **only(kit, "vdb", device))

    run(tmp_path, test)


# --- LUNs

@pytest.fixture
def target(tmp_path: Path) -> Iterator[IscsiTarget]:
    require("tgtd and tgtadm", all(os.path.exists(f"/usr/sbin/{name}") for name in ("tgtd", "tgtadm")))
    from tests.lab.iscsi import IscsiTarget
    from tests.lab.services import Processes

    directory = tmp_path / "iscsi"
    directory.mkdir()
    with open(os.devnull) as lock, closing(Processes(directory, lock.fileno())) as processes:
        served = IscsiTarget(processes, directory)
        yield served
        served.close()


def test_a_lun_through_qemus_initiator(tmp_path: Path, target: IscsiTarget) -> None:
    async def test(kit: Kit) -> None:
        lun = target.create_lun("new", size=16 * MiB)
        plan = await plan_of(kit, **only(kit, LUN_ID, lun.uri))
        assert not plan.problems and plan.presentations and lun.iqn in plan.presentations[0].how
        await carry_out(kit, plan)
        assert same(lun.path, kit.expected(LUN_ID))
        await refused(kit, "is not empty", **only(kit, LUN_ID, lun.uri))
        await carry_out(kit, await plan_of(kit, **only(kit, "vdb", lun.uri), force=True))
        assert lun.path.read_bytes()[:8 * MiB] == bytes(kit.t1["vdb"])

    run(tmp_path, test)


def test_a_lun_is_reverted_where_the_backup_left_that_to_the_restore(tmp_path: Path, target: IscsiTarget) -> None:
    async def test(kit: Kit) -> None:
        lun = target.create_lun("new", size=25 * MiB)
        await carry_out(kit, await plan_of(kit, **only(kit, "vda", lun.uri)))
        assert lun.path.read_bytes()[:len(kit.t1["vda"])] == bytes(kit.t1["vda"])

    run(tmp_path, test, RevertMode.RESTORE)


def test_luns_that_cannot_be_targets(tmp_path: Path, target: IscsiTarget) -> None:
    async def test(kit: Kit) -> None:
        small = target.create_lun("small", size=MiB)
        await refused(kit, "too small", **only(kit, LUN_ID, small.uri), force=True)
        await refused(kit, "cannot be a target", **only(kit, LUN_ID, f"iscsi://{small.portal}/{small.iqn}/7"))
        await refused(kit, "cannot be a target", **only(kit, LUN_ID, f"iscsi://{small.portal}/iqn.2024-01.none/1"))

    run(tmp_path, test)


# --- domains

class DriverOfTests(LibvirtHypervisor):
    """libvirt's test driver, which refuses the flags an undefine has for QEMU's domains."""

    async def undefine(self, uuid: str) -> None:
        with closing(libvirt.open("test:///default")) as connection:
            try:
                connection.lookupByUUIDString(uuid).undefine()
            except libvirt.libvirtError as error:
                raise NotFound(str(error)) from error


def with_libvirt(tmp_path: Path, test: Callable[[Kit, LibvirtHypervisor], Awaitable[None]]) -> None:
    async def go() -> None:
        kit = await make_kit(tmp_path)
        hypervisor = DriverOfTests("test:///default")
        await hypervisor.open()
        try:
            with closing(kit.repository):
                await test(kit, hypervisor)
        finally:
            await hypervisor.close()

    asyncio.run(go())


def test_the_domain_is_defined_last_and_started(tmp_path: Path) -> None:
    async def test(kit: Kit, hypervisor: LibvirtHypervisor) -> None:
        plan = await plan_of(kit, hypervisor, name="web2", directory=str(tmp_path / "new"), start=True)
        assert not plan.problems and plan.domain is not None
        watcher = Watcher()
        told: list[list[tuple[str, str]]] = []
        watcher.at = lambda what: told.append(list(watcher.pending)) if what == "define-domain" else None
        result = await carry_out(kit, plan, watcher, hypervisor)
        assert {undo for undo, _ in told[0]} == {"unlink", "rmdir"} and watcher.pending == []
        assert watcher.steps == ["prepare-targets", "write-volumes", "finish-targets", "define-domain", "start-domain"]
        domain = await hypervisor.domain("web2")
        assert domain.running and domain.uuid == result["uuid"] != kit.manifest.vm.uuid and result["started"]
        assert [disk.source.path for disk in domain.disks if disk.source] == [
            f"{tmp_path}/new/vda.qcow2", f"{tmp_path}/new/vdb.qcow2"]
        assert [entry["volume"] for entry in result["present_to_guest"]] == [LUN_ID]  # type: ignore[attr-defined]

        # in use now, whatever is forced
        again = await plan_of(kit, hypervisor, name="web3", force=True, **only(kit, "vdb", tmp_path / "new/vdb.qcow2"))
        assert any("running VM web2" in problem for problem in again.problems)
        await hypervisor.destroy(domain.uuid)
        again = await plan_of(kit, hypervisor, name="web3", force=True, **only(kit, "vdb", tmp_path / "new/vdb.qcow2"))
        assert not again.problems

    with_libvirt(tmp_path, test)


def test_a_domain_is_never_replaced(tmp_path: Path) -> None:
    async def test(kit: Kit, hypervisor: LibvirtHypervisor) -> None:
        plan = await plan_of(kit, hypervisor, name="test", directory=str(tmp_path / "new"), force=True)
        with pytest.raises(TargetRefused, match="VM named test exists.*--name"):
            await carry_out(kit, plan, hypervisor=hypervisor)
        assert not (tmp_path / "new").exists()

    with_libvirt(tmp_path, test)


def test_a_definition_libvirt_refuses_takes_the_files_back(tmp_path: Path) -> None:
    async def test(kit: Kit, hypervisor: LibvirtHypervisor) -> None:
        one = await plan_of(kit, hypervisor, name="web2", directory=str(tmp_path / "one"))
        two = await plan_of(kit, hypervisor, name="web2", directory=str(tmp_path / "two"))
        await carry_out(kit, one, hypervisor=hypervisor)
        watcher = Watcher()
        with pytest.raises(Exception, match="web2"):  # the name was taken since it was planned
            await carry_out(kit, two, watcher, hypervisor)
        assert not (tmp_path / "two").exists() and watcher.pending == []
        assert (await hypervisor.domain("web2")).uuid == one.domain.uuid  # type: ignore[union-attr]

    with_libvirt(tmp_path, test)


def test_a_cancellation_while_defining_takes_everything_back(tmp_path: Path) -> None:
    async def test(kit: Kit, hypervisor: LibvirtHypervisor) -> None:
        plan = await plan_of(kit, hypervisor, name="web2", directory=str(tmp_path / "new"))
        watcher = Watcher()
        task = asyncio.create_task(carry_out(kit, plan, watcher, hypervisor))
        watcher.at = lambda what: task.cancel() and None if what == "define-domain" else None
        try:
            await task
        except asyncio.CancelledError:
            assert not (tmp_path / "new").exists() and watcher.pending == []
            with pytest.raises(NotFound):
                await hypervisor.domain("web2")
        else:  # it came too late
            assert (await hypervisor.domain("web2")).uuid == plan.domain.uuid  # type: ignore[union-attr]

    with_libvirt(tmp_path, test)


def test_a_plan_is_json(tmp_path: Path) -> None:
    async def test(kit: Kit, hypervisor: LibvirtHypervisor) -> None:
        import json

        plan = await plan_of(kit, hypervisor, name="web2", directory=str(tmp_path / "new"))
        told = json.loads(json.dumps(plan.as_dict()))
        assert told["name"] == "web2" and [entry["id"] for entry in told["volumes"]] == ["vda", "vdb", LUN_ID]
        assert told["volumes"][0]["now"]["content"] == "absent" and told["volumes"][0]["write"] == "create"
        assert not (tmp_path / "new").exists() and len(set(plan.resources)) == 3

    with_libvirt(tmp_path, test)
