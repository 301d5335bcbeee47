"""What a bucket can do: found out once, when a repository is made, and kept in the object ``capabilities.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.typed import get_bool, get_float, get_int, get_str, parse_object

NAME = "capabilities.json"
VERSION = 1
CONDITIONAL = "conditional"
VERSIONS = "versions"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """``mode``: what makes a put exclusive, ``conditional`` (If-None-Match on a bucket without versions) or
    ``versions`` (the oldest version is the object). ``conditional_put``, ``conditional_parts``: PutObject and
    CompleteMultipartUpload heed If-None-Match. ``etag_is_md5``: of an object put in one piece. ``lock_days``,
    ``lock_mode``: how long and how objects are locked, 0 for not at all. ``bucket_retention``: the bucket locks by
    itself what is put without a lock. ``lease_seconds``: how long a silent session counts as alive.
    """

    mode: str
    conditional_put: bool
    conditional_parts: bool
    etag_is_md5: bool
    lock_days: float
    lock_mode: str
    bucket_retention: bool
    lease_seconds: int

    def with_mode(self, mode: str) -> Capabilities:
        """The same for a bucket whose versioning was switched on after the repository was made."""
        if mode == self.mode:
            return self
        return dataclasses.replace(self, mode=mode, conditional_put=False)

    def encode(self) -> bytes:
        """The object's bytes, JSON."""
        fields: dict[str, object] = {"format": "vmbackupd-s3", "version": VERSION}
        fields |= dataclasses.asdict(self)
        return json.dumps(fields, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, data: bytes, place: str) -> Capabilities:
        """RepositoryCorrupt if ``data`` is not what ``encode`` makes; ``place`` is for the message."""
        at, error = f"{place}: {NAME}", RepositoryCorrupt
        fields = parse_object(data, what=at, max_length=2**16, error=error)
        if fields.get("format") != "vmbackupd-s3" or fields.get("version") != VERSION:
            raise error(f"{at} is of format {fields.get('format')} {fields.get('version')}, unknown to this program")
        mode = get_str(fields, "mode", at=at, error=error)
        if mode not in (CONDITIONAL, VERSIONS):
            raise error(f"{at}: mode {mode!r} is unknown to this program")
        return cls(
            mode=mode,
            conditional_put=get_bool(fields, "conditional_put", at=at, error=error),
            conditional_parts=get_bool(fields, "conditional_parts", at=at, error=error),
            etag_is_md5=get_bool(fields, "etag_is_md5", at=at, error=error),
            lock_days=get_float(fields, "lock_days", minimum=0, maximum=36500, at=at, error=error),
            lock_mode=get_str(fields, "lock_mode", at=at, error=error),
            bucket_retention=get_bool(fields, "bucket_retention", at=at, error=error),
            lease_seconds=get_int(fields, "lease_seconds", minimum=1, maximum=86400, at=at, error=error),
        )
