"""The manifest: everything about one backup that is not the bytes of its images. Written last; it makes the backup."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from vmbackupd.errors import InvalidArgument, RepositoryCorrupt
from vmbackupd.model import (
    Change,
    ChangeRecord,
    Consistency,
    CoverageRecord,
    Method,
    RevertMode,
    Segment,
    VolumeKind,
    VolumeMap,
    VolumeRecord,
)
from vmbackupd.typed import get_float, get_int, get_list, get_object, get_objects, get_str, key_path

VERSION = 1
MAX_BYTES = 64 * 2**20

BACKUP_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
TREE_ID = re.compile(r"[0-9a-f]{64}")

JsonObject = dict[str, Any]
E = TypeVar("E", VolumeKind, Method, Consistency, RevertMode, Change)


@dataclass(frozen=True, slots=True)
class VmIdentity:
    """The VM as libvirt knew it."""

    name: str
    uuid: str


@dataclass(frozen=True, slots=True)
class StoreRecord:
    """The image that holds the COW stores (the scratch disk at T2), for a revert at restore time. ``size`` in bytes."""

    tree: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """One backup. Times are seconds since 1970; ``freeze_ms`` is from sending the freeze to the confirmed thaw.

    ``config`` maps ``domain.xml``, ``domain-inactive.xml``, ``nvram``, ``tpm`` to blob ids. ``store`` and
    ``volume_maps`` are there if the images can be, or have to be, reverted at restore time. ``writer`` is set when it
    is published.
    """

    id: str
    vm: VmIdentity
    created: float
    t1: float
    t2: float
    freeze_ms: float
    revert: RevertMode
    volumes: tuple[VolumeRecord, ...]
    store: StoreRecord | None = None
    volume_maps: tuple[VolumeMap, ...] = ()
    coverage: tuple[CoverageRecord, ...] = ()
    config: dict[str, str] = field(default_factory=dict)
    guest: dict[str, object] = field(default_factory=dict)
    tool_version: str = ""
    writer: str = ""
    version: int = VERSION

    def trees(self) -> list[str]:
        """The ids of every tree this backup needs: images, store, blobs."""
        images = [tree for volume in self.volumes for tree in (volume.tree, volume.t2_tree) if tree is not None]
        store = [self.store.tree] if self.store is not None else []
        return [*images, *store, *self.config.values()]

    def to_json(self) -> JsonObject:
        """The manifest as a JSON object; what ``show --json`` prints."""
        return {
            "version": self.version,
            "id": self.id,
            "vm": {"name": self.vm.name, "uuid": self.vm.uuid},
            "created": self.created,
            "t1": self.t1,
            "t2": self.t2,
            "freeze_ms": self.freeze_ms,
            "revert": self.revert.value,
            "volumes": [_volume_to_json(volume) for volume in self.volumes],
            "store": {"tree": self.store.tree, "size": self.store.size} if self.store is not None else None,
            "volume_maps": [_map_to_json(item) for item in self.volume_maps],
            "coverage": [_coverage_to_json(item) for item in self.coverage],
            "config": dict(self.config),
            "guest": dict(self.guest),
            "tool_version": self.tool_version,
            "writer": self.writer,
        }

    @classmethod
    def from_json(cls, obj: JsonObject, *, at: str = "", error: type[Exception] = RepositoryCorrupt) -> Manifest:
        """The manifest in a JSON object; ``error`` names the key (below ``at``) if a field is missing or impossible."""
        version = get_int(obj, "version", at=at, error=error)
        if version != VERSION:
            raise error(f"{key_path(at, 'version')}: manifest version {version}, this program reads {VERSION}")
        vm = get_object(obj, "vm", at=at, error=error)
        store = get_object(obj, "store", None, at=at, error=error)
        config = get_object(obj, "config", at=at, error=error)
        config_at = key_path(at, "config")
        return cls(
            id=_matching(obj, "id", BACKUP_ID, "a backup id", at, error),
            vm=VmIdentity(
                get_str(vm, "name", max_length=1024, at=key_path(at, "vm"), error=error),
                get_str(vm, "uuid", max_length=64, at=key_path(at, "vm"), error=error),
            ),
            created=get_float(obj, "created", at=at, error=error),
            t1=get_float(obj, "t1", at=at, error=error),
            t2=get_float(obj, "t2", at=at, error=error),
            freeze_ms=get_float(obj, "freeze_ms", at=at, error=error),
            revert=_enum(RevertMode, obj, "revert", at, error),
            volumes=tuple(
                _volume_from_json(item, path, error) for path, item in get_objects(obj, "volumes", at=at, error=error)
            ),
            store=None
            if store is None
            else StoreRecord(
                _tree(store, "tree", key_path(at, "store"), error),
                get_int(store, "size", at=key_path(at, "store"), error=error),
            ),
            volume_maps=tuple(
                _map_from_json(item, path, error) for path, item in get_objects(obj, "volume_maps", at=at, error=error)
            ),
            coverage=tuple(
                _coverage_from_json(item, path, error)
                for path, item in get_objects(obj, "coverage", at=at, error=error)
            ),
            config={key: _tree(config, key, config_at, error) for key in config},
            guest=get_object(obj, "guest", at=at, error=error),
            tool_version=get_str(obj, "tool_version", max_length=256, at=at, error=error),
            writer=get_str(obj, "writer", max_length=64, at=at, error=error),
        )

    def encode(self) -> bytes:
        """Canonical JSON: keys sorted, no spaces, UTF-8. InvalidArgument if it could not be read back."""
        try:
            data = json.dumps(
                self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
            ).encode()
        except (TypeError, ValueError) as reason:
            raise InvalidArgument(f"manifest {self.id}: {reason}") from reason
        Manifest.from_json(json.loads(data), at=f"manifest {self.id}", error=InvalidArgument)
        if len(data) > MAX_BYTES:
            raise InvalidArgument(f"manifest {self.id} has {len(data)} bytes, at most {MAX_BYTES} can be stored")
        return data


@dataclass(frozen=True, slots=True)
class BackupSummary:
    """One line of a listing. ``error`` tells why a manifest cannot be read; the other fields are then empty.

    ``size``: bytes of all volumes; ``bytes_stored``: what this backup added to the repository; ``uncovered``: devices
    that were allowed to be missing.
    """

    id: str
    vm_name: str = ""
    vm_uuid: str = ""
    created: float = 0.0
    t1: float = 0.0
    t2: float = 0.0
    freeze_ms: float = 0.0
    volumes: int = 0
    size: int = 0
    bytes_stored: int = 0
    uncovered: tuple[str, ...] = ()
    error: str | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> BackupSummary:
        """The line for this manifest."""
        return cls(
            id=manifest.id,
            vm_name=manifest.vm.name,
            vm_uuid=manifest.vm.uuid,
            created=manifest.created,
            t1=manifest.t1,
            t2=manifest.t2,
            freeze_ms=manifest.freeze_ms,
            volumes=len(manifest.volumes),
            size=sum(volume.size for volume in manifest.volumes),
            bytes_stored=sum(volume.bytes_stored for volume in manifest.volumes),
            uncovered=tuple(item.id for item in manifest.coverage if item.decision == "allowed"),
        )

    def to_json(self) -> JsonObject:
        """The line as a JSON object; ``list --json`` prints a list of these."""
        return {
            "id": self.id,
            "vm": {"name": self.vm_name, "uuid": self.vm_uuid},
            "created": self.created,
            "t1": self.t1,
            "t2": self.t2,
            "freeze_ms": self.freeze_ms,
            "volumes": self.volumes,
            "size": self.size,
            "bytes_stored": self.bytes_stored,
            "uncovered": list(self.uncovered),
            "error": self.error,
        }


# ---- parts


def _volume_to_json(volume: VolumeRecord) -> JsonObject:
    return {
        "id": volume.id,
        "kind": volume.kind.value,
        "method": volume.method.value,
        "consistency": volume.consistency.value,
        "size": volume.size,
        "tree": volume.tree,
        "t2_tree": volume.t2_tree,
        "bytes_read": volume.bytes_read,
        "bytes_stored": volume.bytes_stored,
        "reverted_chunks": volume.reverted_chunks,
        "details": dict(volume.details),
        "change": {**asdict(volume.change), "method": volume.change.method.value},
    }


def _volume_from_json(obj: JsonObject, at: str, error: type[Exception]) -> VolumeRecord:
    return VolumeRecord(
        id=get_str(obj, "id", min_length=1, max_length=4096, at=at, error=error),
        kind=_enum(VolumeKind, obj, "kind", at, error),
        method=_enum(Method, obj, "method", at, error),
        consistency=_enum(Consistency, obj, "consistency", at, error),
        size=get_int(obj, "size", at=at, error=error),
        tree=None if obj.get("tree") is None else _tree(obj, "tree", at, error),
        t2_tree=None if obj.get("t2_tree") is None else _tree(obj, "t2_tree", at, error),
        bytes_read=get_int(obj, "bytes_read", at=at, error=error),
        bytes_stored=get_int(obj, "bytes_stored", at=at, error=error),
        reverted_chunks=get_int(obj, "reverted_chunks", at=at, error=error),
        details=get_object(obj, "details", at=at, error=error),
        change=_change_from_json(get_object(obj, "change", None, at=at, error=error), key_path(at, "change"), error),
    )


def _change_from_json(obj: JsonObject | None, at: str, error: type[Exception]) -> ChangeRecord:
    if obj is None:  # written before there were increments
        return ChangeRecord()
    return ChangeRecord(
        method=_enum(Change, obj, "method", at, error),
        base=get_str(obj, "base", None, min_length=1, max_length=256, at=at, error=error),
        reason=get_str(obj, "reason", max_length=4096, at=at, error=error),
        chunks=get_int(obj, "chunks", at=at, error=error),
        audited=get_int(obj, "audited", at=at, error=error),
        missed=get_int(obj, "missed", at=at, error=error),
        token=get_str(obj, "token", None, min_length=1, max_length=256, at=at, error=error),
        moment=get_str(obj, "moment", "", max_length=4096, at=at, error=error),
    )


def _coverage_to_json(item: CoverageRecord) -> JsonObject:
    return {
        "id": item.id,
        "device": item.device,
        "kind": item.kind.value,
        "size": item.size,
        "method": None if item.method is None else item.method.value,
        "decision": item.decision,
        "reason": item.reason,
    }


def _coverage_from_json(obj: JsonObject, at: str, error: type[Exception]) -> CoverageRecord:
    return CoverageRecord(
        id=get_str(obj, "id", max_length=4096, at=at, error=error),
        device=get_str(obj, "device", max_length=4096, at=at, error=error),
        kind=_enum(VolumeKind, obj, "kind", at, error),
        size=get_int(obj, "size", at=at, error=error),
        method=None if obj.get("method") is None else _enum(Method, obj, "method", at, error),
        decision=get_str(obj, "decision", at=at, error=error),
        reason=get_str(obj, "reason", at=at, error=error),
    )


def _map_to_json(item: VolumeMap) -> JsonObject:
    return {
        "name": item.name,
        "size": item.size,
        "store_offset": item.store_offset,
        "store_length": item.store_length,
        "exceptions": item.exceptions,
        # volume offset, disk, disk offset, length
        "segments": [[part.volume_offset, part.disk, part.disk_offset, part.length] for part in item.segments],
    }


def _map_from_json(obj: JsonObject, at: str, error: type[Exception]) -> VolumeMap:
    segments = []
    end = 0
    for number, item in enumerate(get_list(obj, "segments", max_length=2**20, at=at, error=error)):
        path = key_path(at, f"segments[{number}]")
        if not isinstance(item, list) or len(item) != 4:
            raise error(f"{path}: expected [volume offset, disk, disk offset, length]")
        fields = dict(zip(("volume_offset", "disk", "disk_offset", "length"), item, strict=True))
        segment = Segment(
            get_int(fields, "volume_offset", at=path, error=error),
            get_str(fields, "disk", min_length=1, max_length=4096, at=path, error=error),
            get_int(fields, "disk_offset", at=path, error=error),
            get_int(fields, "length", minimum=1, at=path, error=error),
        )
        if segment.volume_offset != end:
            raise error(f"{path}.volume_offset: expected {end}, where the segment before ends")
        end += segment.length
        segments.append(segment)
    size = get_int(obj, "size", at=at, error=error)
    if end != size:
        raise error(f"{key_path(at, 'segments')}: they cover {end} bytes of a volume of {size}")
    return VolumeMap(
        name=get_str(obj, "name", max_length=4096, at=at, error=error),
        size=size,
        store_offset=get_int(obj, "store_offset", at=at, error=error),
        store_length=get_int(obj, "store_length", at=at, error=error),
        segments=tuple(segments),
        exceptions=get_int(obj, "exceptions", at=at, error=error),
    )


def _enum(kind: type[E], obj: JsonObject, key: str, at: str, error: type[Exception]) -> E:
    text = get_str(obj, key, max_length=64, at=at, error=error)
    try:
        return kind(text)
    except ValueError:
        raise error(f"{key_path(at, key)}: expected one of {', '.join(kind)}, got {text!r}") from None


def _matching(obj: JsonObject, key: str, pattern: re.Pattern[str], what: str, at: str, error: type[Exception]) -> str:
    text = get_str(obj, key, max_length=256, at=at, error=error)
    if not pattern.fullmatch(text):
        raise error(f"{key_path(at, key)}: {text!r} is not {what}")
    return text


def _tree(obj: JsonObject, key: str, at: str, error: type[Exception]) -> str:
    return _matching(obj, key, TREE_ID, "a tree id (64 hexadecimal digits)", at, error)
