"""The rules of what may be written where. Each problem is a sentence that ends with what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from vmbackupd.host.newfile import PART
from vmbackupd.model import VolumeRecord
from vmbackupd.restore.address import Target, TargetKind
from vmbackupd.restore.plan import Content, Found, VolumePlan, Writing
from vmbackupd.units import human


def choose_writing(record: VolumeRecord, target: Target, found: Found, force: bool, notes: list[str],
                   problems: list[str], *, in_place: bool = False) -> Writing:
    """How ``target`` will be written; adds to ``problems`` what forbids it and to ``notes`` what is good to know.

    A raw file that is there is written in place, as a device is: it may be preallocated or lie where its owner wants
    it. A qcow2 file is replaced, since its own snapshots, backing file and size would survive writing into it.
    ``in_place`` says that data is expected there: it needs no ``force`` to be written over chunk by chunk. A qcow2 file
    that is nothing but its content (it has a size then) is written in place if that is asked for.
    """
    volume = f"volume {record.id}"
    problems += [f"{volume}: {target} is in use: {user}; free it or name another target (--force does not change this)"
                 for user in found.users]
    writing = Writing.IN_PLACE if not target.is_file or found.size is not None else (
        Writing.CREATE if found.content is Content.ABSENT else Writing.REPLACE)
    if found.content is Content.DATA and not force and not (in_place and writing is Writing.IN_PLACE):
        problems.append(f"{volume}: {target} is not empty: it holds {found.what}{_who(found)}; name another target, or"
                        " overwrite it with --force")
    if found.size is not None:
        _compare_sizes(record, target, found.size, notes, problems)
    return writing


def _compare_sizes(record: VolumeRecord, target: Target, size: int, notes: list[str], problems: list[str]) -> None:
    if size < record.size:
        problems.append(f"volume {record.id}: {target} is too small: {size} bytes ({human(size)}), the volume has"
                        f" {record.size} ({human(record.size)}); name a larger target")
    elif size > record.size and target.kind is not TargetKind.RAW:
        notes.append(f"volume {record.id}: {target} is larger ({human(size)}) than the volume ({human(record.size)});"
                     " the guest"
                     " sees the larger size, and the rest is left as it is")


def _who(found: Found) -> str:
    return "" if not found.identity else " (" + ", ".join(f"{key} {value}" for key, value in found.identity) + ")"


def path_problems(directory: str | None, targets: Mapping[str, Target | None], problems: list[str]) -> tuple[str, ...]:
    """Check the directories files go into; returns those to be made, outermost first.

    Only ``directory`` is made: a stated path in a directory that is not there is rather a typing mistake.
    """
    made = missing_directories(directory) if directory is not None else ()
    files = {volume: target.file for volume, target in targets.items() if target is not None and target.is_file}
    parents = {os.path.dirname(path): volume for volume, path in files.items()}
    for parent, volume in parents.items():
        existing = parent
        if parent in made:
            existing = os.path.dirname(made[0])
        if not os.path.isdir(existing):
            problems.append(f"volume {volume}: directory {parent} does not exist: create it or name another target")
        elif not os.access(existing, os.W_OK | os.X_OK):
            problems.append(f"volume {volume}: directory {existing} cannot be written to: name another target")
    for volume, path in files.items():
        if os.path.lexists(path + PART):
            problems.append(f"volume {volume}: {path + PART} exists: another restore is writing there, or one"
                            " was cut off;"
                            " wait for it, or remove the file")
    return made


def missing_directories(directory: str) -> tuple[str, ...]:
    """Those parts of the path ``directory`` that do not exist, outermost first."""
    missing: list[str] = []
    path = os.path.normpath(directory)
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return tuple(reversed(missing))


def space_note(volumes: Sequence[VolumePlan]) -> Iterable[str]:
    """A note for each filesystem that could not hold its new files if they were full."""
    needs: dict[int, tuple[str, int]] = {}
    for volume in volumes:
        if volume.writing is Writing.IN_PLACE:
            continue
        parent = os.path.dirname(volume.target.file)
        while not os.path.isdir(parent):
            parent = os.path.dirname(parent)
        device = os.stat(parent).st_dev
        path, need = needs.get(device, (parent, 0))
        needs[device] = (path, need + volume.size)
    for path, need in needs.values():
        status = os.statvfs(path)
        free = status.f_bavail * status.f_frsize
        if free < need:
            yield (f"{path} has {human(free)} free, the volumes are {human(need)} when full: the restore fails if"
                   " they do not fit"
                   " (holes take no space)")
