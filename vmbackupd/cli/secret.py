"""Secrets on the command line's side: asked for or read from a file, and handed to the daemon through a pipe. Never an
option, which every user of the host could read in the list of processes."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from vmbackupd.errors import InvalidArgument

LONGEST = 32 * 1024  # bytes; fits a pipe, so that writing it never waits


def read_secret(file: str | None, what: str, *, twice: bool = False) -> bytes:
    """The content of ``file`` (``-``: standard input) without its last line end, or what the person at the terminal
    types, if asked for ``twice`` the same both times.

    Raises ``InvalidArgument``.
    """
    if file is None:
        data = _ask(what, twice)
    else:
        try:
            if file == "-":
                data = sys.stdin.buffer.read(LONGEST + 1)
            else:
                with open(file, "rb") as opened:
                    data = opened.read(LONGEST + 1)
        except OSError as error:
            raise InvalidArgument(f"the {what} cannot be read from {file}: {error.strerror}") from error
        data = data.removesuffix(b"\n").removesuffix(b"\r")
    if not data:
        raise InvalidArgument(f"the {what} is empty")
    if len(data) > LONGEST:
        raise InvalidArgument(f"the {what} is longer than {LONGEST} bytes")
    return data


def _ask(what: str, twice: bool) -> bytes:
    if not sys.stdin.isatty():
        raise InvalidArgument(
            f"there is no terminal to ask for the {what}: name a file that holds it (- is standard input)"
        )
    try:
        text = getpass.getpass(f"{what}: ")
        if twice and getpass.getpass(f"{what} again: ") != text:
            raise InvalidArgument(f"the {what} was not the same twice")
    except EOFError:
        raise InvalidArgument(f"no {what} was given") from None
    return text.encode()


@contextmanager
def handed_over(secret: bytes) -> Iterator[int]:
    """A descriptor from which ``secret`` can be read once."""
    reading, writing = os.pipe()
    try:
        try:
            os.write(writing, secret)
        finally:
            os.close(writing)
        yield reading
    finally:
        os.close(reading)


class Reply:
    """A pipe in which the daemon puts a secret for us, as a context manager."""

    def __enter__(self) -> Reply:
        self._reading, self.descriptor = os.pipe()
        return self

    def __exit__(self, *exc: object) -> None:
        self._close_writing()
        os.close(self._reading)

    def read(self) -> str:
        """What was put in, empty if nothing was. To be called when the daemon has answered."""
        self._close_writing()
        os.set_blocking(self._reading, False)  # the daemon may not have closed its end yet
        try:
            return os.read(self._reading, LONGEST).decode("ascii", "replace").strip()
        except BlockingIOError:
            return ""

    def _close_writing(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
