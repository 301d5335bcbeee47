"""What a caller may ask of a backup and of a restore, checked where it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vmbackupd.errors import InvalidArgument
from vmbackupd.model import RevertMode


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """``allow_uncovered`` names volumes that may stay out of the backup; ``freeze_budget`` is in seconds, None takes
    the configured one."""

    revert: RevertMode = RevertMode.BACKUP
    allow_uncovered: tuple[str, ...] = ()
    freeze_budget: float | None = None

    def __post_init__(self) -> None:
        budget = self.freeze_budget
        if budget is not None and not (math.isfinite(budget) and budget > 0):
            raise InvalidArgument(f"freeze_budget must be a number of seconds above zero, not {budget}")
        if not all(self.allow_uncovered):
            raise InvalidArgument("allow_uncovered holds an empty name")


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """Where a backup goes: ``name`` of the new domain, ``directory`` for its virtual disks, ``volumes`` from volume
    id to target (file, block device, ``iscsi://PORTAL/IQN/LUN``, or ``none`` to leave it in the backup). ``revert``
    None does what the backup needs. ``in_place`` reads a target that holds data and writes only what differs."""

    name: str | None = None
    directory: str | None = None
    volumes: Mapping[str, str] = field(default_factory=dict)
    dry_run: bool = False
    force: bool = False
    start: bool = False
    revert: RevertMode | None = None
    in_place: bool = False

    def __post_init__(self) -> None:
        if self.name is not None and (not self.name.strip() or "/" in self.name or self.name in (".", "..")):
            raise InvalidArgument(f"{self.name!r} is no name for a domain")
        if self.directory is not None and not self.directory.startswith("/"):
            raise InvalidArgument(f"the directory of a restore must be an absolute path, not {self.directory!r}")
        for volume, target in self.volumes.items():
            if not volume or not (target == "none" or target.startswith("/") or "://" in target):
                raise InvalidArgument(
                    f"the target of volume {volume!r} must be an absolute path, a URL or none, not {target!r}"
                )
        if self.revert is RevertMode.BOTH:
            raise InvalidArgument("a restore reverts, or uses what was reverted at backup time: not both")
        if self.dry_run and self.start:
            raise InvalidArgument("a dry run starts nothing: give one of dry_run and start")
