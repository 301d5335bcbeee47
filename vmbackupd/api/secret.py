"""Secrets travel in file descriptors: a message on the bus can be seen and recorded by whoever may monitor it."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from vmbackupd.errors import InvalidArgument

LONGEST = 64 * 1024  # bytes
TIMEOUT = 10.0  # seconds; the caller has it at hand when it calls


def read_secret(descriptor: int) -> bytes:
    """What the caller put into a pipe, a memfd or a file, up to its end. Blocks, at most :data:`TIMEOUT`.

    Raises ``InvalidArgument`` for one that is empty, too long, or does not end in time; never with a word of it.
    """
    deadline = time.monotonic() + TIMEOUT
    data = b""
    while True:
        _wait(descriptor, select.POLLIN, deadline)
        try:
            part = os.read(descriptor, LONGEST + 1 - len(data))
        except OSError as error:
            raise InvalidArgument(f"the descriptor of a secret cannot be read: {error.strerror}") from None
        if not part:
            break
        data += part
        if len(data) > LONGEST:
            raise InvalidArgument(f"a secret has at most {LONGEST} bytes")
    if not data:
        raise InvalidArgument("the descriptor of a secret is empty")
    return data


def revealer(descriptor: int) -> Callable[[str], None]:
    """What writes a secret to the caller's descriptor. Blocks, at most :data:`TIMEOUT`; raises ``InvalidArgument`` if
    the caller does not take it."""

    def reveal(text: str) -> None:
        data = text.encode()
        deadline = time.monotonic() + TIMEOUT
        while data:
            _wait(descriptor, select.POLLOUT, deadline)
            try:
                data = data[os.write(descriptor, data) :]
            except OSError as error:
                raise InvalidArgument(f"the recovery key cannot be handed over: {error.strerror}") from None

    return reveal


def _wait(descriptor: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(descriptor, event)
    found = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    if not found or found[0][1] & select.POLLNVAL:
        raise InvalidArgument("the descriptor of a secret is not ready")
