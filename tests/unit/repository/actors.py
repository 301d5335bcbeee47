"""Several hosts at work on one repository, storage operation by storage operation, in the order the test chooses.

Each actor is a thread with a repository object of its own. Its storage lets no operation through before the test says
so; listings take two operations, as a bucket's pages do. An actor can be killed at any operation, before or after its
effect, or be taken for dead while it goes on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vmbackupd.errors import BackupError, StorageError
from vmbackupd.repository import ObjectInfo

PATIENCE = 60.0  # seconds until a test gives up on an actor


class Killed(BaseException):
    """The process of this actor is no more."""


class Shared:
    """The objects, and who claimed which. ``certain``: is it known for sure who is dead?"""

    place = "memory"

    def __init__(self, *, certain: bool) -> None:
        self.certain_ends = certain
        self.lock = threading.RLock()
        self.objects: dict[str, bytes] = {}
        self.owners: dict[str, Actor] = {}
        self.dropped: set[str] = set()
        self.suspected: set[str] = set()
        self.limbo: list[tuple[str, bytes]] = []

    def put_if_absent(self, name: str, parts: Iterable[Any]) -> bool:
        data = b"".join(bytes(memoryview(part).cast("B")) for part in parts)
        with self.lock:
            return self.objects.setdefault(name, data) is data

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self.lock:
            if name not in self.objects:
                raise FileNotFoundError(name)
            return self.objects[name][offset : None if length is None else offset + length]

    def list(self, prefix: str, *, sizes: bool = True) -> Iterator[ObjectInfo]:
        with self.lock:
            found = [ObjectInfo(name, len(data)) for name, data in self.objects.items() if name.startswith(prefix)]
        return iter(sorted(found, key=lambda info: info.name))

    def stat(self, name: str) -> ObjectInfo | None:
        with self.lock:
            return ObjectInfo(name, len(self.objects[name])) if name in self.objects else None

    def delete(self, name: str) -> bool:
        with self.lock:
            return self.objects.pop(name, None) is not None

    def delete_many(self, names: Iterable[str]) -> int:
        return sum(self.delete(name) for name in list(names))

    def renew(self, names: Iterable[str]) -> int:
        return 0

    def open(self, name: str) -> int | None:
        data = self.get(name)
        if not name.startswith("indexes/"):
            return None
        descriptor = os.memfd_create(name)
        os.write(descriptor, data)
        return descriptor

    def claim(self, name: str, data: bytes) -> Any:
        return self.claim_for(None, name, data)

    def claim_for(self, owner: Actor | None, name: str, data: bytes) -> Held:
        if not self.put_if_absent(name, [data]):
            raise StorageError(f"{name} exists")
        if owner is not None:
            self.owners[name] = owner
        return Held(self, name)

    def abandoned(self, name: str) -> bool:
        with self.lock:
            owner = self.owners.get(name)
            dead = name in self.dropped or (owner is not None and (owner.killed or owner.done))
            return name in self.objects and (dead or (name in self.suspected and not self.certain_ends))

    def seems_dead(self, name: str) -> bool:
        with self.lock:
            return name not in self.objects or self.abandoned(name)

    def remove_temporaries(self) -> int:
        return 0

    def free_bytes(self) -> int | None:
        return None

    def create(self) -> None:
        """Nothing to be done."""

    def close(self) -> None:
        """Nothing is open."""


class Held:
    """A claim whose owner does not notice when it is taken for dead."""

    lost = False

    def __init__(self, shared: Shared, name: str) -> None:
        self.shared: Shared | None = shared
        self.name = name

    def release(self) -> None:
        shared, self.shared = self.shared, None
        if shared is not None:
            shared.delete(self.name)

    def __del__(self) -> None:
        if self.shared is not None:
            self.shared.dropped.add(self.name)


class GatedClaim:
    """A claim of an actor: giving it up is an operation like any other."""

    def __init__(self, gate: Gate, held: Held) -> None:
        self._gate = gate
        self._held = held

    @property
    def lost(self) -> bool:
        return self._held.lost

    def release(self) -> None:
        self._gate.operation(f"release {self._held.name}", self._held.release)


class Gate:
    """The storage as one actor sees it."""

    def __init__(self, actor: Actor, shared: Shared) -> None:
        self._actor = actor
        self._shared = shared

    @property
    def certain_ends(self) -> bool:
        return self._shared.certain_ends

    @property
    def place(self) -> str:
        return f"memory of {self._actor.name}"

    def operation(self, what: str, call: Callable[[], Any]) -> Any:
        return self._actor.operation(what, call)

    def put_if_absent(self, name: str, parts: Iterable[Any]) -> bool:
        data = b"".join(bytes(memoryview(part).cast("B")) for part in parts)
        self._actor.in_flight = (name, data)
        return bool(self.operation(f"put {name}", lambda: self._shared.put_if_absent(name, [data])))

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return bytes(self.operation(f"get {name}", lambda: self._shared.get(name, offset, length)))

    def list(self, prefix: str, *, sizes: bool = True) -> Iterator[ObjectInfo]:
        first = self.operation(f"list {prefix}", lambda: list(self._shared.list(prefix)))
        pivot = first[len(first) // 2].name if first else ""
        second = self.operation(f"list {prefix} on", lambda: list(self._shared.list(prefix)))
        yield from [info for info in first if info.name < pivot] + [info for info in second if info.name >= pivot]

    def stat(self, name: str) -> ObjectInfo | None:
        return self.operation(f"stat {name}", lambda: self._shared.stat(name))  # type: ignore[no-any-return]

    def delete(self, name: str) -> bool:
        return bool(self.operation(f"delete {name}", lambda: self._shared.delete(name)))

    def delete_many(self, names: Iterable[str]) -> int:
        return sum(self.delete(name) for name in list(names))

    def renew(self, names: Iterable[str]) -> int:
        return 0

    def open(self, name: str) -> int | None:
        return self.operation(f"open {name}", lambda: self._shared.open(name))  # type: ignore[no-any-return]

    def claim(self, name: str, data: bytes) -> GatedClaim:
        held = self.operation(f"claim {name}", lambda: self._shared.claim_for(self._actor, name, data))
        return GatedClaim(self, held)

    def abandoned(self, name: str) -> bool:
        there = self.operation(f"abandoned {name}", lambda: self._shared.stat(name) is not None)
        # one that ended in good order between the two operations seems dead, as a file that is opened, then locked
        gone = self.operation(f"abandoned {name} on", lambda: self._shared.seems_dead(name))
        return bool(there and gone)

    def remove_temporaries(self) -> int:
        return 0

    def free_bytes(self) -> int | None:
        return None

    def create(self) -> None:
        """Nothing to be done."""

    def close(self) -> None:
        """Nothing is open."""


class Actor:
    """Work in a thread that stops before every storage operation."""

    def __init__(self, name: str, shared: Shared, work: Callable[[Actor, Gate], None]) -> None:
        self.name = name
        self.shared = shared
        self.killed = False
        self.done = False
        self.error: BaseException | None = None
        self.in_flight: tuple[str, bytes] | None = None
        self.log: list[str] = []
        self.fault: tuple[BackupError, bool] | None = None
        self._condition = threading.Condition()
        self._waiting: list[object] = []
        self._allowed: object | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()
        self._settle()

    def _run(self, work: Callable[[Actor, Gate], None]) -> None:
        try:
            work(self, Gate(self, self.shared))
        except (BackupError, Killed) as reason:
            self.error = reason.with_traceback(None)
        except BaseException as reason:
            self.error = reason
        finally:
            with self._condition:
                self.done = True
                self._condition.notify_all()

    def operation(self, what: str, call: Callable[[], Any]) -> Any:
        """Called by the actor's threads."""
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            self._condition.notify_all()
            while self._allowed is not ticket and not self.killed:
                self._condition.wait(PATIENCE)
        try:
            if self.killed:
                raise Killed
            self.log.append(what)
            fault, self.fault = self.fault, None
            if fault is not None and not fault[1]:
                raise fault[0]
            result = call()
            if fault is not None:
                raise fault[0]
            return result
        finally:
            with self._condition:
                self._waiting.remove(ticket)
                if self._allowed is ticket:
                    self._allowed = None
                self._condition.notify_all()

    def step(self, count: int = 1) -> None:
        """Let this many operations through, and the actor run to the next one."""
        for _ in range(count):
            with self._condition:
                if self.done or not self._waiting:
                    return
                self._allowed = self._waiting[0]
                self._condition.notify_all()
                assert self._condition.wait_for(lambda: self._allowed is None, PATIENCE), f"{self.name} hangs"
            self._settle()

    def step_until(self, what: str) -> None:
        """Let operations through until one begins with ``what``, that one included."""
        for _ in range(10_000):
            self.step()
            if self.done or self.log[-1].startswith(what):
                return

    def finish(self) -> None:
        """Let it run to its end."""
        while not self.done:
            self.step(100)
        self._thread.join(PATIENCE)

    def kill(self, *, after_effect: bool = False, delayed: bool = False) -> None:
        """Kill it at its next operation: before it, after its effect, or, with ``delayed``, with a put on its way."""
        if after_effect:
            self.fault = (StorageError("the answer was lost"), True)
            self.step()
        if delayed and self.in_flight is not None and not self.done:
            self.shared.limbo.append(self.in_flight)
        with self._condition:
            self.killed = True
            self._condition.notify_all()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"{self.name} survives"

    def _settle(self) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self.done or self._waiting, PATIENCE), f"{self.name} hangs"
