"""Objects of a bucket that are written once: how a put is made exclusive, in buckets with and without versions.

Without versions the store does it: ``If-None-Match: *``, probed when the repository is made.

With versions (object lock needs them) some stores, Ceph 16 among them, ignore that header: every put succeeds and adds
a version. So a name's versions and delete markers, in the order the store gives them, are read as a log. Replayed from
the oldest: a version makes the object if there is none, and otherwise means nothing; a delete marker ends it. The put
whose version made the object has won. The order is the store's own and never changes, so all see the same winner, and a
later version, an attacker's for instance, replaces nothing. docs/storage.md has the argument.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vmbackupd.errors import ObjectLocked, StorageDenied, StorageError
from vmbackupd.repository import s3capabilities
from vmbackupd.repository.s3capabilities import CONDITIONAL, Capabilities
from vmbackupd.repository.s3client import BeyondEnd, Body, Reply, S3Client, Taken, Version
from vmbackupd.repository.s3upload import Lock, Upload, locked_until, new_token, token_of, upload
from vmbackupd.repository.storage import ObjectInfo

if TYPE_CHECKING:
    from typing_extensions import Buffer

UNIQUE = ("packs", "indexes")
"""First parts of names that carry a random id: no two writers ever put the same one."""
VOLATILE = ("sessions", "leases", "condemned", "waits", "protected", "indexes", "probe")
"""First parts of names that are never locked: they come and go, and no backup is lost with one."""
BATCH = 1000  # names in one DeleteObjects
REMEMBERED = 32768
SHORT_LOCK = 2.0  # seconds, for volatile objects in a bucket that would lock them for long
DAY = 86400.0
LONGEST_PUT = 3600.0

Log = list[Version]
"""All versions and delete markers of one name, the newest first."""


def first_part(name: str) -> str:
    """``packs`` of ``packs/3f/3f0c...``."""
    return name.partition("/")[0]


class Objects(Protocol):
    """Objects by name, with the prefix put before. The methods mean what those of ``Storage`` do."""

    def put(self, name: str, parts: Iterable[Buffer]) -> bool: ...
    def get(self, name: str, offset: int, length: int | None) -> bytes: ...
    def list(self, prefix: str) -> Iterator[ObjectInfo]: ...
    def stat(self, name: str) -> ObjectInfo | None: ...
    def delete(self, name: str) -> bool: ...
    def delete_many(self, names: Sequence[str]) -> int: ...
    def renew(self, name: str) -> bool: ...
    def touch(self, name: str, data: bytes, previous: str | None) -> str | None:
        """Put a volatile object over itself; ``previous`` and the result are its version, if there are such."""


class Bucket:
    """What both kinds have in common."""

    def __init__(self, client: S3Client, prefix: str, capabilities: Capabilities) -> None:
        self.client = client
        self.prefix = prefix
        self.capabilities = capabilities

    def key(self, name: str) -> str:
        return self.prefix + name

    def lock_of(self, name: str) -> Lock | None:
        """The lock that a new object of this name gets."""
        now, capabilities = self.client.server_time(), self.capabilities
        if first_part(name) in VOLATILE:
            # 1 more for rounding: the store compares with fractions
            return Lock("governance", float(int(now + SHORT_LOCK + 1))) if capabilities.bucket_retention else None
        if capabilities.lock_days:
            return Lock(capabilities.lock_mode, now + capabilities.lock_days * DAY)
        return None

    def error(self, name: str, message: str) -> StorageError:
        return StorageError(f"{self.client.place}: {name}: {message}")

    def head(self, name: str, version: str | None = None) -> Reply:
        more: dict[str, Any] = {} if version is None else {"VersionId": version}
        return self.client.call("head_object", name, Key=self.key(name), **more)

    def check(self, name: str, sent: Upload, size: int, etag: str) -> None:
        """StorageError unless what the store tells of an object is what was sent."""
        if size != sent.size:
            raise self.error(name, f"the store acknowledged {sent.size} bytes and holds {size}: it loses data")
        if self.capabilities.etag_is_md5 and etag != sent.etag:
            raise self.error(name, f"the store holds other bytes than were sent (checksum {etag}, not {sent.etag})")

    def renew(self, name: str) -> bool:
        if first_part(name) in VOLATILE or not self.capabilities.lock_days:
            return False
        head = self.head(name, self.version_of(name))
        now, days = self.client.server_time(), self.capabilities.lock_days
        if (locked_until(head) or 0.0) > now + days * DAY / 2:
            return False
        lock = Lock(self.capabilities.lock_mode, now + days * DAY)
        more: dict[str, Any] = {} if head.version is None else {"VersionId": head.version}
        self.client.call("put_object_retention", name, Key=self.key(name), Retention=lock.retention(), **more)
        return True

    def version_of(self, name: str) -> str | None:
        return None

    def _is_ours(self, name: str, token: str, version: str | None = None) -> bool:
        """Has the put with this token made the object, or this version? False if it was removed meanwhile."""
        with contextlib.suppress(FileNotFoundError):
            return token_of(self.head(name, version or self.version_of(name))) == token
        return False

    def remove_keys(self, keys: Sequence[dict[str, str]], what: str) -> list[str]:
        """DeleteObjects; the keys that the store refused to remove."""
        refused = []
        for start in range(0, len(keys), BATCH):
            batch = {"Objects": list(keys[start : start + BATCH]), "Quiet": True}
            reply = self.client.call("delete_objects", what, Delete=batch)
            for error in reply.fields.get("Errors", ()):
                if error.get("Code") not in ("NoSuchKey", "NoSuchVersion"):
                    refused.append(str(error.get("Key")))
        return refused


class PlainObjects(Bucket):
    """A bucket without versions: If-None-Match decides who wins."""

    def put(self, name: str, parts: Iterable[Buffer]) -> bool:
        in_parts = self.capabilities.conditional_parts or first_part(name) in UNIQUE
        token = new_token()
        try:
            sent = upload(
                self.client,
                self.key(name),
                name,
                parts,
                token=token,
                lock=self.lock_of(name),
                exclusive=True,
                in_parts=in_parts,
            )
        except Taken:
            # an attempt whose answer was lost may have been ours
            return self._is_ours(name, token)
        if sent.version is not None:
            raise self.error(name, "versioning was switched on meanwhile: open the repository again")
        self._look(name, sent)
        return True

    def _look(self, name: str, sent: Upload) -> None:
        """Is there what was acknowledged? What is there and wrong is removed."""
        try:
            head = self.head(name)
        except FileNotFoundError:
            raise self.error(
                name, f"the store acknowledged {sent.size} bytes and holds nothing: it loses data"
            ) from None
        if token_of(head) not in (sent.token, None):
            raise self.error(name, "the store let another writer replace it: it ignores If-None-Match")
        try:
            self.check(name, sent, int(head.fields["ContentLength"]), head.etag)
        except StorageError:
            with contextlib.suppress(StorageError, FileNotFoundError):
                self.client.call("delete_object", name, Key=self.key(name))
            raise

    def get(self, name: str, offset: int, length: int | None) -> bytes:
        if length == 0:
            self.head(name)
            return b""
        try:
            return self.client.get(self.key(name), name, offset=offset, length=length, version=None)
        except BeyondEnd:
            return b""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for key, size in self.client.list(self.key(prefix)):
            yield ObjectInfo(key.removeprefix(self.prefix), size)

    def stat(self, name: str) -> ObjectInfo | None:
        try:
            return ObjectInfo(name, int(self.head(name).fields["ContentLength"]))
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> bool:
        if self.stat(name) is None:
            return False
        self.client.call("delete_object", name, Key=self.key(name))
        return True

    def delete_many(self, names: Sequence[str]) -> int:
        refused = self.remove_keys([{"Key": self.key(name)} for name in names], "several objects")
        if refused:
            raise StorageDenied(
                f"{self.client.place}: the store removed {len(refused)} objects not, such as {refused[0]}"
            )
        return len(names)

    def touch(self, name: str, data: bytes, previous: str | None) -> str | None:
        return self.client.put(self.key(name), Body([data]), name).version


class VersionedObjects(Bucket):
    """A bucket with versions: the log of a name's versions decides who wins."""

    def __init__(self, client: S3Client, prefix: str, capabilities: Capabilities) -> None:
        super().__init__(client, prefix, capabilities)
        self._lock = threading.Lock()
        self._known: collections.OrderedDict[str, str] = collections.OrderedDict()

    # ---- the log

    def log(self, name: str) -> Log:
        """All versions and delete markers of this very name, the newest first."""
        key = self.key(name)
        # keys are listed in order, and longer ones come after
        return list(itertools.takewhile(lambda version: version.key == key, self.client.versions(key)))

    def current(self, name: str, log: Sequence[Version]) -> Version | None:
        """The version that is the object."""
        found: Version | None = None
        for entry in reversed(log):
            if entry.marker:
                if found is not None and self._ends(name, entry, found):
                    found = None
            elif found is None:
                found = entry
        return found

    def _ends(self, name: str, marker: Version, version: Version) -> bool:
        """Does this marker end the object? Not while the object was locked: we never put one then, so it is somebody
        else's attempt to hide a backup."""
        if name == s3capabilities.NAME:
            return False
        locked = 0.0 if first_part(name) in VOLATILE else self.capabilities.lock_days * DAY
        # a lock is counted from the beginning of a put, ``modified`` from its end
        return marker.modified >= version.modified + locked - min(LONGEST_PUT, locked / 2)

    def _remember(self, name: str, version: str) -> None:
        with self._lock:
            self._known[name] = version
            self._known.move_to_end(name)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._known.pop(name, None)

    def version_of(self, name: str) -> str | None:
        """FileNotFoundError if there is no such object."""
        with self._lock:
            version = self._known.get(name)
        if version is None:
            found = self.current(name, self.log(name))
            if found is None:
                raise FileNotFoundError(f"{self.client.place}: {name}")
            version = found.id
            self._remember(name, version)
        return version

    # ---- objects

    def put(self, name: str, parts: Iterable[Buffer]) -> bool:
        if first_part(name) not in UNIQUE and self.stat(name) is not None:
            return False  # saves a version that could be locked
        token = new_token()
        try:
            sent = upload(
                self.client,
                self.key(name),
                name,
                parts,
                token=token,
                lock=self.lock_of(name),
                exclusive=self.capabilities.conditional_put,
                in_parts=True,
            )
        except Taken:
            return self._is_ours(name, token)
        if sent.version is None:
            raise self.error(name, "versioning was switched off: switch it on again")
        log = self.log(name)
        mine = next((entry for entry in log if entry.id == sent.version), None)
        if mine is None:
            raise self.error(name, "the store acknowledged it and does not list it: it loses data, or it was removed")
        try:
            self.check(name, sent, mine.size, mine.etag)
        except StorageError:
            self._discard(name, sent.version)
            raise
        found = self.current(name, log)
        if found is not None and found.id == sent.version:
            self._remember(name, sent.version)
            return True
        # an earlier attempt, whose answer was lost, may have won
        ours = sent.attempts > 1 and found is not None and self._is_ours(name, token, found.id)
        self._discard(name, sent.version)
        return ours

    def _discard(self, name: str, version: str) -> None:
        """Remove a version that means nothing. It may be locked: then it stays and still means nothing."""
        with contextlib.suppress(StorageError, FileNotFoundError):
            self.client.call("delete_object", name, Key=self.key(name), VersionId=version)

    def get(self, name: str, offset: int, length: int | None) -> bytes:
        for _ in range(2):
            version = self.version_of(name)
            try:
                if length == 0:
                    return b""
                return self.client.get(self.key(name), name, offset=offset, length=length, version=version)
            except BeyondEnd:
                return b""
            except FileNotFoundError:
                self._forget(name)  # removed, perhaps made anew since we learned its version
        raise FileNotFoundError(f"{self.client.place}: {name}")

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        for key, group in itertools.groupby(self.client.versions(self.key(prefix)), key=lambda version: version.key):
            name = key.removeprefix(self.prefix)
            found = self.current(name, list(group))
            if found is not None:
                self._remember(name, found.id)
                yield ObjectInfo(name, found.size)

    def stat(self, name: str) -> ObjectInfo | None:
        found = self.current(name, self.log(name))
        return None if found is None else ObjectInfo(name, found.size)

    # ---- removing

    def delete(self, name: str) -> bool:
        log = self.log(name)
        self._forget(name)
        if not log:
            return False
        existed = self.current(name, log) is not None
        self._refuse_locked(name, log)
        if existed and first_part(name) not in UNIQUE:
            log = self._mark(name)
        for entry in sorted(log, key=lambda entry: entry.marker):  # markers last: they keep the rest dead
            self._remove(name, entry)
        return existed

    def _mark(self, name: str) -> Log:
        """End the object for everybody, at one instant; the log up to there. A version that is put later comes after
        the marker, so none of those that are removed now can be the object once the marker is gone too."""
        marker = self.client.call("delete_object", name, Key=self.key(name)).version
        log = self.log(name)
        at = next((index for index, entry in enumerate(log) if entry.id == marker), None)
        # gone: another host deletes the same name, and has finished with what was older than this marker
        return [] if at is None else log[at:]

    def _refuse_locked(self, name: str, log: Sequence[Version]) -> None:
        if not (self.capabilities.lock_days or self.capabilities.bucket_retention) or first_part(name) in VOLATILE:
            return
        until = 0.0
        for entry in log:
            if not entry.marker:
                with contextlib.suppress(FileNotFoundError):
                    until = max(until, locked_until(self.head(name, entry.id)) or 0.0)
        if until > self.client.server_time():
            raise self.locked(name, until)

    def locked(self, name: str, until: float | None) -> ObjectLocked:
        if until == float("inf"):
            when = "by a legal hold"
        elif until is None:
            when = "for now"
        else:
            when = f"until {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime(until))}"
        return ObjectLocked(f"{self.client.place}: {name} is locked {when}", until=until)

    def _remove(self, name: str, entry: Version) -> None:
        """Remove one version for good."""
        patience = time.monotonic() + SHORT_LOCK + 3
        while True:
            try:
                with contextlib.suppress(FileNotFoundError):
                    self.client.call("delete_object", name, Key=self.key(name), VersionId=entry.id)
                return
            except StorageDenied as reason:
                short = self.capabilities.bucket_retention and first_part(name) in VOLATILE
                if not short or time.monotonic() > patience:
                    if "lock" in str(reason).lower() or self.capabilities.lock_days:
                        raise self.locked(name, None) from reason
                    raise
                time.sleep(0.5)

    def delete_many(self, names: Sequence[str]) -> int:
        """Names that are unique are removed in batches, after one request each to learn their versions."""
        count, locked, keys = 0, list[ObjectLocked](), list[dict[str, str]]()
        batched = not self.capabilities.bucket_retention
        for name in names:
            try:
                if batched and first_part(name) in UNIQUE:
                    log = self.log(name)
                    self._refuse_locked(name, log)
                    self._forget(name)
                    keys += [{"Key": entry.key, "VersionId": entry.id} for entry in log]
                    count += bool(log)
                else:
                    count += self.delete(name)
            except ObjectLocked as reason:
                locked.append(reason)
        refused = self.remove_keys(keys, "several objects")
        if refused:
            locked.append(self.locked(refused[0].removeprefix(self.prefix), None))
        if locked:
            until = max((reason.until or 0.0 for reason in locked), default=0.0)
            raise ObjectLocked(f"{locked[0]}, and {len(locked) - 1} others are", until=until or None)
        return count

    def touch(self, name: str, data: bytes, previous: str | None) -> str | None:
        lock = self.lock_of(name)
        more: dict[str, Any] = {} if lock is None else lock.parameters()
        version = self.client.put(self.key(name), Body([data]), name, **more).version
        if previous is not None:
            self._discard(name, previous)
        return version


def objects_of(client: S3Client, prefix: str, capabilities: Capabilities) -> PlainObjects | VersionedObjects:
    """The objects below ``prefix`` of a bucket with these capabilities."""
    kind = PlainObjects if capabilities.mode == CONDITIONAL else VersionedObjects
    return kind(client, prefix, capabilities)
