"""Which volume goes where: what the request says, and the defaults for what it does not say."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from vmbackupd.errors import InvalidArgument
from vmbackupd.model import VolumeKind, VolumeRecord
from vmbackupd.restore.address import SYNTAX, Target, file_target, parse_target, safe_name
from vmbackupd.restore.inuse import place


def assign_targets(vm: str, volumes: Sequence[VolumeRecord], stated: Mapping[str, str], directory: str | None,
                   ) -> dict[str, Target | None]:
    """The target of each volume by id, None for one that is left out. Raises ``InvalidArgument``.

    A volume without a stated target goes into ``directory``: a virtual disk to ``<id>.qcow2``, a pass-through volume
    to a raw file, which an iSCSI target or ``dd`` can take as it is.
    """
    _refuse_unknown(vm, volumes, stated)
    if directory is not None and not directory.startswith("/"):
        raise InvalidArgument(f"VM {vm}: the directory of a restore must be an absolute path, got {directory!r}")
    targets: dict[str, Target | None] = {}
    missing: list[str] = []
    for record in volumes:
        if record.id in stated:
            targets[record.id] = _settled(parse_target(record.id, stated[record.id]))
        elif directory is not None:
            suffix = ".qcow2" if record.kind is VolumeKind.VIRTUAL else ".raw"
            targets[record.id] = _settled(file_target(os.path.join(directory, safe_name(record.id) + suffix)))
        else:
            missing.append(f"{record.id} ({record.kind.value})")
    if missing:
        raise InvalidArgument(f"VM {vm}: no target is stated for {', '.join(missing)}: give a directory for all with"
                              " --to DIR,"
                              f" or each its target with --volume {SYNTAX}")
    if not any(targets.values()):
        raise InvalidArgument(f"VM {vm}: every volume of the backup is left out: nothing to restore")
    _refuse_shared(vm, targets)
    return targets


def _refuse_unknown(vm: str, volumes: Sequence[VolumeRecord], stated: Mapping[str, str]) -> None:
    known = [record.id for record in volumes]
    unknown = sorted(set(stated) - set(known))
    if unknown:
        raise InvalidArgument(f"VM {vm}: the backup has no volume {', '.join(unknown)}: its volumes are"
                              f" {', '.join(known)}")


def _settled(target: Target | None) -> Target | None:
    """Follow a link that stands in a file's place: renaming over it would leave the file it leads to as it was.

    A device keeps the name it was given, for names in /dev/disk/by-id outlive the next boot and ``/dev/sdb`` does
    not.
    """
    if target is not None and target.is_file and os.path.islink(target.file):
        return Target(target.kind, os.path.realpath(target.file))
    return target


def _refuse_shared(vm: str, targets: Mapping[str, Target | None]) -> None:
    seen: dict[tuple[object, ...], str] = {}
    for volume, target in targets.items():
        if target is None:
            continue
        other = seen.setdefault(place(target), volume)
        if other != volume:
            raise InvalidArgument(f"VM {vm}: volumes {other} and {volume} would both be written to {target}:"
                                  " give each a target of its own")
