"""QEMU's dirty bitmaps as it tells of them (qemu: qapi/block-core.json, BlockDirtyInfo), and what they are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vmbackupd.hypervisor.base import BITMAP_PREFIX, bitmap_name


@dataclass(frozen=True, slots=True)
class Bitmap:
    """One dirty bitmap of a node. ``persistent``: it is kept in the image when QEMU closes that."""

    recording: bool
    persistent: bool
    inconsistent: bool
    busy: bool


def bitmaps_of(node: Mapping[str, Any]) -> dict[str, Bitmap]:
    """The bitmaps of a BlockDeviceInfo by name."""
    return {str(item["name"]): Bitmap(bool(item["recording"]), bool(item["persistent"]),
                                      bool(item.get("inconsistent", False)), bool(item["busy"]))
            for item in node.get("dirty-bitmaps", ()) if "name" in item}


def loss(bitmaps: Mapping[str, Bitmap], checkpoint: str, target: str) -> str | None:
    """Why the bitmap of a disk does not tell all that was written since it began, in words; None when it does."""
    bitmap = bitmaps.get(bitmap_name(checkpoint, target))
    if bitmap is None:
        moved = next((other for other in bitmaps if other.startswith(BITMAP_PREFIX)), None)
        return ("its dirty bitmap is missing" if moved is None or moved.endswith(f".{target}") else
                f"its image was another disk's when the recording began (it has the bitmap {moved})")
    if bitmap.inconsistent:
        return "its dirty bitmap is inconsistent: QEMU did not end cleanly while it recorded"
    if not bitmap.recording:
        return "somebody stopped the recording of its dirty bitmap"
    if bitmap.busy:
        return "its dirty bitmap is in use by another job"
    return None


def checkpoints_among(bitmaps: Iterable[str]) -> set[str]:
    """The checkpoints of ours that bitmaps of these names belong to."""
    return {name.rpartition(".")[0] or name for name in bitmaps if name.startswith(BITMAP_PREFIX)}
