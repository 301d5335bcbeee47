"""Claims in an object store: a lease that a thread renews, and that ends by the store's clock."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from typing import Protocol

from vmbackupd.errors import BackupError, StorageError
from vmbackupd.repository.s3objects import Objects

log = logging.getLogger(__name__)

RENEWALS = 5  # in the time of a lease
SAFE = 0.8  # of a lease, after which its holder takes it for lost


def lease_name(name: str) -> str:
    """The object that is written over again and again while the claim ``name`` is held."""
    return f"leases/{name}"


class Leases(Protocol):
    """Where claims live."""

    @property
    def objects(self) -> Objects: ...
    def delete(self, name: str) -> bool: ...


def now() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseClaim:
    """A claim that counts as held as long as its lease is renewed."""

    def __init__(self, storage: Leases, name: str, seconds: float, began: float) -> None:
        """The object ``name`` exists already; the caller began to make it at ``began``, by ``now``."""
        self.name = name
        self.seconds = seconds
        self._storage = storage
        self._version: str | None = None
        self._renewed = began
        self._gone = False
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_keep, args=(weakref.ref(self), self._stop, seconds / RENEWALS), name=f"lease of {name}", daemon=True
        )
        self._thread.start()

    def __del__(self) -> None:
        self._stop.set()  # a claim that nobody holds any more runs out

    @property
    def lost(self) -> bool:
        """Could others take us for dead? True from a moment before they can."""
        return self._gone or self._stop.is_set() or now() - self._renewed > self.seconds * SAFE

    def renew(self) -> None:
        """Write the lease anew; StorageError leaves it as old as it is."""
        began = now()
        objects = self._storage.objects
        self._version = objects.touch(lease_name(self.name), b"{}\n", self._version)
        if objects.stat(self.name) is None:
            self._gone = True
            log.warning("the claim %s was removed by somebody else", self.name)
        elif not self.lost:  # what ran out stays lost: others may have acted on it
            self._renewed = began

    def release(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()  # or it would write the lease once more
        self._storage.delete(self.name)
        self._storage.objects.delete(lease_name(self.name))  # that of a dead host is removed in time, see s3.py


def _keep(claim_ref: weakref.ref[LeaseClaim], stop: threading.Event, interval: float) -> None:
    """Renew until the claim is released, lost, or nobody has it any more."""
    pause = interval
    while not stop.wait(pause):
        claim = claim_ref()
        if claim is None or claim.lost:
            return
        try:
            claim.renew()
            pause = interval
        except BackupError as reason:
            log.warning("renewing the lease of %s: %s", claim.name, reason)
            pause = interval / 4
        except FileNotFoundError as reason:  # the bucket is gone
            log.warning("renewing the lease of %s: %s", claim.name, StorageError(str(reason)))
            pause = interval
        del claim
