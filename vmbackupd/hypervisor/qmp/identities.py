"""What the machines' QEMU processes said their UUIDs are, for the time when they do not run."""

from __future__ import annotations

import json
import logging
import os
import uuid as uuids
from pathlib import Path

from vmbackupd.config import MachineConfig
from vmbackupd.errors import HypervisorError
from vmbackupd.typed import TypedError, get_str, parse_object

log = logging.getLogger("hypervisor.qmp")

_NAMES = uuids.UUID("5b1f4c1e-64a5-4a55-9c52-0f7a0c9b7b0d")  # the namespace of UUIDs that follow from a name
_NONE = str(uuids.UUID(int=0))  # what QEMU answers that was given none


class Identities:
    """UUIDs by machine, kept in ``file``: journals and backups name a machine by its UUID also when it is off."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._told = _read(file)

    def of(self, name: str, config: MachineConfig) -> str:
        """The UUID of a machine: the configured one, else the last that its QEMU told, else one that follows from its
        name."""
        return config.uuid or self._told.get(name) or str(uuids.uuid5(_NAMES, name))

    def learn(self, name: str, config: MachineConfig, told: str) -> str:
        """The UUID of a machine whose QEMU says that it is ``told``.

        Raises ``HypervisorError`` where the configuration says another: the socket may be another machine's.
        """
        told = told.lower()
        if told == _NONE:
            return self.of(name, config)
        if config.uuid is not None:
            if told != config.uuid:
                raise HypervisorError(f"VM {name}: the QEMU at {config.qmp} says that its UUID is {told}, expected "
                                      f"{config.uuid} (machines.{name}.uuid): is it another machine's socket?")
        elif self._told.get(name) != told:
            self._told[name] = told
            _write(self._file, self._told)
        return told


def _read(file: Path) -> dict[str, str]:
    try:
        document = parse_object(file.read_bytes(), what=str(file))
        return {name: get_str(document, name, max_length=36) for name in document}
    except FileNotFoundError:
        return {}
    except (OSError, TypedError) as error:
        log.warning("the UUIDs of machines that are off are not known: %s", error)
        return {}


def _write(file: Path, told: dict[str, str]) -> None:
    temporary = file.with_name(file.name + ".part")
    try:
        temporary.write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, file)
    except OSError as error:
        log.warning("the UUIDs of machines are not kept: %s", error)
