"""The daemon's configuration: a TOML file, checked against a table of keys, as frozen dataclasses with defaults.

Unknown keys are refused, because a misspelt key that is silently ignored is a backup that is not what was asked for.
Errors are ``ConfigError`` and name the file, the key and what it accepts.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from uuid import UUID

from vmbackupd.errors import ConfigError
from vmbackupd.units import GiB, KiB, MiB, TiB, human

DEFAULT_FILE = Path("/etc/vmbackupd/vmbackupd.toml")
DEFAULT_STATE = Path("/var/lib/vmbackupd")
DEFAULT_RUNTIME = Path("/run/vmbackupd")
DEFAULT_CACHE = Path("/var/cache/vmbackupd")

_SECONDS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "KIB": KiB, "MIB": MiB, "GIB": GiB, "TIB": TiB}
_QUANTITY = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z%]*)\s*", re.ASCII)
_TOO_LARGE = 1e24  # neither a size nor a duration of this world


@dataclass(frozen=True, slots=True)
class S3Config:
    """How an object store is reached. None takes what boto3 finds: environment, ``~/.aws``, the instance's role.

    ``credentials_file`` is in the format of ``~/.aws/credentials`` and read with ``profile`` (None: ``default``);
    ``credential`` names a systemd credential in the same format. ``addressing``: ``auto``, ``path`` or ``virtual``
    (bucket in the path, or in the host name). A request without a byte moving for ``timeout`` seconds is given up.
    ``lock_days`` and ``lock_mode`` are for ``repository init`` on a bucket with object lock.
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    credentials_file: Path | None = None
    credential: str | None = None
    ca_file: Path | None = None
    addressing: str = "auto"
    timeout: float = 30.0
    lock_days: int = 0
    lock_mode: str = "governance"


@dataclass(frozen=True, slots=True)
class RepositoryConfig:
    """Where backups go, and how: ``path`` is a local directory, ``url`` (``s3://BUCKET/PREFIX``, ``file:///PATH``)
    takes its place and makes it None. ``compression_level`` is zstd's; ``pack_size`` in bytes; ``workers`` threads
    that hash and compress, 0 for one a processor."""

    path: Path | None
    url: str | None = None
    compression_level: int = 1
    pack_size: int = 16 * MiB
    workers: int = 0
    s3: S3Config = field(default_factory=S3Config)

    @property
    def place(self) -> str:
        """The repository as one text: its URL, or its path."""
        return self.url or str(self.path)


@dataclass(frozen=True, slots=True)
class EncryptionConfig:
    """Where the key of an encrypted repository comes from; each that is given is tried. Secrets themselves are never
    in the configuration. ``credential`` is the name of a systemd credential of this service."""

    key_file: Path | None = None
    passphrase_file: Path | None = None
    credential: str | None = None
    recovery_key_file: Path | None = None

    @property
    def configured(self) -> bool:
        """Whether there is any, so that the repository has to be an encrypted one."""
        return any((self.key_file, self.passphrase_file, self.credential, self.recovery_key_file))


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """How many backups of a VM ``prune`` keeps, by the rule; 0 is none by that rule. ``after_backup`` prunes the VM
    after each of its backups."""

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0
    after_backup: bool = False

    @property
    def keeps(self) -> dict[str, int]:
        """The rules that keep anything, by name."""
        return {name: count for name in KEEP_RULES if (count := getattr(self, name))}


KEEP_RULES = tuple(name for name in RetentionConfig.__dataclass_fields__ if name.startswith("keep_"))


@dataclass(frozen=True, slots=True)
class HypervisorConfig:
    """Which hypervisor: a libvirt connection URI, or ``qmp:`` for the QEMU processes of ``[machines]``."""

    uri: str = "qemu:///system"

    @property
    def is_qmp(self) -> bool:
        """Whether QEMU is driven without libvirt."""
        return self.uri == QMP_URI


QMP_URI = "qmp:"


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """One QEMU that runs without libvirt: its QMP socket, and what cannot or need not be asked there.

    ``agent`` is the socket of the guest agent's port (None: asked of QEMU); ``uuid`` names the machine in backups
    (None: what QEMU says); ``command_line`` is a file with the command that starts it (None: the running process's
    own); ``nvram`` the file of its UEFI variables (None: its writable flash).
    """

    qmp: Path
    agent: Path | None = None
    uuid: str | None = None
    command_line: Path | None = None
    nvram: Path | None = None


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """Limits towards the guest: how long it may be frozen and how long the helper outlives our silence, in seconds, and
    how many bytes of its memory may hold what is captured in the freeze (of disks that no snapshot can hold)."""

    freeze_budget: float = 5.0
    lease: float = 300.0
    capture_limit: int = 64 * MiB


@dataclass(frozen=True, slots=True)
class ChangesConfig:
    """How later backups find out what changed: ``tracking`` lets the guest's kernel track writes to pass-through disks
    between backups, ``bitmaps`` QEMU those to virtual disks, ``hashing`` lets the guest hash a disk when neither is
    known. ``thin`` has thin pools below pass-through disks write to new blocks after each backup: their metadata then
    tells what changed where no tracker does. ``audit`` is the share of the chunks said to be unchanged that is read all
    the same, and compared."""

    tracking: bool = True
    bitmaps: bool = True
    hashing: bool = True
    thin: bool = False
    audit: float = 0.01


@dataclass(frozen=True, slots=True)
class VirtualDisksConfig:
    """How the hypervisor's snapshot of virtual disks is made: ``external`` (an overlay file beside each image),
    ``fleece`` (a backup job that QEMU serves them from), or ``auto``: overlays wherever there are files."""

    t2: str = "auto"


@dataclass(frozen=True, slots=True)
class PassthroughConfig:
    """How pass-through disks are read: ``direct`` is ``auto`` (by the host where the domain gives the guest a LUN that
    the host can open, else through the guest) or ``never`` (always through the guest)."""

    direct: str = "auto"


@dataclass(frozen=True, slots=True)
class ScratchConfig:
    """The scratch disk that holds a guest's COW stores: a thin image in ``directory``, where QEMU must get in.

    Its virtual size has room for ``share`` of the snapshotted volumes to be overwritten, but is at most ``size`` bytes.
    """

    directory: Path
    share: float = 1.0
    size: int | None = None


@dataclass(frozen=True, slots=True)
class BusConfig:
    """The D-Bus address to serve on; None is the system bus."""

    address: str | None = None


@dataclass(frozen=True, slots=True)
class JobsConfig:
    """How many jobs run at the same time; further ones wait."""

    parallel: int = 4


@dataclass(frozen=True, slots=True)
class Config:
    """Everything an administrator can set. Paths are absolute."""

    state_directory: Path
    runtime_directory: Path
    repository: RepositoryConfig
    scratch: ScratchConfig
    hypervisor: HypervisorConfig = field(default_factory=HypervisorConfig)
    guest: GuestConfig = field(default_factory=GuestConfig)
    bus: BusConfig = field(default_factory=BusConfig)
    jobs: JobsConfig = field(default_factory=JobsConfig)
    changes: ChangesConfig = field(default_factory=ChangesConfig)
    machines: Mapping[str, MachineConfig] = field(default_factory=dict)
    virtual_disks: VirtualDisksConfig = field(default_factory=VirtualDisksConfig)
    passthrough: PassthroughConfig = field(default_factory=PassthroughConfig)
    encryption: EncryptionConfig = field(default_factory=EncryptionConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    cache_directory: Path = DEFAULT_CACHE


def load(path: Path | None = None, overrides: Mapping[str, str] | None = None) -> Config:
    """Read the configuration file and put ``overrides`` (dotted key to text, from the command line) over it.

    Without ``path`` the default file is read, if it is there; a path that was asked for must exist.
    """
    file = path or DEFAULT_FILE
    try:
        text = file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        if path is not None:
            raise ConfigError(f"{file}: there is no such configuration file") from None
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    return parse(text, str(file), overrides or {})


def parse(text: str, file: str = "configuration", overrides: Mapping[str, str] | None = None) -> Config:
    """The configuration in TOML ``text``; ``file`` is its name in errors."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from error
    machines = _machines(file, document.pop("machines", {}))
    values = {key: _value(file, key, value) for key, value in _flatten(file, document)}
    for one, other in (("repository.path", "repository.url"), ("repository.url", "repository.path")):
        if one in (overrides or {}):
            values.pop(other, None)
    for key, value in (overrides or {}).items():
        values[key] = _value("command line", key, value)
    _check_together(file, values)
    config = replace(_build(values), machines=machines)
    if bool(machines) != config.hypervisor.is_qmp:
        raise ConfigError(
            f'{file}: [machines] and hypervisor.uri: expected both or neither: hypervisor.uri = "{QMP_URI}" takes the'
            " machines from [machines.NAME] sections, a libvirt URI takes them from libvirt"
        )
    return config


def to_toml(config: Config) -> str:
    """The effective configuration as TOML that :func:`parse` reads back to the same."""
    lines: list[str] = []
    section = ""
    for key in _KEYS:
        head, _, name = key.rpartition(".")
        value = attrgetter(key)(config)
        if head != section:
            section = head
            lines += ["", f"[{head}]"]
        lines.append(_toml_line(name, value))
    for machine, settings in config.machines.items():
        lines += ["", f"[machines.{_toml_value(machine)}]"]
        lines += [_toml_line(name, getattr(settings, name)) for name in _MACHINE_KEYS]
    return "\n".join(lines) + "\n"


def seconds(value: object) -> float:
    """A duration: a number of seconds, or text such as ``"5s"``, ``"500 ms"``, ``"2 min"``. Raises ``ValueError``."""
    result = _quantity(value, _SECONDS, 1.0)
    if result is None or not math.isfinite(result) or result <= 0:
        raise ValueError('a duration above zero: seconds, or text such as "5s", "500 ms", "2 min", "1 h"')
    return result


def size(value: object) -> int:
    """A size: a whole number of bytes, or text such as ``"10 GiB"``. Raises ``ValueError``."""
    result = _quantity(value, _BYTES, 1)
    if result is None or not math.isfinite(result) or result <= 0 or result != int(result):
        raise ValueError('a size above zero: bytes, or text such as "512 MiB", "10 GiB", "1 TiB"')
    return int(result)


def _share(value: object) -> float:
    result = _quantity(value, {"%": 0.01}, 1.0)
    if result is None or not 0.01 <= result <= 1:
        raise ValueError('a share from 0.01 to 1, or text such as "20 %"')
    return result


def _audit(value: object) -> float:
    result = _quantity(value, {"%": 0.01}, 1.0)
    if result is None or not 0 <= result <= 1:
        raise ValueError('a share from 0 to 1, or text such as "1 %"')
    return result


def _whole(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return check


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _one_of(*words: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return value

    return check


def _timeout(value: object) -> float:
    result = seconds(value)
    if not 1 <= result <= 3600:
        raise ValueError("a duration from 1 s to 1 h")
    return result


def _pack_size(value: object) -> int:
    result = size(value)
    if not MiB <= result <= 256 * MiB:
        raise ValueError("a size from 1 MiB to 256 MiB")
    return result


def _url(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"s3://[^/\s@]+(/\S*)?|file:///\S+", value):
        raise ValueError("a URL such as s3://bucket/prefix or file:///path, without credentials")
    return value


def _web_url(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"https?://[^/\s@]+/?", value):
        raise ValueError("a URL such as https://s3.example.com:7480, without credentials")
    return value


def _credential(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", value):
        raise ValueError("the name of a systemd credential (LoadCredential= of the unit), no path")
    return value


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("an absolute path")
    return Path(value)


def _uuid(value: object) -> str:
    try:
        return str(UUID(value if isinstance(value, str) else ""))
    except ValueError:
        raise ValueError("a UUID such as 0b49a1a8-6d39-4a0c-9ab0-1f7c8f0c1f5e") from None


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value


_KEYS: dict[str, Callable[[object], object]] = {
    "state_directory": _path,
    "runtime_directory": _path,
    "cache_directory": _path,
    "repository.path": _path,
    "repository.url": _url,
    "repository.compression_level": _whole(1, 19),
    "repository.pack_size": _pack_size,
    "repository.workers": _whole(0, 64),
    "repository.s3.endpoint": _web_url,
    "repository.s3.region": _text,
    "repository.s3.profile": _text,
    "repository.s3.credentials_file": _path,
    "repository.s3.credential": _credential,
    "repository.s3.ca_file": _path,
    "repository.s3.addressing": _one_of("auto", "path", "virtual"),
    "repository.s3.timeout": _timeout,
    "repository.s3.lock_days": _whole(0, 36_500),
    "repository.s3.lock_mode": _one_of("governance", "compliance"),
    "encryption.key_file": _path,
    "encryption.passphrase_file": _path,
    "encryption.credential": _credential,
    "encryption.recovery_key_file": _path,
    **{f"retention.{rule}": _whole(0, 10_000) for rule in KEEP_RULES},
    "retention.after_backup": _flag,
    "hypervisor.uri": _text,
    "guest.freeze_budget": seconds,
    "guest.lease": seconds,
    "guest.capture_limit": size,
    "changes.tracking": _flag,
    "changes.bitmaps": _flag,
    "changes.hashing": _flag,
    "changes.thin": _flag,
    "changes.audit": _audit,
    "virtual_disks.t2": _one_of("auto", "external", "fleece"),
    "passthrough.direct": _one_of("auto", "never"),
    "scratch.directory": _path,
    "scratch.share": _share,
    "scratch.size": size,
    "bus.address": _text,
    "jobs.parallel": _whole(1, 64),
}
_MACHINE_KEYS: dict[str, Callable[[object], object]] = {
    "qmp": _path,
    "agent": _path,
    "uuid": _uuid,
    "command_line": _path,
    "nvram": _path,
}
_MACHINE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII)
_SECTIONS = {key.rpartition(".")[0] for key in _KEYS if "." in key}


def _quantity(value: object, units: Mapping[str, float], plain: float) -> float | None:
    """``value`` times its unit, None where it is no sane number with a known unit. Without unit it counts ``plain``."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value * plain if abs(value) < _TOO_LARGE else None
    if not isinstance(value, str):
        return None
    match = _QUANTITY.fullmatch(value)
    if match is None:
        return None
    number = float(match[1]) if "." in match[1] else int(match[1])
    if number >= _TOO_LARGE:
        return None
    if not match[2]:
        return number * plain
    factor = units.get(match[2], units.get(match[2].upper()))
    return None if factor is None else number * factor


def _flatten(file: str, document: Mapping[str, object], inside: str = "") -> list[tuple[str, object]]:
    """The document's keys as ``section.key``; refuses a section that is no table."""
    flat: list[tuple[str, object]] = []
    for name, value in document.items():
        key = f"{inside}.{name}" if inside else name
        if key in _SECTIONS:
            if not isinstance(value, dict):
                raise ConfigError(f"{file}: {key}: expected a section [{key}], found {value!r}")
            flat += _flatten(file, value, key)
        else:
            flat.append((key, value))
    return flat


def _value(file: str, key: str, value: object, keys: Mapping[str, Callable[[object], object]] | None = None,
           short: str | None = None) -> object:
    """``value`` as the check of ``keys`` (all of the file's, or under their ``short`` names a machine's) makes it."""
    check = (keys or _KEYS).get(short or key)
    if check is None:
        section = key.rpartition(".")[0]
        known = list(keys) if keys else [
            name.rpartition(".")[2] for name in _KEYS if name.rpartition(".")[0] == section]
        known += [] if section else sorted(f"[{name}]" for name in (*_SECTIONS, "machines.NAME"))
        where = f"in [{section}]" if section else "keys"
        raise ConfigError(f"{file}: unknown key {key}; known {where}: {', '.join(known)}")
    try:
        return check(value)
    except ValueError as error:
        raise ConfigError(f"{file}: {key}: expected {error}, found {value!r}") from None


def _check_together(file: str, values: Mapping[str, object]) -> None:
    """Refuse keys that contradict each other."""
    for one, other in (
        ("repository.path", "repository.url"),
        ("repository.s3.credentials_file", "repository.s3.credential"),
    ):
        if one in values and other in values:
            raise ConfigError(f"{file}: {one} and {other}: expected one of them, remove the other")
    if values.get("retention.after_backup") and not any(values.get(f"retention.{rule}") for rule in KEEP_RULES):
        raise ConfigError(
            f"{file}: retention.after_backup: expected one of {', '.join(KEEP_RULES)} above zero beside it, because a"
            " prune without a rule would keep nothing"
        )


def _build(values: Mapping[str, object]) -> Config:
    def section(name: str, **defaults: object) -> dict[str, object]:
        given = {key.rpartition(".")[2]: value for key, value in values.items() if key.rpartition(".")[0] == name}
        return defaults | given

    state = values.get("state_directory", DEFAULT_STATE)
    runtime = values.get("runtime_directory", DEFAULT_RUNTIME)
    assert isinstance(state, Path) and isinstance(runtime, Path)
    path = None if "repository.url" in values else state / "repository"
    # The values passed _KEYS, which mypy cannot see through the dictionary.
    return Config(
        state_directory=state,
        runtime_directory=runtime,
        cache_directory=values.get("cache_directory", DEFAULT_CACHE),  # type: ignore[arg-type]
        repository=RepositoryConfig(
            **section("repository", path=path, s3=S3Config(**section("repository.s3"))),  # type: ignore[arg-type]
        ),
        encryption=EncryptionConfig(**section("encryption")),  # type: ignore[arg-type]
        retention=RetentionConfig(**section("retention")),  # type: ignore[arg-type]
        scratch=ScratchConfig(**section("scratch", directory=state / "scratch")),  # type: ignore[arg-type]
        hypervisor=HypervisorConfig(**section("hypervisor")),  # type: ignore[arg-type]
        guest=GuestConfig(**section("guest")),  # type: ignore[arg-type]
        bus=BusConfig(**section("bus")),  # type: ignore[arg-type]
        jobs=JobsConfig(**section("jobs")),  # type: ignore[arg-type]
        changes=ChangesConfig(**section("changes")),  # type: ignore[arg-type]
        virtual_disks=VirtualDisksConfig(**section("virtual_disks")),  # type: ignore[arg-type]
        passthrough=PassthroughConfig(**section("passthrough")),  # type: ignore[arg-type]
    )


def _machines(file: str, sections: object) -> dict[str, MachineConfig]:
    """The ``[machines.NAME]`` sections."""
    if not isinstance(sections, dict):
        raise ConfigError(f"{file}: machines: expected sections [machines.NAME], found {sections!r}")
    found: dict[str, MachineConfig] = {}
    for name, section in sections.items():
        at = f"machines.{name}"
        if not _MACHINE_NAME.fullmatch(name):
            raise ConfigError(f"{file}: {at}: expected a name of letters, digits, and . _ - after the first character")
        if not isinstance(section, dict):
            raise ConfigError(f"{file}: {at}: expected a section [{at}], found {section!r}")
        if "qmp" not in section:
            raise ConfigError(f"{file}: {at}: expected the key qmp, the path of the machine's QMP socket")
        values = {key: _value(file, f"{at}.{key}", value, _MACHINE_KEYS, key) for key, value in section.items()}
        found[name] = MachineConfig(**values)  # type: ignore[arg-type]
    uuids = [machine.uuid for machine in found.values() if machine.uuid is not None]
    for uuid in uuids:
        if uuids.count(uuid) > 1:
            raise ConfigError(f"{file}: machines: two of them have the uuid {uuid}; expected one each")
    return found


def _toml_line(name: str, value: object) -> str:
    return f"# {name} is not set" if value is None else f"{name} = {_toml_value(value)}"


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        note = f"  # {human(value)}" if isinstance(value, int) and value >= KiB else ""
        return f"{value}{note}"
    # A TOML basic string knows the escapes \\ \" and \uXXXX.
    return '"' + "".join(c if c.isprintable() and c not in '\\"' else _escape(c) for c in str(value)) + '"'


def _escape(character: str) -> str:
    return "\\" + character if character in '\\"' else f"\\U{ord(character):08x}"
