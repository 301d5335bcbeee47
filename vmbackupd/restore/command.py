"""The command that starts a machine which no libvirt ran, made from the one in the backup. Pure: text in, text out.

Whoever runs such machines has a way of their own to start them. So what is restored beside the volumes is a script with
the command as it was, the paths of images changed to where they lie now; a person puts it where it belongs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vmbackupd.hypervisor.qmp.blocks import Image
from vmbackupd.restore.address import TargetKind
from vmbackupd.restore.disks import PlacedVolume

_FORMAT_KEY = r"(?P<key>\b(?:format|driver)=)"


@dataclass(frozen=True, slots=True)
class CommandPlan:
    """The script that will be written to ``path``, None where the restore has no directory for it. ``attached`` are the
    ids of the volumes that it names; ``notes`` are sentences on what its reader has to change."""

    text: str
    path: str | None
    attached: frozenset[str]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return {"path": self.path, "text": self.text, "disks": sorted(self.attached)}


def plan_command(command: str, images: Mapping[str, Image], volumes: Sequence[PlacedVolume], *,
                 files: Mapping[str, str], path: str | None) -> CommandPlan:
    """``command`` with the restored volumes in the place of their old ``images`` (by volume id), and each file of
    ``files`` (old path: new path) in the place of the old."""
    notes: list[str] = []
    attached: set[str] = set()
    text = command if command.startswith("#!") else _script(command)
    for placed in volumes:
        image = images.get(placed.record.id)
        if image is None:
            continue  # a LUN that the guest attaches by itself
        if placed.target is None:
            notes.append(f"volume {placed.record.id} was left out: the command still names its old image {image.file}")
        elif placed.target.kind is TargetKind.ISCSI or not any(_names(word, image.file) for word in text.split()):
            notes.append(f"volume {placed.record.id}: put {placed.target} into the command by hand, in the place of"
                         f" {image.file}")
        else:
            text = _put(text, image, placed, notes)
            attached.add(placed.record.id)
    for old, new in files.items():
        text = _path(old).sub(lambda _: new, text)  # noqa: B023 - called at once
    notes.append("the command is the original's but for the images: its sockets, ports, MAC addresses and UUID are to"
                 " be changed before both run at the same time")
    return CommandPlan(text, path, frozenset(attached), tuple(notes))


def _script(command: str) -> str:
    """One command as a script, each option on a line of its own."""
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("-") and lines[-1]:
            lines.append([])
        lines[-1].append(shlex.quote(word))
    return "#!/bin/sh\nexec " + " \\\n    ".join(" ".join(line) for line in lines) + "\n"


def _path(path: str) -> re.Pattern[str]:
    """``path`` where it is no part of a longer one."""
    return re.compile(rf"(?<![\w./-]){re.escape(path)}(?![\w./-])")


def _names(text: str, path: str) -> bool:
    return _path(path).search(text) is not None


def _put(text: str, image: Image, placed: PlacedVolume, notes: list[str]) -> str:
    """The target's path in each word that names the old image, and its format where the word states one."""
    assert placed.target is not None
    new = "qcow2" if placed.target.kind is TargetKind.QCOW2 else "raw"
    stated = False

    def put(match: re.Match[str]) -> str:
        nonlocal stated
        word = match.group()
        if not _names(word, image.file):
            return word
        word, changed = re.subn(rf"{_FORMAT_KEY}{re.escape(image.format)}\b", rf"\g<key>{new}", word, count=1)
        stated = stated or changed > 0
        return _path(image.file).sub(lambda _: placed.target.file, word)  # type: ignore[union-attr]

    text = re.sub(r"\S+", put, text)
    if new != image.format and not stated:
        notes.append(f"volume {placed.record.id}: {placed.target} is {new}, its old image was {image.format}: state the"
                     " new format in the command")
    return text
