"""The plan of a restore: everything that will be written, and what lies there now. Made without writing anything.

``RestorePlan.as_dict`` is what ``restore --dry-run`` prints; its keys are part of the ``--json`` interface.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from vmbackupd.errors import TargetRefused
from vmbackupd.model import VolumeRecord
from vmbackupd.restore.address import Target
from vmbackupd.restore.command import CommandPlan
from vmbackupd.restore.inuse import place


class Content(StrEnum):
    """What a look at a target found."""

    ABSENT = "absent"
    EMPTY = "empty"
    DATA = "data"


class Writing(StrEnum):
    """How a target comes to hold its volume.

    ``CREATE`` and ``REPLACE`` write a new file beside the final name and rename it when the whole restore has
    succeeded; ``IN_PLACE`` writes over a device, a LUN, an existing raw file or, where that was asked for, the content
    of an existing qcow2 file.
    """

    CREATE = "create"
    REPLACE = "replace"
    IN_PLACE = "in-place"


@dataclass(frozen=True, slots=True)
class Found:
    """A target as it is now. ``size`` is what it can hold, None where that does not limit it (a file to be made).

    ``identity`` holds model, serial, wwn and so on where the host knows them; ``users`` are readable, one for each
    use that forbids writing.
    """

    content: Content
    size: int | None = None
    what: str = ""
    identity: tuple[tuple[str, str], ...] = ()
    users: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, object]:
        return {"content": self.content.value, "size": self.size, "what": self.what, "identity": dict(self.identity),
                "users": list(self.users)}


@dataclass(frozen=True, slots=True)
class VolumePlan:
    """One volume on its way to its target. ``tree`` is the image to copy; ``revert`` says that it is T2's and has to
    be set back to T1 from the backup's COW stores; ``compare`` that the target is read and only differing chunks are
    written."""

    record: VolumeRecord
    target: Target
    found: Found
    writing: Writing
    tree: str
    revert: bool
    compare: bool = False

    @property
    def size(self) -> int:
        return self.record.size

    def as_dict(self) -> dict[str, object]:
        return {"id": self.record.id, "kind": self.record.kind.value, "size": self.size, "target": str(self.target),
                "target_kind": self.target.kind.value, "now": self.found.as_dict(), "write": self.writing.value,
                "revert": self.revert, "compare": self.compare}


@dataclass(frozen=True, slots=True)
class BlobPlan:
    """A small file of the domain: ``kind`` is ``nvram`` (one file at ``path``) or ``tpm`` (a directory at ``path``)."""

    kind: str
    blob: str
    path: str

    def as_dict(self) -> dict[str, object]:
        return {"kind": self.kind, "path": self.path}


@dataclass(frozen=True, slots=True)
class DomainPlan:
    """The domain that will be defined: ``xml`` is the whole definition."""

    name: str
    uuid: str
    macs: tuple[tuple[str, str], ...]
    attached: frozenset[str]
    xml: str

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, "uuid": self.uuid, "macs": [{"old": old, "new": new} for old, new in self.macs],
                "disks": sorted(self.attached), "xml": self.xml}


@dataclass(frozen=True, slots=True)
class Presentation:
    """A pass-through volume the guest reaches by its own means, so that no definition can give it to the guest:
    ``how`` tells a person what to do; ``facts`` holds what the backup knows of the guest's initiator."""

    volume: str
    target: str
    how: str
    facts: dict[str, object]

    def as_dict(self) -> dict[str, object]:
        return {"volume": self.volume, "target": self.target, "how": self.how, "guest": self.facts}


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """A restore, checked. ``problems`` are the reasons to refuse it: a plan that has any must not be executed.

    ``directories`` are those to be made, outermost first; ``left_out`` the ids of volumes that stay in the backup. A
    machine that no libvirt ran has a ``command`` instead of a ``domain``.
    """

    backup: str
    vm: str
    directory: str | None
    volumes: tuple[VolumePlan, ...]
    left_out: tuple[str, ...]
    directories: tuple[str, ...]
    blobs: tuple[BlobPlan, ...]
    domain: DomainPlan | None
    presentations: tuple[Presentation, ...]
    notes: tuple[str, ...]
    problems: tuple[str, ...]
    force: bool
    start: bool
    command: CommandPlan | None = None

    @property
    def size(self) -> int:
        """Bytes of all volumes that will be written."""
        return sum(volume.size for volume in self.volumes)

    @property
    def resources(self) -> tuple[str, ...]:
        """Names of what no other job may work on meanwhile: one for each target, whatever path leads to it."""
        return tuple("target:" + ":".join(map(str, place(volume.target))) for volume in self.volumes)

    def require_sound(self) -> None:
        """Raise ``TargetRefused`` with every problem at once: a person mends them in one go."""
        if self.problems:
            raise TargetRefused(f"VM {self.vm}: backup {self.backup} was not restored, nothing was written: "
                                + "; ".join(self.problems))

    def as_dict(self) -> dict[str, object]:
        domain = self.domain
        return {
            "backup": self.backup,
            "vm": self.vm,
            "name": domain.name if domain else None,
            "uuid": domain.uuid if domain else None,
            "directory": self.directory,
            "volumes": [volume.as_dict() for volume in self.volumes],
            "left_out": list(self.left_out),
            "directories": list(self.directories),
            "files": [blob.as_dict() for blob in self.blobs],
            "domain": domain.as_dict() if domain else None,
            "command": self.command.as_dict() if self.command else None,
            "present_to_guest": [entry.as_dict() for entry in self.presentations],
            "notes": list(self.notes),
            "problems": list(self.problems),
            "force": self.force,
            "start": self.start,
        }
