"""Reads the parameters of a request: the host is more trusted than the guest, but its mistakes must not reach the
kernel."""

import re
from typing import Any, Dict, List, Optional

from .failures import HelperError

Params = Dict[str, Any]

_JOB = re.compile(r"j[0-9a-f]{8}\Z")
_DEVNO = re.compile(r"[0-9]{1,4}:[0-9]{1,7}\Z")


def job_id(text: Any) -> str:
    """A job's id; it becomes part of device names, so nothing else passes."""
    if not isinstance(text, str) or not _JOB.match(text):
        raise HelperError("InvalidArgument", "not a job id: %.40r" % (text,))
    return text


def devno(text: Any) -> str:
    """``major:minor``."""
    if not isinstance(text, str) or not _DEVNO.match(text):
        raise HelperError("InvalidArgument", "not a device number: %.40r" % (text,))
    return text


def integer(params: Params, key: str, minimum: int, maximum: int) -> int:
    """An integer within bounds; ``true`` is none."""
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise HelperError("InvalidArgument", "%s: expected %d to %d, got %.40r" % (key, minimum, maximum, value))
    return value


def number(params: Params, key: str, minimum: float, maximum: float) -> float:
    """A number within bounds."""
    value = params.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not minimum <= value <= maximum:
        raise HelperError("InvalidArgument", "%s: expected %g to %g, got %.40r" % (key, minimum, maximum, value))
    return float(value)


def text(params: Params, key: str, limit: int = 255) -> str:
    """A string that is not empty and at most ``limit`` characters long."""
    value = params.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= limit or "\0" in value:
        raise HelperError("InvalidArgument", "%s: expected a string, got %.40r" % (key, value))
    return value


def boolean(params: Params, key: str) -> bool:
    """True or false; false where there is nothing."""
    value = params.get(key, False)
    if not isinstance(value, bool):
        raise HelperError("InvalidArgument", "%s: expected true or false, got %.40r" % (key, value))
    return value


def hexadecimal(params: Params, key: str, minimum: int, maximum: int) -> Optional[bytes]:
    """Bytes in hexadecimal digits, None where there is nothing."""
    if params.get(key) is None:
        return None
    try:
        value = bytes.fromhex(text(params, key, 2 * maximum))
    except ValueError:
        value = b""
    if not minimum <= len(value) <= maximum:
        raise HelperError("InvalidArgument", "%s: expected %d to %d bytes in hexadecimal" % (key, minimum, maximum))
    return value


def objects(params: Params, key: str, limit: int) -> List[Params]:
    """A list of at most ``limit`` objects."""
    value = params.get(key)
    if not isinstance(value, list) or len(value) > limit or not all(isinstance(item, dict) for item in value):
        raise HelperError("InvalidArgument", "%s: expected a list of at most %d objects" % (key, limit))
    return value
