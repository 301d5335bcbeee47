"""Boots what a backup holds: everything restored, the pass-through volumes to new LUNs of the lab."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.integration.service import Service
from tests.lab import Lab
from tests.lab.guest import Guest


def boot_on_new_luns(
    lab: Lab, service: Service, guest: Guest, shown: dict[str, Any], directory: Path, name: str | None = None
) -> Guest:
    """Restore the backup that ``shown`` describes, of a lab guest, and boot it beside the original."""
    name = name or f"{guest.name}-booted"
    volumes = sorted((volume for volume in shown["volumes"] if volume["kind"] == "pass-through"), key=lambda v: v["id"])
    luns = {
        volume["id"]: lab.iscsi.create_lun(
            f"{name}-{number}",
            size=volume["size"],
            target=f"{name}-{'guest' if volume['id'].startswith('iscsi') else 'lun'}",
        )
        for number, volume in enumerate(volumes)
    }
    words = [word for ident, lun in luns.items() for word in ("--volume", f"{ident}={lun.uri}")]
    service.ctl("restore", shown["id"], "--name", name, "--to", str(directory), *words)
    booted = lab.boot_restored(name, iqns=[next(lun.iqn for ident, lun in luns.items() if ident.startswith("iscsi"))])
    booted.luns = luns
    return booted
