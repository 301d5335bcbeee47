"""What the state of a machine in a backup tells of its images (``qemu-state.json``, see ``description.py``). Pure."""

from __future__ import annotations

import json

from vmbackupd.hypervisor.qmp.blocks import Image, drives, nodes, understood
from vmbackupd.hypervisor.qmp.disks import is_flash_path, target_of


def stored_images(state: str) -> tuple[dict[str, Image], str | None]:
    """The active image of each disk by target, and the file of the UEFI variables. Raises ``HypervisorError``."""
    with understood("the queries in the backup"):
        answers = json.loads(state)
        found = nodes(answers["query-named-block-nodes"])
        images: dict[str, Image] = {}
        flash = None
        for drive in drives(answers["query-block"]):
            top = found[drive.node] if drive.node is not None else None
            if top is None:
                continue
            if is_flash_path(drive.qdev):
                flash = flash if top.read_only else top.images[0].file
            else:
                images[target_of(drive)] = top.images[0]
        return images, flash
