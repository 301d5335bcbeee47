"""Plans without a hypervisor: what the manifest and the request decide."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest

from vmbackupd.errors import InvalidArgument, RepositoryCorrupt, TargetRefused
from vmbackupd.job.options import RestoreOptions
from vmbackupd.model import Consistency, Method, RevertMode, VolumeKind, VolumeRecord
from vmbackupd.repository import Manifest, StoreRecord, VmIdentity
from vmbackupd.restore import blobs
from vmbackupd.restore.address import IscsiTarget, Target, TargetKind
from vmbackupd.restore.inuse import DomainDiskUse
from vmbackupd.restore.owners import is_origin, target_users
from vmbackupd.restore.plan import Content, Found, RestorePlan
from vmbackupd.restore.planner import make_plan
from vmbackupd.restore.present import presentations

T1, T2, STORE = "1" * 64, "2" * 64, "3" * 64
UUID = "6c5bbd4c-02b4-4d3c-9f52-2c8f5c9d7a10"
LUN = VolumeRecord(
    "iscsi:iqn.x:d/1", VolumeKind.PASS_THROUGH, Method.GUEST_SNAPSHOT, Consistency.FILESYSTEM, 1 << 20, T1,
    details={"iscsi": {"iqn": "iqn.x:d", "portal": "192.0.2.7:3260", "lun": 1}, "guest_name": "sdb",
             "wwn": "naa.6001405ABC", "serial": "s1"})


def manifest(*volumes: VolumeRecord, store: bool = True) -> Manifest:
    return Manifest("web1-20260101T000000Z-01234567", VmIdentity("web1", UUID), 1.0, 1.0, 2.0, 3.0, RevertMode.BACKUP,
                    volumes, StoreRecord(STORE, 1 << 20) if store else None,
                    guest={"initiator": "iqn.x:guest"})


def vda(tree: str | None, t2_tree: str | None = None) -> VolumeRecord:
    return VolumeRecord("vda", VolumeKind.VIRTUAL, Method.GUEST_SNAPSHOT, Consistency.FILESYSTEM, 1 << 20, tree,
                        t2_tree)


def plan(backup: Manifest, **options: Any) -> RestorePlan:
    """A plan into files only: neither the repository nor a storage daemon is asked."""
    return asyncio.run(make_plan(backup, RestoreOptions(**options), repository=cast(Any, None), hypervisor=None,
                                 storage_daemon=cast(Any, None)))


@pytest.mark.parametrize(("tree", "t2_tree", "wanted", "expected"), [
    (T1, None, None, (T1, False)),
    (T1, None, RevertMode.RESTORE, (T1, False)),  # one instant: there is nothing to revert
    (T1, T2, None, (T1, False)),
    (T1, T2, RevertMode.BACKUP, (T1, False)),
    (T1, T2, RevertMode.RESTORE, (T2, True)),
    (None, T2, None, (T2, True)),
    (None, T2, RevertMode.RESTORE, (T2, True)),
])
def test_which_image_is_restored(tmp_path: Path, tree: str | None, t2_tree: str | None, wanted: RevertMode | None,
                                 expected: tuple[str, bool]) -> None:
    made = plan(manifest(vda(tree, t2_tree)), directory=str(tmp_path), revert=wanted)
    assert (made.volumes[0].tree, made.volumes[0].revert) == expected


def test_images_that_cannot_be_restored_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="revert left to the restore"):
        plan(manifest(vda(None, T2)), directory=str(tmp_path), revert=RevertMode.BACKUP)
    with pytest.raises(RepositoryCorrupt, match="no image for volume vda"):
        plan(manifest(vda(None)), directory=str(tmp_path))
    with pytest.raises(RepositoryCorrupt, match="no COW stores"):
        plan(manifest(vda(None, T2), store=False), directory=str(tmp_path))


@pytest.mark.parametrize("name", ["a\nb", ".hidden", "x" * 201])
def test_names_no_domain_can_have_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument, match="cannot be the name"):
        plan(manifest(vda(T1)), directory=str(tmp_path), name=name)


class NoDomains:
    """A hypervisor that has none."""

    defines = True

    async def domains(self) -> list[tuple[str, str, bool]]:
        return []


def test_imported_images_are_restored_without_a_domain(tmp_path: Path) -> None:
    image = dataclasses.replace(vda(T1), method=Method.IMPORT)

    def planned(**options: Any) -> RestorePlan:
        request = RestoreOptions(directory=str(tmp_path), **options)
        return asyncio.run(make_plan(manifest(image), request, repository=cast(Any, None),
                                     hypervisor=cast(Any, NoDomains()), storage_daemon=cast(Any, None)))

    made = planned()
    assert made.domain is None and [volume.record.id for volume in made.volumes] == ["vda"]
    assert any("no libvirt domain: nothing will be defined" in note for note in made.notes) and not made.problems
    with pytest.raises(InvalidArgument, match="cannot start it"):
        planned(start=True)


def test_nothing_can_be_started_without_a_domain(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot start"):
        plan(manifest(vda(T1)), directory=str(tmp_path), start=True)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "vda.qcow2").write_bytes(b"x")
    (tmp_path / "lun.raw").write_bytes(b"y" * 100)
    made = plan(manifest(vda(T1), LUN), directory=str(tmp_path), volumes={LUN.id: str(tmp_path / "lun.raw")})
    with pytest.raises(TargetRefused) as caught:
        made.require_sound()
    text = str(caught.value)
    assert "vda.qcow2 is not empty" in text and "lun.raw is not empty" in text and "too small" in text
    assert "web1" in text and "nothing was written" in text
    assert json.loads(json.dumps(made.as_dict()))["problems"] == list(made.problems)


def test_what_cannot_be_a_target_is_told(tmp_path: Path) -> None:
    (tmp_path / "d.raw").mkdir()
    made = plan(manifest(vda(T1)), volumes={"vda": str(tmp_path / "d.raw")})
    assert len(made.problems) == 1 and "it is a directory" in made.problems[0]


def test_targets_are_resources_whatever_names_lead_to_them(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    one, two = (plan(manifest(vda(T1)), volumes={"vda": str(tmp_path / name)}) for name in "ab")
    assert one.resources == two.resources and len(one.resources) == 1


# --- whose a target is

@pytest.mark.parametrize(("target", "identity", "same"), [
    (Target(TargetKind.ISCSI, iscsi=IscsiTarget("other-portal", 1, "iqn.x:d", 1)), (), True),
    (Target(TargetKind.ISCSI, iscsi=IscsiTarget("192.0.2.7", 3260, "iqn.x:d", 2)), (), False),
    (Target(TargetKind.BLOCK, "/dev/null"), (("wwn", "6001405abc"),), True),
    (Target(TargetKind.BLOCK, "/dev/null"), (("wwn", "6001405abd"), ("serial", "s1")), False),
    (Target(TargetKind.BLOCK, "/dev/null"), (("serial", "s1"),), True),
    (Target(TargetKind.BLOCK, "/dev/null"), (), False),
])
def test_the_original_lun_is_known_by_its_identity(target: Target, identity: tuple[tuple[str, str], ...],
                                                   same: bool) -> None:
    found = Found(Content.EMPTY, 1 << 20, identity=identity)
    assert is_origin(LUN, target, found) is same
    assert bool(target_users(target, found, [], manifest(LUN), running=True)) is same
    assert target_users(target, found, [], manifest(LUN), running=False) == []


def test_disks_of_running_domains_are_in_use_those_of_others_are_not(tmp_path: Path) -> None:
    path = str(tmp_path / "a.qcow2")
    use = DomainDiskUse("db1", "u", True, "vda", None, (path,))
    target, found = Target(TargetKind.QCOW2, path), Found(Content.DATA)
    assert target_users(target, found, [use], manifest(), running=False) == ["disk vda of the running VM db1"]
    assert target_users(target, found, [dataclasses.replace(use, running=False)], manifest(), running=False) == []


# --- what the guest attaches by itself

@pytest.mark.parametrize(("target", "words"), [
    (Target(TargetKind.RAW, "/new/lun.raw"), "present /new/lun.raw to the guest as LUN 1 of iqn.x:d at 192.0.2.7:3260"),
    (Target(TargetKind.ISCSI, iscsi=IscsiTarget("h", 3260, "iqn.new", 4)),
     "log in to iqn.new at h:3260 and find LUN 4"),
    (Target(TargetKind.ISCSI, iscsi=IscsiTarget("h", 3260, "iqn.x:d", 1)), "let it reach that LUN, now on h:3260"),
])
def test_volumes_no_definition_can_attach_come_with_instructions(target: Target, words: str) -> None:
    told = presentations(manifest(LUN), [(LUN, target)], frozenset())
    assert len(told) == 1 and words in told[0].how and "iqn.x:guest" in told[0].how
    assert told[0].facts["iscsi"] == LUN.details["iscsi"] and told[0].facts["initiator"] == "iqn.x:guest"
    assert presentations(manifest(LUN), [(LUN, target)], frozenset({LUN.id})) == ()


def test_other_pass_through_devices_are_named_as_the_guest_names_them() -> None:
    nvme = dataclasses.replace(LUN, id="serial:n1", details={"guest_name": "nvme0n1"})
    told = presentations(manifest(nvme), [(nvme, Target(TargetKind.RAW, "/new/n.raw"))], frozenset())
    assert "nvme0n1" in told[0].how


# --- small files

UEFI = ("<domain><os><loader/><nvram>/var/lib/libvirt/qemu/nvram/web1_VARS.qcow2</nvram></os><devices>"
        "<tpm><backend type='emulator' version='2.0'/></tpm></devices></domain>")


def test_small_files_have_their_places() -> None:
    config = {"nvram": "n", "tpm/tpm2-00.permall": "a", "tpm/tpm2/.lock": "b", "domain.xml": "x"}
    files = blobs.plan_files(config, UEFI, name="web2", uuid="U", directory="/new")
    assert [(item.kind, item.blob, item.path) for item in files] == [
        ("nvram", "n", "/new/web2_VARS.qcow2"),
        ("tpm", "a", "/var/lib/libvirt/swtpm/U/tpm2/tpm2-00.permall"),
        ("tpm", "b", "/var/lib/libvirt/swtpm/U/tpm2/.lock")]
    files = blobs.plan_files({"nvram": "n"}, UEFI, name="web2", uuid="U", directory=None)
    assert [item.path for item in files] == ["/var/lib/libvirt/qemu/nvram/web2_VARS.qcow2"]


def test_a_domain_without_firmware_or_tpm_gets_none() -> None:
    xml = "<domain><os/><devices/></domain>"
    assert blobs.plan_files({"nvram": "n", "tpm/x": "a"}, xml, name="w", uuid="U", directory="/new") == ()


@pytest.mark.parametrize("key", ["tpm/../../etc/passwd", "tpm//etc/passwd", "tpm/", "tpm/a/../../b"])
def test_a_tpm_file_stays_in_its_directory(key: str) -> None:
    with pytest.raises(RepositoryCorrupt, match="outside"):
        blobs.plan_files({key: "a"}, UEFI, name="w", uuid="U", directory="/new")
