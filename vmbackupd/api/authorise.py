"""Who may call what.

Every method asks :meth:`Authority.check` first, with an action and its details. For now the answer is the caller's
user: root, or the user the daemon itself runs as.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from dbus_fast import DBusError

from vmbackupd.api.bus import Bus, bus_call
from vmbackupd.errors import NotAuthorized


class Authority:
    """Decides about calls that arrive on ``bus``."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def check(self, sender: str, action: str, details: Mapping[str, str]) -> None:
        """Return if the connection ``sender`` may do ``action`` (a method's name) to what ``details`` name.

        Raises ``NotAuthorized``.
        """
        try:
            uid = (await bus_call(self._bus, "GetConnectionUnixUser", "s", sender))[0]
        except DBusError as error:
            raise NotAuthorized(f"{action}: the bus does not say who {sender} is: {error}") from error
        if uid not in (0, os.geteuid()):
            about = "".join(f" {name} {value}" for name, value in details.items() if value)
            raise NotAuthorized(f"{action}{about}: user {uid} may not; only root may")
