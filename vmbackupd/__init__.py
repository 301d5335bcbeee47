"""Consistent backups of KVM guests over virtual disks and pass-through volumes."""

__version__ = "0.1.0"
