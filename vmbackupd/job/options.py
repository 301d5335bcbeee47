"""What a caller may ask of a job, checked where it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vmbackupd.errors import InvalidArgument
from vmbackupd.model import T2, RevertMode


@dataclass(frozen=True, slots=True)
class BackupOptions:
    """``allow_uncovered`` names volumes that may stay out of the backup; ``freeze_budget`` is in seconds, None takes
    the configured one; ``full`` reads every disk whole, whatever is known of it; ``t2`` None takes the configured
    kind of the second snapshot."""

    revert: RevertMode = RevertMode.BACKUP
    allow_uncovered: tuple[str, ...] = ()
    freeze_budget: float | None = None
    full: bool = False
    t2: T2 | None = None

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


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """``keep`` counts by rule (``keep_last``, ``keep_daily``, ...); without any the configured ones are meant."""

    keep: Mapping[str, int] = field(default_factory=dict)
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class GcOptions:
    """``threshold`` is the share of a pack (0 to 1) that may be waste before it is packed anew, None the usual."""

    dry_run: bool = False
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise InvalidArgument(f"the threshold of a gc is a share from 0 to 1, not {self.threshold}")


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """``backups`` none is all; ``data`` reads every byte and not only the structure, at most ``rate`` bytes a second;
    ``restart`` forgets how far an earlier one came."""

    backups: tuple[str, ...] = ()
    data: bool = False
    rate: int | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        if not all(self.backups):
            raise InvalidArgument("a backup to verify has no name")
        if self.rate is not None and self.rate <= 0:
            raise InvalidArgument(f"the rate of a verify is a number of bytes a second above zero, not {self.rate}")
        if self.rate is not None and not self.data:
            raise InvalidArgument("a rate is for reading the data: give data as well")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """``format`` is ``raw`` or ``qcow2``, which alone can be compressed; ``force`` replaces a file that is there."""

    format: str = "raw"
    compress: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.format not in ("raw", "qcow2"):
            raise InvalidArgument(f"{self.format!r} is no format to export to: raw, qcow2")
        if self.compress and self.format != "qcow2":
            raise InvalidArgument("only qcow2 can be compressed: give the format qcow2 as well")


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """``format`` is what the image is, for example ``raw`` or ``qcow2``. None looks, and takes what is no image of a
    known format for raw, if the file's name does not speak against it. ``volume`` is the id it gets in the backup.
    ``allow_backing`` follows the names of backing files in it."""

    format: str | None = None
    volume: str = "vda"
    allow_backing: bool = False


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """``socket`` is the path of the unix socket to make, None for one of the daemon's own; root may connect, and the
    members of ``group`` where one is named."""

    socket: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        if self.socket is not None and (not self.socket.startswith("/") or "\0" in self.socket):
            raise InvalidArgument(f"the path of a socket must be absolute, not {self.socket!r}")
        if self.group is not None and self.socket is None:
            raise InvalidArgument("a group needs a socket in a directory it can enter: give its path as well")


@dataclass(frozen=True, slots=True)
class InitOptions:
    """``encrypt`` insists on an encrypted repository. ``reveal`` is given the new recovery key, the only time there is
    a text of it, before the repository is made; without it there is no recovery key."""

    encrypt: bool = False
    reveal: Callable[[str], None] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class KeyOptions:
    """A key to add, of ``kind`` ``keyfile`` (``path``), ``credential`` (its ``name``), ``passphrase`` (``secret``) or
    ``recovery`` (told to ``reveal``). ``unlock`` is a recovery key to open the repository with when those configured
    are lost. Secrets are in no text of this object."""

    kind: str
    label: str = ""
    path: str = ""
    name: str = ""
    secret: bytes = field(default=b"", repr=False)
    unlock: bytes = field(default=b"", repr=False)
    reveal: Callable[[str], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        needs = {"keyfile": "path", "credential": "name", "passphrase": "secret", "recovery": "reveal"}
        if self.kind not in needs:
            raise InvalidArgument(f"{self.kind!r} is no kind of key: {', '.join(needs)}")
        for kind, needed in needs.items():
            if bool(getattr(self, needed)) is not (kind == self.kind):
                word = "needs" if kind == self.kind else "has no use for"
                raise InvalidArgument(f"a key of kind {self.kind} {word} {needed}")
        if self.path and not self.path.startswith("/"):
            raise InvalidArgument(f"the path of a key file must be absolute, not {self.path!r}")
        if len(self.label) > 100 or not self.label.isprintable():
            raise InvalidArgument("the label of a key is one line of at most 100 characters")
