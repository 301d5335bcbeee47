"""The undo journal: what a job did to guest and host, written down before it is done.

One file a job, ``<state>/journal/<job>.jsonl``: a header line, then a line ``{"seq", "undo", "args"}`` before each
effect and ``{"done": seq}`` after its undo. Each line is fsynced before the call returns; the directory is fsynced
when the file is made and when it is removed. A torn last line is a line whose effect has not begun. The file is
removed when nothing is left to undo, so a file that is there at start belongs to a daemon that died.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from vmbackupd.errors import BackupError
from vmbackupd.host.newfile import sync


class JournalCorrupt(BackupError):
    """A journal does not parse; an administrator has to look at what its job left behind."""

    code = "JournalCorrupt"


@dataclass(frozen=True, slots=True)
class Entry:
    """One effect that has to be undone: the name of its undo and that undo's arguments."""

    seq: int
    undo: str
    args: dict[str, str]


@dataclass(frozen=True, slots=True)
class Header:
    """Whose journal it is."""

    job: str
    kind: str
    vm: str
    uuid: str


class Journal:
    """An open journal. Raises ``OSError`` when a line cannot be made durable: the effect must then not happen."""

    def __init__(self, path: Path, header: Header, pending: dict[int, Entry], fd: int, last: int) -> None:
        self.path = path
        self.header = header
        self._pending = pending
        self._fd = fd
        self._next = last + 1

    @classmethod
    def create(cls, directory: Path, header: Header) -> Journal:
        """Begin the journal of a new job."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = directory / f"{header.job}.jsonl"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        journal = cls(path, header, {}, fd, 0)
        journal._write({"job": header.job, "kind": header.kind, "vm": header.vm, "uuid": header.uuid})
        sync(directory)
        return journal

    @classmethod
    def load(cls, path: Path) -> Journal:
        """Open the journal a dead daemon left.

        Raises ``JournalCorrupt`` when a line other than the last is damaged.
        """
        header, pending, last, whole = _read(path)
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        if os.fstat(fd).st_size > whole:
            os.ftruncate(fd, whole)
        return cls(path, header, pending, fd, last)

    @property
    def pending(self) -> list[Entry]:
        """What is still to be undone, in the order to undo it: newest first."""
        return sorted(self._pending.values(), key=lambda entry: -entry.seq)

    def record(self, undo: str, **args: str) -> Entry:
        """Write down how to undo the effect that is about to happen."""
        entry = Entry(self._next, undo, args)
        self._write({"seq": entry.seq, "undo": undo, "args": args})
        self._next += 1
        self._pending[entry.seq] = entry
        return entry

    def done(self, entry: Entry) -> None:
        """The effect of ``entry`` is undone."""
        self._write({"done": entry.seq})
        del self._pending[entry.seq]

    def close(self) -> None:
        """Close the file, and remove it when nothing is left to undo."""
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        if not self._pending:
            self.path.unlink()
            sync(self.path.parent)

    def _write(self, record: dict[str, object]) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        written = os.write(self._fd, line)
        if written != len(line):
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(f"journal {self.path}: short write, the disk is full")
        os.fsync(self._fd)


def look(path: Path) -> tuple[Header, list[Entry]]:
    """Whose a journal is, and what is pending in it, without touching it: somebody may be at work on it.

    Raises ``JournalCorrupt`` and ``OSError`` like :meth:`Journal.load`.
    """
    header, pending, _, _ = _read(path)
    return header, list(pending.values())


def _read(path: Path) -> tuple[Header, dict[int, Entry], int, int]:
    """Header, pending entries by number, the last number, and the length of the whole lines in bytes."""
    data = path.read_bytes()
    lines = data.split(b"\n")
    torn = lines.pop()  # after the last newline: empty, or a line that was cut off
    try:
        records = [json.loads(line) for line in lines]
        head = records[0] if records else {"job": path.stem, "kind": "unknown", "vm": "", "uuid": ""}
        header = Header(str(head["job"]), str(head["kind"]), str(head["vm"]), str(head["uuid"]))
        pending: dict[int, Entry] = {}
        last = 0
        for record in records[1:]:
            if "done" in record:
                pending.pop(int(record["done"]), None)
            else:
                last = int(record["seq"])
                args = {str(key): str(value) for key, value in record["args"].items()}
                pending[last] = Entry(last, str(record["undo"]), args)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise JournalCorrupt(
            f"journal {path} is damaged ({error}): see what its job left on the VM, then remove the file"
        ) from error
    return header, pending, last, len(data) - len(torn)
