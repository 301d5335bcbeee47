"""How large the COW stores are made."""

from __future__ import annotations

from collections.abc import Mapping

from vmbackupd.units import round_down

MINIMUM = 8  # chunks: header, one metadata area, some data


def full_size(volume: int, chunk: int) -> int:
    """Bytes of a store that holds every chunk of a volume of ``volume`` bytes.

    The store has a header chunk, and a metadata chunk for every ``chunk / 16`` exceptions plus the one that is
    zeroed ahead (Linux drivers/md/dm-snap-persistent.c, and lib/metadata/snapshot_manip.c of LVM2 for the bound).
    """
    chunks = -(-volume // chunk)
    per_area = chunk // 16
    return (1 + chunks + (chunks + per_area) // per_area + 1) * chunk


def sizes(volumes: Mapping[str, int], chunk: int, *, share: float = 1.0, limit: int | None = None) -> dict[str, int]:
    """Bytes of each volume's store: room for ``share`` of a complete rewrite, all together at most ``limit``.

    The scratch disk is thin: what is not written takes no room on the host.
    """
    full = {name: full_size(size, chunk) for name, size in volumes.items()}
    total = sum(full.values())
    if limit is not None:
        share = min(share, limit / total)
    if share >= 1.0:
        return full
    return {name: max(MINIMUM * chunk, round_down(int(size * share), chunk)) for name, size in full.items()}
