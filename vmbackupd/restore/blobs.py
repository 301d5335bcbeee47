"""The small files of a domain: UEFI variables and the state of an emulated TPM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import PurePosixPath

from vmbackupd.errors import RepositoryCorrupt
from vmbackupd.restore.domain import nvram_of, tpm_of
from vmbackupd.restore.plan import BlobPlan

NVRAM_DIRECTORY = "/var/lib/libvirt/qemu/nvram"

# libvirt allows no other place. It gives the files to the user swtpm runs as when it starts the domain
# (src/qemu/qemu_tpm.c, qemuTPMEmulatorCreateStorage), and takes a directory that is not empty as the TPM's state.
TPM_DIRECTORY = "/var/lib/libvirt/swtpm"
_TPM_SUBDIRECTORIES = {"2.0": "tpm2", "1.2": "tpm1.2"}


def plan_files(config: Mapping[str, str], xml: str, *, name: str, uuid: str, directory: str | None,
               ) -> tuple[BlobPlan, ...]:
    """Where the blobs of ``config`` (name -> blob id) go for the domain ``name``."""
    files: list[BlobPlan] = []
    uefi, old = nvram_of(xml)
    if uefi and "nvram" in config:
        parent = directory or (os.path.dirname(old) if old else NVRAM_DIRECTORY)
        suffix = os.path.splitext(old)[1] if old else ".fd"
        files.append(BlobPlan("nvram", config["nvram"], os.path.join(parent, f"{name}_VARS{suffix or '.fd'}")))
    version = tpm_of(xml)
    if version is not None:
        root = os.path.join(TPM_DIRECTORY, uuid)
        files += [BlobPlan("tpm", blob, os.path.join(root, _tpm_path(key, version)))
                  for key, blob in sorted(config.items()) if key.startswith("tpm/")]
    return tuple(files)


def nvram_path(files: tuple[BlobPlan, ...]) -> str | None:
    """The variable store among ``files``."""
    return next((blob.path for blob in files if blob.kind == "nvram"), None)


def _tpm_path(key: str, version: str) -> str:
    """The place of blob ``tpm/<path>`` below the TPM's own directory; the path may begin with the version's
    directory."""
    parts = PurePosixPath(key.removeprefix("tpm/")).parts
    if not parts or ".." in parts or parts[0] == "/":
        raise RepositoryCorrupt(f"the backup names a TPM file outside of the TPM's directory ({key!r})")
    subdirectory = _TPM_SUBDIRECTORIES.get(version, "tpm2")
    return str(PurePosixPath(*parts)) if parts[0] == subdirectory else str(PurePosixPath(subdirectory, *parts))
