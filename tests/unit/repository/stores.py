"""Every kind of storage, as the tests of storages and of whole repositories use them."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.lab.ceph import Ceph
from vmbackupd.repository import LocalStorage, S3Options, Storage, storage_from_url
from vmbackupd.repository.s3 import S3Storage

KINDS = ["local", "plain", "versioned", "locked"]
"""A local directory, and the kinds of buckets. ``locked``: object lock, and a repository that locks for a day. There is
``retaining`` too, a bucket that locks by itself all that is put into it."""


@dataclass
class Store:
    """A place for one repository. ``open`` is what a host does: each call has connections and claims of its own."""

    kind: str
    directory: Path
    ceph: Ceph | None = None
    bucket: str = ""
    prefix: str = "backups/site1"
    opened: list[Any] = field(default_factory=list)

    def options(self, **more: Any) -> S3Options:
        assert self.ceph is not None
        credentials = self.ceph.credentials_file(self.directory)
        options = S3Options(endpoint=self.ceph.endpoint, credentials_file=credentials, addressing="path")
        return replace(options, **more)

    def open(self, **more: Any) -> Any:
        """The storage; ``more`` are options of S3."""
        storage: Any
        if self.ceph is None:
            storage = LocalStorage(self.directory / "store")
        else:
            storage = S3Storage(self.bucket, self.prefix, self.options(**more))
        self.opened.append(storage)
        return storage

    def describe(self) -> str:
        """For ``open_again`` in another process."""
        if self.ceph is None:
            return json.dumps({"url": str(self.directory / "store")})
        url, options = f"s3://{self.bucket}/{self.prefix}", self.options()
        return json.dumps({"url": url, "endpoint": options.endpoint, "credentials_file": str(options.credentials_file)})

    def close(self) -> None:
        for storage in self.opened:
            storage.close()


def open_again(description: str) -> Storage:
    """The storage of a ``Store`` of another process."""
    fields = json.loads(description)
    url = fields.pop("url")
    if not fields:
        return storage_from_url(url)
    credentials = Path(fields["credentials_file"])
    return storage_from_url(
        url, S3Options(endpoint=fields["endpoint"], credentials_file=credentials, addressing="path")
    )


@contextlib.contextmanager
def make_store(kind: str, directory: Path, request: Any) -> Iterator[Store]:
    """A new place of this kind, ready for a repository; ``request`` is pytest's, for the fixture ``ceph``."""
    if kind == "local":
        made = Store(kind, directory)
    else:
        ceph = request.getfixturevalue("ceph")
        bucket = ceph.make_bucket("locked" if kind == "retaining" else kind)
        if kind == "retaining":
            ceph.set_retention(bucket, days=1)
        made = Store(kind, directory, ceph, bucket, f"backups/{secrets.token_hex(4)}")
    try:
        storage = made.open() if kind != "locked" else made.open(lock_days=1)
        storage.create()
        yield made
    finally:
        made.close()
