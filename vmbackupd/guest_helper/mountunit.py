"""systemd's mount units: what they are called, and those an administrator or a package has written."""

import os
import string
from typing import List, NamedTuple

SEARCHED = (
    "etc/systemd/system",
    "run/systemd/system",
    "usr/local/lib/systemd/system",
    "usr/lib/systemd/system",
    "lib/systemd/system",
)
_PLAIN = frozenset(string.ascii_letters + string.digits + ":_.")


class MountUnit(NamedTuple):
    """A unit file's ``What``, ``Where`` and ``Options``."""

    name: str
    what: str
    where: str
    options: List[str]


def escape(path: str) -> str:
    """A path as a part of a unit's name: ``systemd-escape --path``."""
    parts = [part for part in path.split("/") if part and part != "."]
    if not parts:
        return "-"
    text = "-".join("".join(_escaped(byte) for byte in os.fsencode(part)) for part in parts)
    return text if not text.startswith(".") else "\\x2e" + text[1:]


def name_of(where: str) -> str:
    """The name of the unit that mounts at ``where``; systemd follows links in it."""
    return escape(os.path.realpath(where)) + ".mount"


def native(root: str = "/") -> List[MountUnit]:
    """The mount units that are files of their own, so that fstab says nothing of them."""
    found, seen = [], set()
    for directory in SEARCHED:
        path = os.path.join(root, directory)
        for name in sorted(os.listdir(path)) if os.path.isdir(path) else []:
            if name.endswith(".mount") and name not in seen:
                seen.add(name)  # one that lies earlier in the search hides it, also when it is a link to /dev/null
                found += _read(os.path.join(path, name), name)
    return found


def _read(path: str, name: str) -> List[MountUnit]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    section, values = "", {}
    for line in lines:
        line = line.strip()
        if line.startswith("["):
            section = line
        elif section == "[Mount]" and "=" in line and line[0] not in "#;":
            key, _, value = line.partition("=")
            values[key.strip()] = value.strip()
    if "What" not in values or "Where" not in values:
        return []
    return [MountUnit(name, values["What"], values["Where"], values.get("Options", "").split(","))]


def _escaped(byte: int) -> str:
    return chr(byte) if chr(byte) in _PLAIN else "\\x%02x" % byte
