"""The repository: backups as immutable trees of deduplicated chunks in packs. docs/format.md has the bytes."""

from vmbackupd.repository.local import LocalStorage
from vmbackupd.repository.manifest import BackupSummary, Manifest, StoreRecord, VmIdentity
from vmbackupd.repository.repository import Repository, Settings
from vmbackupd.repository.storage import ObjectInfo, Storage
from vmbackupd.repository.writer import RepositoryWriter

__all__ = [
    "BackupSummary",
    "LocalStorage",
    "Manifest",
    "ObjectInfo",
    "Repository",
    "RepositoryWriter",
    "Settings",
    "Storage",
    "StoreRecord",
    "VmIdentity",
]
