"""Values between the model and D-Bus."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from dbus_fast import DBusError, Variant

from vmbackupd.api.names import ERROR_PREFIX
from vmbackupd.errors import BackupError, InvalidArgument
from vmbackupd.job.manager import Job
from vmbackupd.job.options import (
    BackupOptions,
    ExportOptions,
    GcOptions,
    ImportOptions,
    PruneOptions,
    RestoreOptions,
    ServeOptions,
    VerifyOptions,
)
from vmbackupd.model import T2, RevertMode


@dataclass(frozen=True, slots=True)
class Option:
    """One key an options dictionary may have: the D-Bus types it accepts and what becomes of the value."""

    signatures: tuple[str, ...]
    convert: Callable[[Any], object]


def _word(option: str, words: type[StrEnum]) -> Option:
    """A text that is one of the values of ``words``."""
    def convert(value: str) -> StrEnum:
        try:
            return words(value)
        except ValueError:
            raise InvalidArgument(f"option {option}: {value!r} is none of {', '.join(words)}") from None

    return Option(("s",), convert)


_TEXT = Option(("s",), str)
_FLAG = Option(("b",), bool)
_NUMBER = Option(("d", "u", "i", "t", "x"), float)
_COUNT = Option(("u", "t"), int)
_REVERT = _word("revert", RevertMode)
_DESCRIPTOR = Option(("h",), int)

BACKUP_OPTIONS = {"revert": _REVERT, "allow_uncovered": Option(("as",), tuple), "freeze_budget": _NUMBER, "full": _FLAG,
                  "t2": _word("t2", T2)}
RESTORE_OPTIONS = {"name": _TEXT, "directory": _TEXT, "volumes": Option(("a{ss}",), dict), "dry_run": _FLAG,
                   "force": _FLAG, "start": _FLAG, "revert": _REVERT, "in_place": _FLAG}
FORGET_OPTIONS = {"dry_run": _FLAG}
KEEP_RULES = tuple(f"keep_{rule}" for rule in ("last", "hourly", "daily", "weekly", "monthly", "yearly"))
PRUNE_OPTIONS = {"dry_run": _FLAG, **dict.fromkeys(KEEP_RULES, _COUNT)}
GC_OPTIONS = {"dry_run": _FLAG, "threshold": _NUMBER}
VERIFY_OPTIONS = {"data": _FLAG, "rate": _COUNT, "restart": _FLAG}
EXPORT_OPTIONS = {"format": _TEXT, "compress": _FLAG, "force": _FLAG}
IMPORT_OPTIONS = {"format": _TEXT, "volume": _TEXT, "allow_backing": _FLAG}
SERVE_OPTIONS = {"socket": _TEXT, "group": _TEXT}
INIT_OPTIONS = {"encrypt": _FLAG, "recovery_key": _DESCRIPTOR}
KEY_OPTIONS = {"label": _TEXT, "path": _TEXT, "name": _TEXT, "secret": _DESCRIPTOR, "unlock": _DESCRIPTOR,
               "recovery_key": _DESCRIPTOR}
PAGE_OPTIONS = {"limit": Option(("u",), int), "after": _TEXT}
NO_OPTIONS: dict[str, Option] = {}


def read_options(given: Mapping[str, Variant], known: Mapping[str, Option]) -> dict[str, Any]:
    """The options a caller gave, by name.

    Raises ``InvalidArgument`` naming an option that is unknown or of the wrong type, and what would be right.
    """
    values: dict[str, Any] = {}
    for name, variant in given.items():
        option = known.get(name)
        if option is None:
            accepted = f"known options: {', '.join(sorted(known))}" if known else "this method has no options"
            raise InvalidArgument(f"unknown option {name!r}; {accepted}")
        if variant.signature not in option.signatures:
            accepted = " or ".join(repr(signature) for signature in option.signatures)
            raise InvalidArgument(f"option {name} has the type {variant.signature!r}, expected {accepted}")
        values[name] = option.convert(variant.value)
    return values


def backup_options(given: Mapping[str, Variant]) -> BackupOptions:
    """The options of ``Backup``."""
    return BackupOptions(**read_options(given, BACKUP_OPTIONS))


def restore_options(given: Mapping[str, Variant]) -> RestoreOptions:
    """The options of ``Restore``."""
    return RestoreOptions(**read_options(given, RESTORE_OPTIONS))


def prune_options(given: Mapping[str, Variant]) -> PruneOptions:
    """The options of ``Prune``."""
    values = read_options(given, PRUNE_OPTIONS)
    return PruneOptions({rule: values[rule] for rule in KEEP_RULES if rule in values}, values.get("dry_run", False))


def gc_options(given: Mapping[str, Variant]) -> GcOptions:
    """The options of ``CollectGarbage``."""
    return GcOptions(**read_options(given, GC_OPTIONS))


def verify_options(backups: list[str], given: Mapping[str, Variant]) -> VerifyOptions:
    """The options of ``Verify``."""
    return VerifyOptions(tuple(backups), **read_options(given, VERIFY_OPTIONS))


def export_options(given: Mapping[str, Variant]) -> ExportOptions:
    """The options of ``Export``."""
    return ExportOptions(**read_options(given, EXPORT_OPTIONS))


def import_options(given: Mapping[str, Variant]) -> ImportOptions:
    """The options of ``Import``."""
    return ImportOptions(**read_options(given, IMPORT_OPTIONS))


def serve_options(given: Mapping[str, Variant]) -> ServeOptions:
    """The options of ``Serve``."""
    return ServeOptions(**read_options(given, SERVE_OPTIONS))


def page(items: list[dict[str, object]], options: Mapping[str, Variant]) -> list[dict[str, object]]:
    """The part of a listing that ``limit`` and ``after`` (the ``id`` of the last one seen) ask for.

    Raises ``InvalidArgument`` when ``after`` names nothing in the listing.
    """
    values = read_options(options, PAGE_OPTIONS)
    if after := values.get("after"):
        ids = [item.get("id") for item in items]
        if after not in ids:
            raise InvalidArgument(f"option after: there is no {after!r} in the listing")
        items = items[ids.index(after) + 1:]
    limit = values.get("limit", 0)
    return items[:limit] if limit else items


def to_json(value: object) -> str:
    """``value`` as JSON in ASCII, which every D-Bus string may hold."""
    return json.dumps(value, allow_nan=False, default=_plain)


def text(value: object) -> str:
    """``value`` as a text D-Bus accepts: no surrogates, no NUL."""
    return str(value).encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def error_name(error: BackupError) -> str:
    """The D-Bus name of an error."""
    return ERROR_PREFIX + error.code


def to_dbus_error(error: BackupError) -> DBusError:
    """The D-Bus error a caller gets for ``error``."""
    return DBusError(error_name(error), text(error))


# The properties of the Job interface: D-Bus type, value, and the attributes of a job whose change changes them.
JOB_PROPERTIES: dict[str, tuple[str, Callable[[Job], Any], frozenset[str]]] = {
    "Id": ("s", lambda job: job.id, frozenset()),
    "Kind": ("s", lambda job: job.kind, frozenset()),
    "VM": ("s", lambda job: text(job.vm), frozenset()),
    "State": ("s", lambda job: job.state.value, frozenset({"state"})),
    "Step": ("s", lambda job: text(job.step), frozenset({"step"})),
    # A list and not a tuple: dbus-fast takes tuples for structures only since version 3.
    "Progress": ("(tt)", lambda job: [max(0, count) for count in job.progress], frozenset({"progress"})),
    "Warnings": ("as", lambda job: [text(warning) for warning in job.warnings], frozenset({"warnings"})),
    "Result": ("s", lambda job: to_json(job.result), frozenset({"result"})),
    "ErrorName": ("s", lambda job: error_name(job.error) if job.error else "", frozenset({"error"})),
    "ErrorMessage": ("s", lambda job: text(job.error) if job.error else "", frozenset({"error"})),
    "Created": ("d", lambda job: job.created, frozenset()),
    "Ended": ("d", lambda job: job.ended or 0.0, frozenset({"ended"})),
}


def _plain(value: object) -> object:
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, set | frozenset | tuple):
        return sorted(value) if not isinstance(value, tuple) else list(value)
    raise TypeError(f"{type(value).__name__} has no place in a JSON document")
