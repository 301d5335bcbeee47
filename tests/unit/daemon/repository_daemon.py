"""The real daemon with the real work on a real repository, as a process for tests. Only the hypervisor is missing: what
is tested here has nothing to do with running guests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vmbackupd.config import Config
from vmbackupd.daemon.main import main
from vmbackupd.job.job import Runner
from vmbackupd.job.runner import JobRunner


class NoHypervisor:
    """Fails whoever asks it anything."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"the hypervisor was asked for {name}")


@asynccontextmanager
async def runner(config: Config) -> AsyncIterator[Runner]:
    yield JobRunner(config, NoHypervisor())  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(factory=runner))
