"""Typed getters for JSON that others wrote: helper replies, manifests, journals, configuration.

Each getter takes the object, a key and the bounds of what is acceptable, and raises an error which names the key's
whole path (``volumes[2].size: expected an integer from 0 to 10, got -1``). ``at`` is the path of the object itself, for
nested objects; ``error`` the class to raise, so that a caller's layer keeps its own error (default ``TypedError``).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn, TypeVar

T = TypeVar("T")

_SURROGATE = re.compile("\\\\u[dD][89a-fA-F]|[\ud800-\udfff]")

JsonObject = Mapping[str, object]


class TypedError(ValueError):
    """A value is missing, of the wrong type or out of bounds; the message starts with the key's path."""


class _Required:
    """Type of the marker for "no default: the key must be there"."""


REQUIRED: Final = _Required()


def key_path(at: str, key: str) -> str:
    """The path of ``key`` in the object at ``at``."""
    return f"{at}.{key}" if at else key


def get_str(
    obj: JsonObject,
    key: str,
    default: T | _Required = REQUIRED,
    *,
    min_length: int = 0,
    max_length: int = 65536,
    at: str = "",
    error: type[Exception] = TypedError,
) -> str | T:
    """The string at ``key``; lengths in characters. NUL and lone surrogates are refused."""
    value = _look_up(obj, key, isinstance(default, _Required), at, error)
    if value is None and not isinstance(default, _Required):
        return default
    if not isinstance(value, str):
        _refuse(at, key, "a string", value, error)
    if not min_length <= len(value) <= max_length:
        bounds = f"{min_length} to {max_length}"
        _refuse(at, key, f"a string of {bounds} characters", f"{len(value)} characters", error, quote=False)
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        _refuse(at, key, "text without NUL and lone surrogates", value, error)
    return value


def get_int(
    obj: JsonObject,
    key: str,
    default: T | _Required = REQUIRED,
    *,
    minimum: int = 0,
    maximum: int = 2**63 - 1,
    at: str = "",
    error: type[Exception] = TypedError,
) -> int | T:
    """The integer at ``key``, ``minimum <= value <= maximum``. ``true`` is no integer."""
    value = _look_up(obj, key, isinstance(default, _Required), at, error)
    if value is None and not isinstance(default, _Required):
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value <= maximum:
        _refuse(at, key, f"an integer from {minimum} to {maximum}", value, error)
    return value


def get_float(
    obj: JsonObject,
    key: str,
    default: T | _Required = REQUIRED,
    *,
    minimum: float = 0.0,
    maximum: float = 1e15,
    at: str = "",
    error: type[Exception] = TypedError,
) -> float | T:
    """The number at ``key`` (an integer is one too), finite and within bounds."""
    value = _look_up(obj, key, isinstance(default, _Required), at, error)
    if value is None and not isinstance(default, _Required):
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not minimum <= value <= maximum:
        _refuse(at, key, f"a number from {minimum:g} to {maximum:g}", value, error)
    number = float(value)
    if not math.isfinite(number):
        _refuse(at, key, "a finite number", value, error)
    return number


def get_bool(
    obj: JsonObject,
    key: str,
    default: T | _Required = REQUIRED,
    *,
    at: str = "",
    error: type[Exception] = TypedError,
) -> bool | T:
    """The truth value at ``key``."""
    value = _look_up(obj, key, isinstance(default, _Required), at, error)
    if value is None and not isinstance(default, _Required):
        return default
    if not isinstance(value, bool):
        _refuse(at, key, "true or false", value, error)
    return value


def get_object(
    obj: JsonObject,
    key: str,
    default: T | _Required = REQUIRED,
    *,
    at: str = "",
    error: type[Exception] = TypedError,
) -> dict[str, Any] | T:
    """The object at ``key``. Its values are unchecked: read them with these getters and ``at=key_path(at, key)``."""
    value = _look_up(obj, key, isinstance(default, _Required), at, error)
    if value is None and not isinstance(default, _Required):
        return default
    if not isinstance(value, dict):
        _refuse(at, key, "an object", value, error)
    return value


def get_list(
    obj: JsonObject,
    key: str,
    default: T | _Required = REQUIRED,
    *,
    min_length: int = 0,
    max_length: int = 65536,
    at: str = "",
    error: type[Exception] = TypedError,
) -> list[Any] | T:
    """The list at ``key``, of ``min_length`` to ``max_length`` items, themselves unchecked."""
    value = _look_up(obj, key, isinstance(default, _Required), at, error)
    if value is None and not isinstance(default, _Required):
        return default
    if not isinstance(value, list):
        _refuse(at, key, "a list", value, error)
    if not min_length <= len(value) <= max_length:
        _refuse(at, key, f"a list of {min_length} to {max_length} items", f"{len(value)} items", error, quote=False)
    return value


def get_objects(
    obj: JsonObject,
    key: str,
    *,
    max_length: int = 65536,
    at: str = "",
    error: type[Exception] = TypedError,
) -> list[tuple[str, dict[str, Any]]]:
    """The list of objects at ``key``, each with its path for the getters that read it: ``[("disks[0]", {...})]``."""
    items = get_list(obj, key, max_length=max_length, at=at, error=error)
    result = []
    for number, item in enumerate(items):
        name = f"{key}[{number}]"
        if not isinstance(item, dict):
            _refuse(at, name, "an object", item, error)
        result.append((key_path(at, name), item))
    return result


def get_strs(
    obj: JsonObject,
    key: str,
    *,
    max_length: int = 65536,
    max_item_length: int = 65536,
    at: str = "",
    error: type[Exception] = TypedError,
) -> list[str]:
    """The list of strings at ``key``."""
    items = get_list(obj, key, max_length=max_length, at=at, error=error)
    return [
        get_str({name: item}, name, max_length=max_item_length, at=at, error=error)
        for name, item in ((f"{key}[{number}]", item) for number, item in enumerate(items))
    ]


def parse_object(
    text: str | bytes, *, what: str, max_length: int = 64 * 2**20, error: type[Exception] = TypedError
) -> dict[str, Any]:
    """The JSON object in ``text``; refuses NaN, duplicate keys, overlong text, halves of surrogate pairs (nothing could
    write them again) and nesting too deep for the parser.

    ``what`` names the document in the message (``manifest of backup x``).
    """
    if len(text) > max_length:
        raise error(f"{what}: {len(text)} bytes of JSON, at most {max_length} are accepted")
    try:
        words = text if isinstance(text, str) else str(text, "utf-8")
        value = json.loads(words, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        if _SURROGATE.search(words):
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as reason:
        raise error(f"{what} is not valid JSON: {reason}") from reason
    if not isinstance(value, dict):
        raise error(f"{what}: expected a JSON object, got {_show(value)}")
    return value


def _look_up(obj: JsonObject, key: str, required: bool, at: str, error: type[Exception]) -> object:
    """The value at ``key``; None when it is absent or null and not ``required``."""
    value = obj.get(key)
    if value is None and required:
        raise error(f"{key_path(at, key)}: missing")
    return value


def _refuse(at: str, key: str, expected: str, value: object, error: type[Exception], *, quote: bool = True) -> NoReturn:
    raise error(f"{key_path(at, key)}: expected {expected}, got {_show(value) if quote else value}")


def _show(value: object) -> str:
    """``value`` short enough for a message; what comes from a guest may be megabytes."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "null"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge integer"  # its decimal form may be refused by Python itself
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has the same key twice")
    return result
