"""Where a repository's objects lie: the interface that every kind of storage implements.

An object is written once and whole; it never changes, it only disappears. Names are relative paths of 1 to 3 parts
(``packs/3f/3f0c...``). A missing object is the built-in ``FileNotFoundError``; a storage that fails raises
``StorageError``, one that is full ``RepositoryFull``, both naming the place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,199}){0,2}")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object that exists: its name, and its size in bytes (-1: nobody asked for it)."""

    name: str
    size: int


class Claim(Protocol):
    """An object that tells that its maker is alive."""

    @property
    def lost(self) -> bool:
        """May others take the maker for dead (its lease ran out, or the object was removed)? Never back to False."""

    def release(self) -> None:
        """Remove the object. Safe to call twice."""


class Storage(Protocol):
    """A flat set of named objects. Methods may be called by any thread.

    What one of them has done, every reader and every listing that begins later sees, on any host.
    """

    def create(self) -> None:
        """Make the place ready for a repository, once: StorageUnsuitable tells what it lacks. Safe to call again."""

    def put_if_absent(self, name: str, parts: Iterable[Buffer]) -> bool:
        """Write an object of these bytes, durable when this returns; False if the name is taken, which then stays."""

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Up to ``length`` bytes from ``offset``; fewer at the object's end."""

    def list(self, prefix: str, *, sizes: bool = True) -> Iterator[ObjectInfo]:
        """Objects whose name begins with ``prefix``, in any order. ``prefix`` contains the whole first part.

        Without ``sizes`` they need not be told (-1): a directory's names are read far faster.
        """

    def stat(self, name: str) -> ObjectInfo | None:
        """The object, or None if there is none."""

    def delete(self, name: str) -> bool:
        """Remove an object; False if there was none. ObjectLocked where the store keeps it for now."""

    def delete_many(self, names: Iterable[str]) -> int:
        """Remove objects, with fewer requests than one by one; how many there were. ObjectLocked if some are kept:
        the others are gone then."""

    def renew(self, names: Iterable[str]) -> int:
        """Make the object locks of objects last anew where less than half of their time is left; how many were. 0 where
        there are no locks."""

    def open(self, name: str) -> int | None:
        """A file descriptor to read the object from, the caller's to close; None where objects are no files. Index
        objects can be opened everywhere: they are copied to a file, once where there is a cache."""

    def claim(self, name: str, data: bytes) -> Claim:
        """Create an object that counts as abandoned when this process has ended, however it ended. StorageError if
        the name is taken."""

    @property
    def certain_ends(self) -> bool:
        """Is ``abandoned`` proof that the maker has ended? If not, it may be alive and slow, and must be fenced."""

    def abandoned(self, name: str) -> bool:
        """Has the process that claimed this object ended, as far as can be told? False if there is no such object."""

    def remove_temporaries(self) -> int:
        """Remove what writers that were killed left half written, and nothing of a living one; how many things."""

    def free_bytes(self) -> int | None:
        """Bytes that can still be written, None where there is no telling."""

    def close(self) -> None:
        """Give up descriptors and connections. Safe to call twice."""

    @property
    def place(self) -> str:
        """Where this is, for messages."""


def check_name(name: str) -> str:
    """``name`` if it is an object's name; ValueError otherwise, so that no name leads outside of the storage."""
    if not NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no object name")
    return name
