"""The name of a backup."""

from __future__ import annotations

import re
import secrets
import time


def backup_id(vm: str, when: float) -> str:
    """A name that sorts by time within a VM and is never given twice: ``web1-20261123T101500Z-1a2b3c4d``.

    ``when``: seconds since 1970 at which the backup begins.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "_", vm)[:100]
    return f"{name}-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(when))}-{secrets.token_hex(4)}"
