"""The real daemon around a small runner, as a process for tests. Prints what the runner is asked to do."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.unit.api.support import SmallRunner
from vmbackupd.config import Config
from vmbackupd.daemon.main import main
from vmbackupd.errors import HypervisorError
from vmbackupd.job.job import JobContext, Result, Runner


class TellingRunner(SmallRunner):
    """Says on stdout when it recovers and when its connection is closed."""

    async def recover(self, job: JobContext) -> Result:
        print("recovering", flush=True)
        if os.environ.get("RECOVERY") == "fails":
            raise HypervisorError("web: the scratch disk does not go away")
        if os.environ.get("RECOVERY") == "hangs":
            await asyncio.Event().wait()
        return await super().recover(job)


@asynccontextmanager
async def runner(config: Config) -> AsyncIterator[Runner]:
    if os.environ.get("HYPERVISOR") == "away":
        raise HypervisorError("cannot connect to libvirt")
    yield TellingRunner()
    print("closed", flush=True)


if __name__ == "__main__":
    sys.exit(main(factory=runner))
