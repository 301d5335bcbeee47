"""What the helper answers to its other methods, checked: it may be anybody who answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vmbackupd.errors import GuestProtocolError
from vmbackupd.guest.report import DmTarget, parse_devno, parse_table
from vmbackupd.typed import get_bool, get_float, get_int, get_objects, get_str
from vmbackupd.units import SECTOR

_ERROR = GuestProtocolError
_MAX_VOLUMES = 512
_MAX_DISKS = 1024
_MAX_CHUNKS = 1 << 40
MAX_MOMENT = 4096
"""Characters of ``ThinState.moment``."""
_MAX_NAME = 128
_MAX_REASON = 1000


@dataclass(frozen=True, slots=True)
class Identity:
    """The helper that answered and the system it runs in."""

    helper: str
    boot_id: str
    kernel: str
    python: str
    pid: int


@dataclass(frozen=True, slots=True)
class PreparedVolume:
    """A volume ready to be snapshotted. ``device`` is ``major:minor``; its store lies on the scratch disk at
    ``store_offset`` (bytes); ``table`` is the volume's own."""

    device: str
    name: str
    size: int
    store_offset: int
    store_length: int
    table: tuple[DmTarget, ...]


@dataclass(frozen=True, slots=True)
class SnapResult:
    """``t1`` is when all volumes stood still (the guest's clock, seconds since 1970)."""

    t1: float
    suspend_ms: float
    resume_ms: float


@dataclass(frozen=True, slots=True)
class CapturedDisk:
    """What a capture found of a disk: how many chunks were marked, and the bytes of those that no snapshot keeps."""

    device: str
    chunks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CaptureResult:
    """``t1`` is when the last of ``passes`` found the disks at rest (the guest's clock, seconds since 1970)."""

    t1: float
    passes: int
    disks: tuple[CapturedDisk, ...]


@dataclass(frozen=True, slots=True)
class TouchedPool:
    """A thin pool: whether it writes to new blocks from now on, or why not."""

    name: str
    touched: bool
    reason: str


@dataclass(frozen=True, slots=True)
class ThinState:
    """A disk below thin pools at T1. ``moment`` is what to say at the next backup, empty where nothing can be told;
    ``known`` whether it is known what changed since the moment that was given, else ``reason`` says why not."""

    device: str
    moment: str
    known: bool
    reason: str


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """A snapshot now: whether it holds, whether nobody touched the tables, and the fill of its store in sectors."""

    device: str
    valid: bool
    allocated: int
    total: int
    metadata: int
    table_ok: bool


@dataclass(frozen=True, slots=True)
class HelperStatus:
    """All snapshots of the job, and the boot they live in."""

    boot_id: str
    volumes: tuple[VolumeStatus, ...]


@dataclass(frozen=True, slots=True)
class TrackedDisk:
    """Whether the changes of a disk are tracked, and since which backup all are known (``generation``; None: not yet).

    ``reason`` says why they are not tracked, or not known; it is empty where there is a generation.
    """

    device: str
    tracking: bool
    generation: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Collected:
    """Chunks of a disk that changed since it was collected before, ``seconds`` ago. ``reason``: why all chunks count
    as changed; empty when they do not."""

    chunks: int
    seconds: float
    reason: str


def parse_identity(obj: Mapping[str, object]) -> Identity:
    return Identity(
        helper=get_str(obj, "helper", max_length=64, error=_ERROR),
        boot_id=get_str(obj, "boot_id", min_length=1, max_length=64, error=_ERROR),
        kernel=get_str(obj, "kernel", max_length=128, error=_ERROR),
        python=get_str(obj, "python", max_length=64, error=_ERROR),
        pid=get_int(obj, "pid", maximum=2**32, error=_ERROR),
    )


def parse_prepared(obj: Mapping[str, object], asked: Mapping[str, int]) -> list[PreparedVolume]:
    """One volume for each asked one, in the order asked, with the stores asked for, side by side from byte 0."""
    volumes = [_prepared(item, at) for at, item in get_objects(obj, "volumes", max_length=_MAX_VOLUMES, error=_ERROR)]
    if [volume.device for volume in volumes] != list(asked):
        raise _ERROR("volumes: not the ones that were to be prepared")
    offset = 0
    for volume in volumes:
        if (volume.store_offset, volume.store_length) != (offset, asked[volume.device]):
            raise _ERROR(f"volumes: the store of {volume.name} is not where and as large as it was asked for")
        offset += volume.store_length
    return volumes


def parse_snap(obj: Mapping[str, object]) -> SnapResult:
    return SnapResult(
        t1=get_float(obj, "t1", error=_ERROR),
        suspend_ms=get_float(obj, "suspend_ms", error=_ERROR),
        resume_ms=get_float(obj, "resume_ms", error=_ERROR),
    )


def parse_capture(obj: Mapping[str, object], asked: Sequence[str]) -> CaptureResult:
    """One disk for each asked one, in any order."""
    disks = tuple(_captured(item, at) for at, item in get_objects(obj, "disks", max_length=_MAX_DISKS, error=_ERROR))
    if sorted(disk.device for disk in disks) != sorted(asked):
        raise _ERROR("disks: not the ones that were to be captured")
    return CaptureResult(
        t1=get_float(obj, "t1", error=_ERROR), passes=get_int(obj, "passes", minimum=1, error=_ERROR), disks=disks
    )


def parse_touched(obj: Mapping[str, object]) -> list[TouchedPool]:
    return [
        TouchedPool(
            name=get_str(item, "name", max_length=_MAX_NAME, at=at, error=_ERROR),
            touched=get_bool(item, "touched", at=at, error=_ERROR),
            reason=get_str(item, "reason", max_length=1000, at=at, error=_ERROR),
        )
        for at, item in get_objects(obj, "pools", max_length=_MAX_VOLUMES, error=_ERROR)
    ]


def parse_compared(obj: Mapping[str, object], asked: Mapping[str, str]) -> list[ThinState]:
    """One for each disk asked for, in that order."""
    states = [
        ThinState(
            device=parse_devno(item, "device", at),
            moment=get_str(item, "moment", max_length=MAX_MOMENT, at=at, error=_ERROR),
            known=get_bool(item, "known", at=at, error=_ERROR),
            reason=get_str(item, "reason", max_length=1000, at=at, error=_ERROR),
        )
        for at, item in get_objects(obj, "disks", max_length=_MAX_DISKS, error=_ERROR)
    ]
    if [state.device for state in states] != list(asked):
        raise _ERROR("disks: not the ones that were to be compared")
    return states


def parse_status(obj: Mapping[str, object]) -> HelperStatus:
    items = get_objects(obj, "volumes", max_length=_MAX_VOLUMES, error=_ERROR)
    volumes = tuple(_status(item, at) for at, item in items)
    if len({volume.device for volume in volumes}) != len(volumes):
        raise _ERROR("volumes: two of the same device")
    return HelperStatus(get_str(obj, "boot_id", min_length=1, max_length=64, error=_ERROR), volumes)


def parse_tracked(obj: Mapping[str, object], asked: Collection[str]) -> list[TrackedDisk]:
    """One answer for each asked device, in the order asked."""
    disks = [_tracked(item, at) for at, item in get_objects(obj, "disks", max_length=len(asked), error=_ERROR)]
    if [disk.device for disk in disks] != list(asked):
        raise _ERROR("disks: not the ones that were to be tracked")
    return disks


def parse_collected(obj: Mapping[str, object]) -> Collected:
    return Collected(
        chunks=get_int(obj, "chunks", maximum=_MAX_CHUNKS, error=_ERROR),
        seconds=get_float(obj, "seconds", error=_ERROR),
        reason=get_str(obj, "reason", max_length=_MAX_REASON, error=_ERROR),
    )


def _tracked(obj: dict[str, Any], at: str) -> TrackedDisk:
    disk = TrackedDisk(
        device=parse_devno(obj, "device", at),
        tracking=get_bool(obj, "tracking", at=at, error=_ERROR),
        generation=get_str(obj, "generation", None, min_length=1, max_length=255, at=at, error=_ERROR),
        reason=get_str(obj, "reason", max_length=_MAX_REASON, at=at, error=_ERROR),
    )
    if disk.generation is not None and not disk.tracking:
        raise _ERROR(f"{at}: {disk.device} has a generation and is not tracked")
    return disk


def _prepared(obj: dict[str, Any], at: str) -> PreparedVolume:
    volume = PreparedVolume(
        device=parse_devno(obj, "device", at),
        name=get_str(obj, "name", min_length=1, max_length=_MAX_NAME, at=at, error=_ERROR),
        size=get_int(obj, "size", minimum=SECTOR, at=at, error=_ERROR),
        store_offset=get_int(obj, "store_offset", at=at, error=_ERROR),
        store_length=get_int(obj, "store_length", minimum=1, at=at, error=_ERROR),
        table=parse_table(obj, "table", at),
    )
    if sum(row.length for row in volume.table) * SECTOR != volume.size:
        raise _ERROR(f"{at}: the table of {volume.name} does not have its size")
    return volume


def _captured(obj: dict[str, Any], at: str) -> CapturedDisk:
    return CapturedDisk(
        device=parse_devno(obj, "device", at),
        chunks=get_int(obj, "chunks", maximum=_MAX_CHUNKS, at=at, error=_ERROR),
        bytes=get_int(obj, "bytes", at=at, error=_ERROR),
    )


def _status(obj: dict[str, Any], at: str) -> VolumeStatus:
    return VolumeStatus(
        device=parse_devno(obj, "device", at),
        valid=get_bool(obj, "valid", at=at, error=_ERROR),
        allocated=get_int(obj, "allocated", at=at, error=_ERROR),
        total=get_int(obj, "total", at=at, error=_ERROR),
        metadata=get_int(obj, "metadata", at=at, error=_ERROR),
        table_ok=get_bool(obj, "table_ok", at=at, error=_ERROR),
    )
