"""Lines of /etc/fstab: which of them mount a filesystem, and their first field changed with every other byte kept."""

import re
from typing import Dict, List, NamedTuple, Optional

from . import mounts

_FIELDS = re.compile(r"[^ \t]+")
_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_UDEV = re.compile(r"\\x([0-9a-fA-F]{2})")


class Filesystem(NamedTuple):
    """What a line may call a filesystem by: its device's number and, empty where it has none, its names."""

    devno: str
    uuid: str
    label: str
    partuuid: str
    partlabel: str


class Entry(NamedTuple):
    """A line that mounts something. ``spec`` and ``path`` are as they stand there; ``nth`` numbers a path's lines."""

    spec: str
    path: str
    options: List[str]
    nth: int

    @property
    def where(self) -> str:
        """The mount point."""
        return mounts.unescape(self.path)

    @property
    def key(self) -> str:
        """What finds the line again when others have come or gone."""
        return "%d %s" % (self.nth, self.path)


def of_udev(properties: Dict[str, str], devno: str) -> Filesystem:
    """From udev's properties of a device."""

    def name(key: str) -> str:
        return _UDEV.sub(lambda found: chr(int(found.group(1), 16)), properties.get(key, ""))

    return Filesystem(
        devno, name("ID_FS_UUID_ENC"), name("ID_FS_LABEL_ENC"), name("ID_PART_ENTRY_UUID"), name("ID_PART_ENTRY_NAME")
    )


def entries(text: str) -> List[Entry]:
    """The lines that are neither empty nor a comment, in their order."""
    return [entry for entry in _parsed(_LINES.findall(text)) if entry is not None]


def change(text: str, specs: Dict[str, str]) -> str:
    """``text`` with new first fields for the lines of these keys."""
    lines = _LINES.findall(text)
    for number, entry in enumerate(_parsed(lines)):
        if entry is not None and entry.key in specs:
            start = lines[number].index(entry.spec)
            lines[number] = lines[number][:start] + specs[entry.key] + lines[number][start + len(entry.spec) :]
    return "".join(lines)


def means(spec: str, filesystem: Filesystem) -> bool:
    """Whether a first field stands for ``filesystem``."""
    if spec.startswith("/"):
        return mounts.devno_of_node(mounts.unescape(spec)) == filesystem.devno
    tag, _, value = spec.partition("=")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1]
    value = mounts.unescape(value)
    if tag == "ID":
        return mounts.devno_of_node("/dev/disk/by-id/" + value) == filesystem.devno
    if tag in ("UUID", "PARTUUID"):
        return bool(value) and value.lower() == getattr(filesystem, tag.lower()).lower()
    return tag in ("LABEL", "PARTLABEL") and bool(value) and value == getattr(filesystem, tag.lower())


def by_uuid(spec: str) -> bool:
    """Whether a first field that stands for a filesystem does so by its UUID, wherever that is found."""
    return spec.startswith(("UUID=", "/dev/disk/by-uuid/"))


def _parsed(lines: List[str]) -> List[Optional[Entry]]:
    found: List[Optional[Entry]] = []
    seen: Dict[str, int] = {}
    for line in lines:
        fields = _FIELDS.findall(line.rstrip("\r\n"))
        if len(fields) < 2 or fields[0].startswith("#"):
            found.append(None)
            continue
        spec, path = fields[0], fields[1]
        nth = seen.get(path, 0)
        seen[path] = nth + 1
        found.append(Entry(spec, path, fields[3].split(",") if len(fields) > 3 else [], nth))
    return found
