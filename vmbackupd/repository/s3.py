"""A bucket of an S3 store as storage. docs/storage.md: how to set one up, what is demanded of it, what it costs."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmbackupd.errors import BackupError, InvalidArgument, RepositoryMissing, StorageDenied, StorageError
from vmbackupd.repository import s3capabilities, s3probe
from vmbackupd.repository.objectcache import ObjectCache
from vmbackupd.repository.s3capabilities import CONDITIONAL, VERSIONS, Capabilities
from vmbackupd.repository.s3client import S3Client
from vmbackupd.repository.s3lease import LeaseClaim, lease_name, now
from vmbackupd.repository.s3objects import PlainObjects, VersionedObjects, first_part, objects_of
from vmbackupd.repository.s3options import S3Options
from vmbackupd.repository.storage import ObjectInfo, check_name

if TYPE_CHECKING:
    from typing_extensions import Buffer

CACHED = ("indexes",)
"""First parts of the names that ``open`` copies to files."""
DOWNLOAD = 16 * 2**20
STALE_UPLOAD = 86400.0  # seconds after which nobody can be working on an upload in parts any more
ROUNDED = 2.0  # seconds by which the difference of two times in HTTP's headers can be too large
STALE_LEASE = 10  # lifetimes of a lease after which one without a claim is removed


class S3Storage:
    """Objects below ``prefix`` of a bucket. Any number of hosts and threads at once."""

    certain_ends = False  # a lease that ran out proves nothing

    def __init__(self, bucket: str, prefix: str = "", options: S3Options | None = None) -> None:
        """Nothing is sent yet. ``prefix``: without slashes around it. InvalidArgument."""
        self.options = options or S3Options()
        if prefix and any(not part or part in (".", "..") for part in prefix.split("/")):
            raise InvalidArgument(f"{prefix!r} is no prefix of names: words with a slash between them are")
        self.place = f"s3://{bucket}/{prefix}" if prefix else f"s3://{bucket}"
        self._prefix = f"{prefix}/" if prefix else ""
        self.client = S3Client(bucket, self.options, self.place)
        self._lock = threading.Lock()
        self._objects: PlainObjects | VersionedObjects | None = None
        self._cache = ObjectCache(self._cache_directory())

    def __reduce__(self) -> tuple[type[S3Storage], tuple[str, str, S3Options]]:
        """Pickled by place: the copy, in another process, connects for itself. No secret of it is pickled."""
        return S3Storage, (self.client.bucket, self._prefix.rstrip("/"), self.options)

    def __repr__(self) -> str:
        return f"S3Storage({self.place!r})"

    def _cache_directory(self) -> Path | None:
        if self.options.cache_directory is None:
            return None
        where = f"{self.options.endpoint or ''} {self.place}"
        return self.options.cache_directory / hashlib.sha256(where.encode()).hexdigest()[:16]

    def close(self) -> None:
        self.client.close()

    def create(self) -> None:
        """Probe the bucket and note down what it can do. StorageUnsuitable, StorageError."""
        found = s3probe.probe(self.client, self._prefix)
        objects_of(self.client, self._prefix, found).put(s3capabilities.NAME, [found.encode()])
        with self._lock:
            self._objects = None

    @property
    def capabilities(self) -> Capabilities:
        """What the bucket can do, as ``create`` found out. RepositoryMissing, RepositoryCorrupt, StorageError."""
        return self.objects.capabilities

    @property
    def objects(self) -> PlainObjects | VersionedObjects:
        """The objects, read and written as the bucket demands it."""
        with self._lock:
            if self._objects is None:
                self._objects = self._open()
            return self._objects

    def _open(self) -> PlainObjects | VersionedObjects:
        mode = s3probe.mode_of(self.client)
        # enough to read the object that tells the rest
        least = Capabilities(mode, False, False, False, 0.0, "governance", False, 1)
        try:
            data = objects_of(self.client, self._prefix, least).get(s3capabilities.NAME, 0, 2**16)
        except FileNotFoundError:
            raise RepositoryMissing(
                f"there is no repository at {self.place}: make one with `vmbackupctl repository init`"
            ) from None
        found = Capabilities.decode(data, self.place)
        if mode == CONDITIONAL and found.mode == VERSIONS:
            raise StorageError(f"{self.place}: the bucket had versions when the repository was made, and has none now")
        # versioning that was switched on later: what was there before is the oldest version
        return objects_of(self.client, self._prefix, found.with_mode(mode))

    # ---- objects

    def put_if_absent(self, name: str, parts: Iterable[Buffer]) -> bool:
        return self.objects.put(check_name(name), parts)

    def get(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self.objects.get(check_name(name), offset, length)

    def list(self, prefix: str, *, sizes: bool = True) -> Iterator[ObjectInfo]:
        first = check_name(prefix.partition("/")[0])
        seen = set()
        for info in self.objects.list(prefix):
            seen.add(info.name)
            yield info
        if first in CACHED and prefix == f"{first}/":
            self._cache.keep_only(first, seen)

    def stat(self, name: str) -> ObjectInfo | None:
        return self.objects.stat(check_name(name))

    def delete(self, name: str) -> bool:
        self._cache.forget(name)
        return self.objects.delete(check_name(name))

    def delete_many(self, names: Iterable[str]) -> int:
        wanted = [check_name(name) for name in names]
        for name in wanted:
            self._cache.forget(name)
        return self.objects.delete_many(wanted) if wanted else 0

    def renew(self, names: Iterable[str]) -> int:
        objects = self.objects
        if not objects.capabilities.lock_days:
            return 0
        count = 0
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                count += objects.renew(check_name(name))
        return count

    def open(self, name: str) -> int | None:
        if first_part(check_name(name)) not in CACHED:
            return None
        return self._cache.open(name, lambda descriptor: self._download(name, descriptor))

    def _download(self, name: str, descriptor: int) -> None:
        """Copy an object to a file, in ranges: a large one does not fit into memory."""
        at = 0
        while True:
            block = self.objects.get(name, at, DOWNLOAD)
            view = memoryview(block)
            while view:
                view = view[os.write(descriptor, view) :]
            at += len(block)
            if len(block) < DOWNLOAD:
                return

    def free_bytes(self) -> int | None:
        return None

    # ---- claims and leftovers

    def claim(self, name: str, data: bytes) -> LeaseClaim:
        began = now()
        if not self.put_if_absent(name, [data]):
            raise StorageError(f"{self.place}: {name} exists already")
        return LeaseClaim(self, name, self.capabilities.lease_seconds, began)

    def abandoned(self, name: str) -> bool:
        """Has the lease run out by the store's clock?"""
        for key in (lease_name(check_name(name)), name):
            try:
                # the newest version: a lease is written over
                head = self.objects.head(key)
            except FileNotFoundError:
                continue
            if key != name and self.stat(name) is None:
                return False
            age = self.client.server_time() - float(head.fields["LastModified"].timestamp())
            return age > self.capabilities.lease_seconds + ROUNDED
        return False

    def remove_temporaries(self) -> int:
        """Abandoned uploads in parts, and leases whose claim is gone."""
        count = 0
        for upload in self._uploads():
            if self.client.server_time() - float(upload["Initiated"].timestamp()) > STALE_UPLOAD:
                with contextlib.suppress(FileNotFoundError, StorageError):
                    self.client.call(
                        "abort_multipart_upload", upload["Key"], Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    count += 1
        return count + self._remove_stale_leases()

    def _uploads(self) -> Iterator[dict[str, Any]]:
        more: dict[str, Any] = {}
        while True:
            try:
                fields = self.client.call("list_multipart_uploads", "uploads", Prefix=self._prefix, **more).fields
            except StorageDenied:
                return  # a permission that one can do without
            yield from fields.get("Uploads", ())
            if not fields.get("IsTruncated"):
                return
            more = {"KeyMarker": fields["NextKeyMarker"], "UploadIdMarker": fields["NextUploadIdMarker"]}

    def _remove_stale_leases(self) -> int:
        count = 0
        for info in list(self.objects.list("leases/")):
            name = info.name.removeprefix("leases/")
            with contextlib.suppress(FileNotFoundError, BackupError):
                if self.stat(name) is None:
                    modified = float(self.objects.head(info.name).fields["LastModified"].timestamp())
                    if self.client.server_time() - modified > STALE_LEASE * self.capabilities.lease_seconds:
                        count += self.objects.delete(info.name)
        return count
