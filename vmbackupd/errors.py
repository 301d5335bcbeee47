"""Every error that crosses a layer, one class for each decision a caller can take.

``code`` names the error on D-Bus (``org.vmbackupd1.Error.<code>``) and in ``--json`` output; it is unique.
Messages name the VM, the volume, what was expected, and what to do about it.
"""

from __future__ import annotations


class BackupError(Exception):
    """Root of every error this project raises on purpose."""

    code = "Failed"


class InvalidArgument(BackupError):
    """The request itself is malformed: nothing was touched."""

    code = "InvalidArgument"


class NotFound(BackupError):
    """The VM, backup, job or volume that was named does not exist."""

    code = "NotFound"


class Busy(BackupError):
    """Another job works on the same VM or target: try again when it has ended."""

    code = "Busy"


class Cancelled(BackupError):
    """The job was cancelled on request; everything it did was undone."""

    code = "Cancelled"


class NotRunning(BackupError):
    """The VM is not running, and the operation needs a running guest."""

    code = "NotRunning"


class HypervisorError(BackupError):
    """libvirt or QEMU refused or failed an operation."""

    code = "Hypervisor"


class GuestAgentUnavailable(BackupError):
    """The guest has no qemu-guest-agent that answers."""

    code = "GuestAgentUnavailable"


class GuestAgentRefused(BackupError):
    """The guest agent answers but forbids a command we need (``guest-exec`` on RHEL-like guests)."""

    code = "GuestAgentRefused"


class GuestHelperUnavailable(BackupError):
    """The helper could not be started in the guest (no python3, wrong version, no answer)."""

    code = "GuestHelperUnavailable"


class GuestProtocolError(BackupError):
    """The helper sent something malformed or out of bounds. The guest is not trusted: the job fails."""

    code = "GuestProtocol"


class GuestHelperError(BackupError):
    """The helper reports that an operation in the guest failed. ``reason`` is its own code for it."""

    code = "GuestHelper"

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class UncoveredVolume(BackupError):
    """The guest has a volume that cannot be captured and that was not allowed by name."""

    code = "UncoveredVolume"


class TopologyChanged(BackupError):
    """A device came, went or changed between inspect and the end of the backup."""

    code = "TopologyChanged"


class FreezeBudgetExceeded(BackupError):
    """The guest was frozen longer than the budget allows; it was thawed and the backup undone."""

    code = "FreezeBudgetExceeded"


class NotConverging(BackupError):
    """The guest writes faster to a disk that is copied beforehand than can be captured in the freeze."""

    code = "NotConverging"


class SnapshotLost(BackupError):
    """The snapshot in the guest was invalidated (store full, table reloaded, reboot): T1 is gone."""

    code = "SnapshotLost"


class StoreCorrupt(BackupError):
    """A COW store does not parse: not a store, invalid, truncated or with entries out of bounds."""

    code = "StoreCorrupt"


class SourceError(BackupError):
    """Reading a disk (over NBD) failed or the peer broke the protocol."""

    code = "Source"


class RepositoryMissing(BackupError):
    """There is no repository at the configured place."""

    code = "RepositoryMissing"


class RepositoryFull(BackupError):
    """The repository's storage is out of space; nothing was published."""

    code = "RepositoryFull"


class RepositoryCorrupt(BackupError):
    """An object of the repository is missing, truncated or does not match its checksum."""

    code = "RepositoryCorrupt"


class StorageError(BackupError):
    """The repository's storage failed (I/O error, permission)."""

    code = "Storage"


class TargetRefused(BackupError):
    """A restore target is too small, not empty, not the expected device, or in use."""

    code = "TargetRefused"


class TargetError(BackupError):
    """Writing a restore target (over NBD) failed: its content is undefined now."""

    code = "Target"


class ConfigError(BackupError):
    """The configuration file is wrong; names the key and what it accepts."""

    code = "Config"


class NotAuthorized(BackupError):
    """The caller may not do this."""

    code = "NotAuthorized"


class SessionLost(BackupError):
    """A session on the repository counts as ended, because its host was not heard of: it may not go on."""

    code = "SessionLost"


class Protected(BackupError):
    """A protected backup cannot be forgotten."""

    code = "Protected"


class KeyRequired(BackupError):
    """The repository is encrypted, and no key was given or none could be read."""

    code = "KeyRequired"


class WrongKey(BackupError):
    """The repository is encrypted, and the key that was given opens none of its key slots."""

    code = "WrongKey"


class NotEncrypted(BackupError):
    """A key is configured, but the repository is not encrypted: perhaps somebody put another in its place."""

    code = "NotEncrypted"


class ServeFailed(BackupError):
    """The NBD server of a backup's volume did not start, or ended by itself."""

    code = "ServeFailed"


class StorageUnsuitable(StorageError):
    """The object store lacks something the repository's safety rests on; found out when a repository is made."""

    code = "StorageUnsuitable"


class ObjectLocked(StorageError):
    """The store's object lock keeps an object from being removed. ``until``: seconds since 1970, None if unknown."""

    code = "ObjectLocked"

    def __init__(self, message: str, *, until: float | None = None) -> None:
        super().__init__(message)
        self.until = until


class StorageDenied(StorageError):
    """The object store refused a request as forbidden: the credentials lack a permission, or the object is locked."""

    code = "StorageDenied"


class StorageUnanswered(StorageError):
    """The object store did not answer in time, or only with "not now", however often it was asked."""

    code = "StorageUnanswered"
