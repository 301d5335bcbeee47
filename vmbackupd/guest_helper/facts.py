"""What the host should know of the guest besides its devices."""

import os
from typing import List, Optional

INITIATOR = "/etc/iscsi/initiatorname.iscsi"
DEFAULT_HOOK = "/etc/qemu/fsfreeze-hook"  # qemu-ga's own default (QEMU qga/main.c)


def initiator() -> Optional[str]:
    """The guest's iSCSI name."""
    try:
        with open(INITIATOR, "rb") as file:
            lines = file.read(65536).decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip() == "InitiatorName" and value.strip():
            return value.strip()[:255]
    return None


def fsfreeze_hook() -> bool:
    """Whether the guest agent runs a hook of the administrator's when it freezes.

    The stock hook only calls what lies in the directory named after it, so an empty directory is no hook.
    """
    for name in os.listdir("/proc"):
        if name.isdigit():
            hook = _hook(_arguments(name))
            if hook is not None and os.access(hook, os.X_OK):
                scripts = hook + ".d"
                return not os.path.isdir(scripts) or any(
                    os.access(os.path.join(scripts, script), os.X_OK) for script in os.listdir(scripts)
                )
    return False


def _arguments(pid: str) -> List[str]:
    try:
        with open("/proc/%s/cmdline" % pid, "rb") as file:
            return file.read(65536).decode("utf-8", "replace").split("\0")
    except OSError:
        return []


def _hook(arguments: List[str]) -> Optional[str]:
    """The hook a guest agent was started with: ``-F``, ``-FPATH``, ``--fsfreeze-hook``, ``--fsfreeze-hook=PATH``."""
    if not arguments or os.path.basename(arguments[0]) != "qemu-ga":
        return None
    for argument in arguments[1:]:
        for option in ("--fsfreeze-hook=", "--fsfreeze-hook", "-F"):
            if argument.startswith(option):
                return argument[len(option) :] or DEFAULT_HOOK
    return None
