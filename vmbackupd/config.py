"""The daemon's configuration: a TOML file, checked against a table of keys, as frozen dataclasses with defaults.

Unknown keys are refused, because a misspelt key that is silently ignored is a backup that is not what was asked for.
Errors are ``ConfigError`` and name the file, the key and what it accepts.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vmbackupd.errors import ConfigError
from vmbackupd.units import GiB, KiB, MiB, TiB, human

DEFAULT_FILE = Path("/etc/vmbackupd/vmbackupd.toml")
DEFAULT_STATE = Path("/var/lib/vmbackupd")
DEFAULT_RUNTIME = Path("/run/vmbackupd")

_SECONDS = {"ms": 0.001, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {"B": 1, "KIB": KiB, "MIB": MiB, "GIB": GiB, "TIB": TiB}
_QUANTITY = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z%]*)\s*", re.ASCII)
_TOO_LARGE = 1e24  # neither a size nor a duration of this world


@dataclass(frozen=True, slots=True)
class RepositoryConfig:
    """Where backups go."""

    path: Path


@dataclass(frozen=True, slots=True)
class HypervisorConfig:
    """Which hypervisor, as a libvirt connection URI."""

    uri: str = "qemu:///system"


@dataclass(frozen=True, slots=True)
class GuestConfig:
    """Limits towards the guest, in seconds: how long it may be frozen, and how long the helper outlives our silence."""

    freeze_budget: float = 5.0
    lease: float = 300.0


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
    values = {key: _value(file, key, value) for key, value in _flatten(file, document)}
    for key, value in (overrides or {}).items():
        values[key] = _value("command line", key, value)
    return _build(values)


def to_toml(config: Config) -> str:
    """The effective configuration as TOML that :func:`parse` reads back to the same."""
    lines: list[str] = []
    section = ""
    for key in _KEYS:
        head, _, name = key.rpartition(".")
        owner = getattr(config, head) if head else config
        value = getattr(owner, name)
        if head != section:
            section = head
            lines += ["", f"[{head}]"]
        lines.append(f"# {name} is not set" if value is None else f"{name} = {_toml_value(value)}")
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


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 64:
        raise ValueError("a whole number from 1 to 64")
    return value


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("an absolute path")
    return Path(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value


_KEYS: dict[str, Callable[[object], object]] = {
    "state_directory": _path,
    "runtime_directory": _path,
    "repository.path": _path,
    "hypervisor.uri": _text,
    "guest.freeze_budget": seconds,
    "guest.lease": seconds,
    "scratch.directory": _path,
    "scratch.share": _share,
    "scratch.size": size,
    "bus.address": _text,
    "jobs.parallel": _count,
}
_SECTIONS = {key.partition(".")[0] for key in _KEYS if "." in key}


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


def _flatten(file: str, document: Mapping[str, object]) -> list[tuple[str, object]]:
    """The document's keys as ``section.key``; refuses a section that is no table."""
    flat: list[tuple[str, object]] = []
    for key, value in document.items():
        if key in _SECTIONS:
            if not isinstance(value, dict):
                raise ConfigError(f"{file}: {key}: expected a section [{key}], found {value!r}")
            flat += [(f"{key}.{name}", inner) for name, inner in value.items()]
        else:
            flat.append((key, value))
    return flat


def _value(file: str, key: str, value: object) -> object:
    check = _KEYS.get(key)
    if check is None:
        section = key.rpartition(".")[0]
        known = [name.rpartition(".")[2] for name in _KEYS if name.rpartition(".")[0] == section]
        known += [] if section else sorted(f"[{name}]" for name in _SECTIONS)
        where = f"in [{section}]" if section else "keys"
        raise ConfigError(f"{file}: unknown key {key}; known {where}: {', '.join(known)}")
    try:
        return check(value)
    except ValueError as error:
        raise ConfigError(f"{file}: {key}: expected {error}, found {value!r}") from None


def _build(values: Mapping[str, object]) -> Config:
    def section(name: str, **defaults: object) -> dict[str, object]:
        given = {key.partition(".")[2]: value for key, value in values.items() if key.startswith(f"{name}.")}
        return defaults | given

    state = values.get("state_directory", DEFAULT_STATE)
    runtime = values.get("runtime_directory", DEFAULT_RUNTIME)
    assert isinstance(state, Path) and isinstance(runtime, Path)
    # The values passed _KEYS, which mypy cannot see through the dictionary.
    return Config(
        state_directory=state,
        runtime_directory=runtime,
        repository=RepositoryConfig(**section("repository", path=state / "repository")),  # type: ignore[arg-type]
        scratch=ScratchConfig(**section("scratch", directory=state / "scratch")),  # type: ignore[arg-type]
        hypervisor=HypervisorConfig(**section("hypervisor")),  # type: ignore[arg-type]
        guest=GuestConfig(**section("guest")),  # type: ignore[arg-type]
        bus=BusConfig(**section("bus")),  # type: ignore[arg-type]
        jobs=JobsConfig(**section("jobs")),  # type: ignore[arg-type]
    )


def _toml_value(value: object) -> str:
    if isinstance(value, int | float):
        note = f"  # {human(value)}" if isinstance(value, int) and value >= KiB else ""
        return f"{value}{note}"
    # A TOML basic string knows the escapes \\ \" and \uXXXX.
    return '"' + "".join(c if c.isprintable() and c not in '\\"' else _escape(c) for c in str(value)) + '"'


def _escape(character: str) -> str:
    return "\\" + character if character in '\\"' else f"\\U{ord(character):08x}"
