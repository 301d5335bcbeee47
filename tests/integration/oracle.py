"""Judges a restored set of disks: what the writer's logs say, and what e2fsck says. Uses nothing of the project's
code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab import volumes, writer
from tests.lab.guest import LOGS

LOGICAL = {
    "data": "vgdata/data",
    "iscsi": "vgiscsi/iscsi",
    "lun": "vglun/lun",
    "span": "vgspan/span",
    "root": "vgroot/root",
}


def as_raw(disks: Mapping[str, Path], scratch: Path) -> dict[str, Path]:
    """Raw copies of ``disks`` (volume id -> image file) in ``scratch``; raw images are taken as they are."""
    scratch.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, path in disks.items():
        with path.open("rb") as image:
            qcow2 = image.read(4) == b"QFI\xfb"
        found[name] = volumes.to_raw(path, scratch / f"{len(found)}.raw") if qcow2 else path
    return found


def filesystems(raw: Mapping[str, Path], scratch: Path) -> dict[str, Path]:
    """Volume (root, data, iscsi, lun, span) -> raw file of its ext4, taken out of the raw disks."""
    logical = volumes.logical_volumes(raw.values())
    found = {}
    for name, path in LOGICAL.items():
        if path in logical:
            found[name] = logical[path].extract(scratch / f"{name}.ext4")
    if "root" not in found:
        found["root"] = raw["vda"]
    return found


def logs(images: Mapping[str, Path], more: Sequence[str] = ()) -> dict[str, writer.Log]:
    """Volume -> what its log says, in the order in which the writer writes them, ``more`` after those of every guest.
    Nothing may be torn, and each churn file must be exactly as its log says."""
    found = {}
    for index, (name, path) in enumerate([*LOGS.items(), *((name, "/log") for name in more)]):
        if name in images:
            inside = path if name == "root" else "/log"
            log = writer.check(volumes.read_file(images[name], inside), index)
            assert not log.torn, f"{name}: torn after record {log.last}"
            writer.check_churn(volumes.read_file(images[name], inside + ".churn"), log.last)
            found[name] = log
    return found


def judge(
    disks: Mapping[str, Path], scratch: Path, plain: Mapping[str, str] | None = None
) -> dict[str, writer.Log]:
    """Assert that ``disks`` are at one instant: logs within one record, none torn, filesystems clean without a
    replay. ``plain``: name of a log -> id of the disk that is its filesystem as a whole."""
    raw = as_raw(disks, scratch)
    more = {name: raw[ident] for name, ident in (plain or {}).items()}
    images = filesystems(raw, scratch) | more
    assert set(images) == {*LOGS, *more}
    for name, image in images.items():
        assert not volumes.needs_recovery(image), f"{name} was not frozen at T1"
        volumes.check_filesystem(image)
    found = logs(images, tuple(more))
    writer.check_together(found)
    return found
