"""Values that cross layers: frozen, validated where they are made, without behaviour beyond their own data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class VolumeKind(StrEnum):
    """Whose block layer a guest's disk goes through."""

    VIRTUAL = "virtual"
    PASS_THROUGH = "pass-through"


class Method(StrEnum):
    """How a disk is brought to T1; ``PRE_COPY``: copied while the guest writes, what then differs is captured in the
    freeze; ``IMPORT``: it is a copy of an image file, whatever instant that shows."""

    GUEST_SNAPSHOT = "guest-snapshot"
    FREEZE_WINDOW = "freeze-window"
    PRE_COPY = "pre-copy"
    IMPORT = "import"


class T2(StrEnum):
    """How the hypervisor holds a virtual disk still: an overlay file takes the guest's writes and is committed later,
    or QEMU serves the disk and copies away what the guest overwrites. ``AUTO`` is a wish: what suits the disk."""

    AUTO = "auto"
    EXTERNAL = "external"
    FLEECE = "fleece"


class Change(StrEnum):
    """How a backup found out what it had to read of a disk: everything, what a tracker in the guest or QEMU's dirty
    bitmap marked, what two states of a thin pool tell, or what differed by hashes that the guest computed."""

    FULL = "full"
    TRACKED = "tracked"
    BITMAP = "bitmap"
    THIN_DELTA = "thin-delta"
    HASHED = "hashed"


class Consistency(StrEnum):
    """What the captured instant means to the guest: hooks ran and filesystems were frozen, filesystems were frozen,
    or as after a power cut."""

    APPLICATION = "application"
    FILESYSTEM = "filesystem"
    CRASH = "crash"


class RevertMode(StrEnum):
    """When the T2 images are set back to T1. ``BOTH`` reverts at backup time and keeps what a later revert needs."""

    BACKUP = "backup"
    RESTORE = "restore"
    BOTH = "both"


class JobState(StrEnum):
    """The life of a job; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


@dataclass(frozen=True, slots=True)
class Extent:
    """``length`` bytes from byte ``start``."""

    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class Segment:
    """``length`` bytes of a volume from ``volume_offset``, lying on disk ``disk`` (its id) from ``disk_offset``."""

    volume_offset: int
    disk: str
    disk_offset: int
    length: int


@dataclass(frozen=True, slots=True)
class VolumeMap:
    """A volume snapshotted in the guest: where each of its bytes lies, and where its COW store lies on the scratch
    disk.

    ``store_offset`` and ``store_length`` are bytes on the scratch disk; segments are sorted, adjacent and cover
    ``size``. ``exceptions`` is the number of chunks its COW store held at T2.
    """

    name: str
    size: int
    store_offset: int
    store_length: int
    segments: tuple[Segment, ...]
    exceptions: int = 0


@dataclass(frozen=True, slots=True)
class ChangeRecord:
    """What of a disk was read, and why that was enough.

    ``base`` is the backup whose image this one began as, None where everything was read. ``reason`` tells why no better
    way was open, empty if there is none. ``chunks`` were read because they had changed (or might have), ``audited``
    although they were said to be unchanged; ``missed`` of those had changed all the same, and then everything was read.
    ``token`` is what the next backup knows the changes since this one by: a tracker's generation, a checkpoint's name;
    ``moment`` what thin pools below the disk will be asked for changes since, empty where there are none.
    """

    method: Change = Change.FULL
    base: str | None = None
    reason: str = ""
    chunks: int = 0
    audited: int = 0
    missed: int = 0
    token: str | None = None
    moment: str = ""


@dataclass(frozen=True, slots=True)
class VolumeRecord:
    """One captured disk as a backup's manifest keeps it.

    ``id`` is the name users give it by: a libvirt target (``vda``) for a virtual disk, ``wwn:...``, ``serial:...`` or
    ``iscsi:IQN/LUN`` for a pass-through disk. ``tree`` is the image at T1 (None in a backup that is reverted at
    restore time), ``t2_tree`` the image at T2 where kept. Sizes in bytes.
    """

    id: str
    kind: VolumeKind
    method: Method
    consistency: Consistency
    size: int
    tree: str | None
    t2_tree: str | None = None
    bytes_read: int = 0
    bytes_stored: int = 0
    reverted_chunks: int = 0
    details: dict[str, object] = field(default_factory=dict)
    change: ChangeRecord = field(default_factory=ChangeRecord)


@dataclass(frozen=True, slots=True)
class CoverageRecord:
    """What became of one block device of the guest: ``decision`` is ``captured``, ``excluded`` (it cannot hold what a
    restore needs) or ``allowed`` (it could not be captured, and was allowed by name to be missing)."""

    id: str
    device: str
    kind: VolumeKind
    size: int
    method: Method | None
    decision: str
    reason: str
