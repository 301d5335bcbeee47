"""Named points between the effects of a job, where tests make the daemon die, fail, stop or be cancelled.

``VMBACKUPD_FAULTPOINTS`` holds ``NAME=ACTION`` pairs separated by commas. Actions: ``kill`` (SIGKILL to this process),
``error`` (the step raises), ``cancel`` (the job is cancelled there), ``pause:DIR`` (creates ``DIR/NAME.reached`` and
goes on when ``DIR/NAME.go`` exists). Without the variable a point does nothing.
"""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from vmbackupd.errors import BackupError

VARIABLE = "VMBACKUPD_FAULTPOINTS"


class InjectedFault(BackupError):
    """Raised at a fault point on a test's request."""

    code = "InjectedFault"


def _actions() -> dict[str, str]:
    pairs = os.environ.get(VARIABLE, "")
    return dict(pair.split("=", 1) for pair in pairs.split(",") if "=" in pair)


async def reach(name: str) -> None:
    """Do what the environment asks for at point ``name``."""
    action = _actions().get(name)
    if action is None:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "error":
        raise InjectedFault(f"fault injected at {name}")
    elif action == "cancel":
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
    elif action.startswith("pause:"):
        directory = Path(action.removeprefix("pause:"))
        (directory / f"{name}.reached").touch()
        while not (
            directory / f"{name}.go"
        ).exists():  # a test's hand is on the other side: there is no event to wait on
            await asyncio.sleep(0.05)
    else:
        raise ValueError(f"{VARIABLE}: unknown action {action!r} for {name}")
