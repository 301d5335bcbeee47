"""From the text of a configuration to a storage."""

from __future__ import annotations

import urllib.parse
from pathlib import Path

from vmbackupd.errors import InvalidArgument
from vmbackupd.repository.local import LocalStorage
from vmbackupd.repository.s3options import S3Options
from vmbackupd.repository.storage import Storage

FORMS = "/PATH, file:///PATH or s3://BUCKET/PREFIX"


def storage_from_url(url: str, options: S3Options | None = None) -> Storage:
    """The storage at ``/path``, ``file:///path`` or ``s3://bucket/prefix``; ``options`` are for the last. Nothing is
    opened yet. InvalidArgument if it is none of these, or if boto3 is missing."""
    if url.startswith("/"):
        return LocalStorage(Path(url))
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return LocalStorage(Path(urllib.parse.unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc and not (parts.query or parts.fragment or "@" in parts.netloc):
        from vmbackupd.repository.s3 import S3Storage  # boto3 is optional

        return S3Storage(parts.netloc, parts.path.strip("/"), options)
    raise InvalidArgument(f"{url!r} is no place of a repository: {FORMS} is")
