"""How to reach a bucket: what the configuration's ``[repository.s3]`` says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vmbackupd.errors import InvalidArgument

ADDRESSING = ("auto", "path", "virtual")
LOCK_MODES = ("governance", "compliance")


@dataclass(frozen=True, slots=True)
class S3Options:
    """Everything but bucket and prefix.

    ``endpoint``: URL of the store, None for AWS. ``credentials_file``: in the format of ``~/.aws/credentials``;
    ``profile``: the section of it. Without either, the environment and boto3's other places are searched.
    ``ca_bundle``: certificates that the endpoint's is checked with. ``timeout``: seconds without a byte moving until a
    request is given up; a whole request has twice that and 1 s for every 64 KiB. ``attempts``: how often a request is
    tried, with growing pauses. ``cache_directory``: where index objects are kept, None for no cache.
    ``lease_seconds``: how long a session whose host is silent counts as alive. ``lock_days``, ``lock_mode``: at
    ``repository init`` on a bucket with object lock, how long every object is immutable (0: the bucket's own default
    retention, if it has one); they have no meaning later. ``multipart_threshold`` and ``part_size``: bytes of an object
    from which it is sent in parts, and of a part.
    """

    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    credentials_file: Path | None = None
    ca_bundle: Path | None = None
    addressing: str = "auto"
    timeout: float = 30.0
    attempts: int = 6
    connections: int = 32
    cache_directory: Path | None = None
    lease_seconds: int = 300
    lock_days: float = 0
    lock_mode: str = "governance"
    multipart_threshold: int = 96 * 2**20
    part_size: int = 32 * 2**20

    def __post_init__(self) -> None:
        """InvalidArgument for values that cannot work."""
        limits = {
            "timeout": (self.timeout, 0.1, 3600),
            "attempts": (self.attempts, 1, 100),
            "connections": (self.connections, 1, 1000),
            "lease_seconds": (self.lease_seconds, 2, 86400),
            "lock_days": (self.lock_days, 0, 36500),
            "part_size": (self.part_size, 5 * 2**20, 2**30),
            "multipart_threshold": (self.multipart_threshold, 5 * 2**20, 5 * 2**30),
        }
        for name, (value, least, most) in limits.items():
            if not least <= value <= most:
                raise InvalidArgument(f"s3 {name} {value} is not between {least} and {most}")
        if self.addressing not in ADDRESSING:
            raise InvalidArgument(f"s3 addressing {self.addressing!r} is none of {', '.join(ADDRESSING)}")
        if self.lock_mode not in LOCK_MODES:
            raise InvalidArgument(f"s3 lock_mode {self.lock_mode!r} is none of {', '.join(LOCK_MODES)}")
