"""The repository: backups as immutable trees of deduplicated chunks in packs. docs/format.md has the bytes."""

from vmbackupd.repository.keys import (
    Credential,
    KeyFile,
    KeySource,
    Passphrase,
    RecoveryKey,
    SlotInfo,
    new_recovery_key,
)
from vmbackupd.repository.local import LocalStorage
from vmbackupd.repository.manifest import BackupSummary, Manifest, StoreRecord, VmIdentity
from vmbackupd.repository.place import storage_from_url
from vmbackupd.repository.repository import Repository, Settings
from vmbackupd.repository.s3options import S3Options
from vmbackupd.repository.storage import ObjectInfo, Storage
from vmbackupd.repository.writer import RepositoryWriter

__all__ = [
    "BackupSummary",
    "Credential",
    "KeyFile",
    "KeySource",
    "LocalStorage",
    "Manifest",
    "ObjectInfo",
    "Passphrase",
    "RecoveryKey",
    "Repository",
    "RepositoryWriter",
    "S3Options",
    "Settings",
    "SlotInfo",
    "Storage",
    "StoreRecord",
    "VmIdentity",
    "new_recovery_key",
    "storage_from_url",
]
