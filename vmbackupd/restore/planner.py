"""Makes the plan of a restore: looks at every target and collects every reason to refuse. Writes nothing."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import uuid as uuid_module
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vmbackupd.errors import InvalidArgument, NotFound, RepositoryCorrupt
from vmbackupd.hypervisor.base import Hypervisor
from vmbackupd.hypervisor.images import qcow2_obstacle
from vmbackupd.hypervisor.qmp.blocks import Image
from vmbackupd.hypervisor.qmp.description import COMMAND_LINE, STATE
from vmbackupd.hypervisor.qmp.stored import stored_images
from vmbackupd.job.options import RestoreOptions
from vmbackupd.model import Method, RevertMode, VolumeRecord
from vmbackupd.repository import Repository
from vmbackupd.repository.manifest import Manifest
from vmbackupd.restore import blobs
from vmbackupd.restore.address import Target, TargetKind
from vmbackupd.restore.assign import assign_targets
from vmbackupd.restore.check import choose_writing, path_problems, space_note
from vmbackupd.restore.command import CommandPlan, plan_command
from vmbackupd.restore.disks import PlacedVolume
from vmbackupd.restore.domain import Rewritten, rewrite
from vmbackupd.restore.inuse import DomainDiskUse, domain_disks
from vmbackupd.restore.look import CannotLook, StorageDaemonFactory, look
from vmbackupd.restore.owners import target_users
from vmbackupd.restore.plan import BlobPlan, Content, DomainPlan, Found, RestorePlan, VolumePlan, Writing
from vmbackupd.restore.present import presentations

NAME_LIMIT = 200  # bytes; the name becomes part of file names


@dataclass
class _Findings:
    """What accumulates while the plan is made."""

    notes: list[str]
    problems: list[str]


async def make_plan(manifest: Manifest, request: RestoreOptions, *, repository: Repository,
                    hypervisor: Hypervisor | None, storage_daemon: StorageDaemonFactory) -> RestorePlan:
    """The checked plan of restoring ``manifest`` as ``request`` says. Without a hypervisor no domain is planned.

    Raises ``InvalidArgument`` where the request makes no sense whatever the targets hold; everything that a look at
    targets and domains finds is in ``problems``, all at once.
    """
    vm = manifest.vm.name
    name = _domain_name(vm, request.name)
    targets = assign_targets(vm, manifest.volumes, request.volumes, request.directory)
    findings = _Findings([], [])
    directories = path_problems(request.directory, targets, findings.problems)
    uses = await domain_disks(hypervisor, findings.notes) if hypervisor is not None else []
    domains = await hypervisor.domains() if hypervisor is not None else []
    running = any(active and uuid == manifest.vm.uuid for _, uuid, active in domains)
    volumes = [await _plan_volume(manifest, record, target, request, uses, running, storage_daemon, findings)
               for record in manifest.volumes if (target := targets[record.id]) is not None]
    findings.notes += space_note(volumes)
    files: tuple[BlobPlan, ...] = ()
    domain: DomainPlan | None = None
    attached: frozenset[str] = frozenset()
    command: CommandPlan | None = None
    defined = _has_domain(manifest)
    if hypervisor is not None and not defined:
        findings.notes.append(f"backup {manifest.id} holds no libvirt domain: nothing will be defined")
    elif hypervisor is not None and not hypervisor.defines:
        findings.notes.append("this vmbackupd works without libvirt (hypervisor.uri): the domain in the backup will not"
                              " be defined")
    if hypervisor is not None and defined and hypervisor.defines:
        findings.problems += await _name_problems(hypervisor, name)
        domain, files = await _plan_domain(manifest, name, targets, request, repository, findings)
        attached = domain.attached
    elif request.start:
        raise InvalidArgument(f"VM {vm}: a restore that defines no domain cannot start it")
    if COMMAND_LINE in manifest.config:
        command, files = await _plan_command(manifest, name, targets, request, repository, findings)
        attached = command.attached
    return RestorePlan(
        backup=manifest.id, vm=vm, directory=request.directory, volumes=tuple(volumes),
        left_out=tuple(record.id for record in manifest.volumes if targets[record.id] is None),
        directories=directories, blobs=files, domain=domain,
        presentations=presentations(manifest, [(plan.record, plan.target) for plan in volumes], attached),
        notes=tuple(findings.notes), problems=tuple(findings.problems), force=request.force, start=request.start,
        command=command)


def _has_domain(manifest: Manifest) -> bool:
    """Whether there is a VM that libvirt could define: there is none of imported images, or of a QEMU that ran without
    libvirt."""
    imported = all(record.method is Method.IMPORT for record in manifest.volumes)
    return not imported and STATE not in manifest.config and COMMAND_LINE not in manifest.config


def _domain_name(vm: str, wanted: str | None) -> str:
    name = vm if wanted is None else wanted
    # libvirt's own rules (no slash, not empty, printable), and a length that leaves room in file names
    shown = name.strip() and name.isprintable() and len(name.encode()) <= NAME_LIMIT
    if not shown or "/" in name or name.startswith("."):
        raise InvalidArgument(f"VM {vm}: {name!r} cannot be the name of a VM: expected printable characters without a"
                              " slash or a"
                              f" leading dot, at most {NAME_LIMIT} bytes; choose one with --name")
    return name


async def _name_problems(hypervisor: Hypervisor, name: str) -> list[str]:
    try:
        taken = await hypervisor.domain(name)
    except NotFound:
        return []
    if taken.name != name:
        return []  # found by its UUID
    return [f"a VM named {name} exists already (UUID {taken.uuid}); a restore never replaces a VM, with --force"
            " neither:"
            " choose another name with --name"]


async def _plan_volume(manifest: Manifest, record: VolumeRecord, target: Target, request: RestoreOptions,
                       uses: list[DomainDiskUse], running: bool, storage_daemon: StorageDaemonFactory,
                       findings: _Findings) -> VolumePlan:
    tree, revert = _tree(manifest, record, request.revert)
    try:
        found = await look(target, storage_daemon)
        users = target_users(target, found, uses, manifest, running)
        found = dataclasses.replace(found, users=found.users + tuple(users))
        if request.in_place and target.kind is TargetKind.QCOW2 and found.content is Content.DATA:
            obstacle = await qcow2_obstacle(target.file, record.size)
            if obstacle is None:
                found = dataclasses.replace(found, size=record.size)
            else:
                findings.notes.append(f"volume {record.id}: {target} is replaced, not written in place: it {obstacle}")
    except CannotLook as reason:
        findings.problems.append(f"volume {record.id}: {target} cannot be a target: {reason}")
        found = Found(Content.ABSENT)
    writing = choose_writing(record, target, found, request.force, findings.notes, findings.problems,
                             in_place=request.in_place)
    compare = request.in_place and writing is Writing.IN_PLACE
    return VolumePlan(record, target, found, writing, tree, revert, compare)


def _tree(manifest: Manifest, record: VolumeRecord, wanted: RevertMode | None) -> tuple[str, bool]:
    """The image to copy, and whether it has to be set back to T1 while it is restored.

    By default that is done only where the backup left it to the restore; ``restore`` asks for it wherever the backup
    kept what it needs, ``backup`` accepts only images that are at T1 already.
    """
    if record.tree is None and record.t2_tree is None:
        raise RepositoryCorrupt(f"VM {manifest.vm.name}: the manifest of backup {manifest.id} names no image for volume"
                                f" {record.id}: restore another backup")
    if record.tree is not None and (record.t2_tree is None or wanted is not RevertMode.RESTORE):
        return record.tree, False
    assert record.t2_tree is not None
    if wanted is RevertMode.BACKUP:
        raise InvalidArgument(f"VM {manifest.vm.name}: backup {manifest.id} was made with its revert left to the"
                              " restore, so"
                              f" volume {record.id} has no image that is reverted already: restore without"
                              " --revert=backup")
    if manifest.store is None:
        raise RepositoryCorrupt(f"VM {manifest.vm.name}: backup {manifest.id} has no COW stores, but volume"
                                f" {record.id} needs"
                                " them to be set back to T1: restore another backup")
    return record.t2_tree, True


async def _plan_domain(manifest: Manifest, name: str, targets: Mapping[str, Target | None], request: RestoreOptions,
                       repository: Repository, findings: _Findings) -> tuple[DomainPlan, tuple[BlobPlan, ...]]:
    uuid = str(uuid_module.uuid4())
    xml = await asyncio.to_thread(_definition, manifest, repository)
    files = blobs.plan_files(manifest.config, xml, name=name, uuid=uuid, directory=request.directory)
    _refuse_existing(files, request, findings)
    placed = [PlacedVolume(record, targets[record.id]) for record in manifest.volumes]
    result: Rewritten = rewrite(xml, name=name, uuid=uuid, volumes=placed, nvram=blobs.nvram_path(files))
    findings.notes += result.notes
    return DomainPlan(name, uuid, result.macs, result.attached, result.xml), files


async def _plan_command(manifest: Manifest, name: str, targets: Mapping[str, Target | None], request: RestoreOptions,
                        repository: Repository, findings: _Findings) -> tuple[CommandPlan, tuple[BlobPlan, ...]]:
    """The command of a machine that no libvirt ran, and its UEFI variables beside it."""
    text = (await asyncio.to_thread(repository.blob, manifest.config[COMMAND_LINE])).decode()
    images: dict[str, Image] = {}
    flash: str | None = None
    if STATE in manifest.config:
        images, flash = stored_images((await asyncio.to_thread(repository.blob, manifest.config[STATE])).decode())
    directory = request.directory
    files: tuple[BlobPlan, ...] = ()
    if "nvram" in manifest.config and directory is not None:
        files = (BlobPlan("nvram", manifest.config["nvram"], os.path.join(directory, f"{name}_VARS.fd")),)
    command = plan_command(
        text, images, [PlacedVolume(record, targets[record.id]) for record in manifest.volumes],
        files={flash: files[0].path} if flash and files else {},
        path=os.path.join(directory, f"{name}.start") if directory is not None else None)
    _refuse_existing([*files, *([BlobPlan("command", "", command.path)] if command.path else [])], request, findings)
    findings.notes += command.notes
    return command, files


def _refuse_existing(files: Iterable[BlobPlan], request: RestoreOptions, findings: _Findings) -> None:
    for blob in files:
        if os.path.lexists(blob.path) and not request.force:
            findings.problems.append(f"{blob.kind} file {blob.path} exists already: move it away, or replace it with"
                                     " --force")


def _definition(manifest: Manifest, repository: Repository) -> str:
    """The definition of the VM when it was off, else (a VM that was never defined) as it ran."""
    blob = manifest.config.get("domain-inactive.xml") or manifest.config.get("domain.xml")
    if blob is None:
        raise RepositoryCorrupt(f"VM {manifest.vm.name}: backup {manifest.id} holds no domain definition")
    return repository.blob(blob).decode()
