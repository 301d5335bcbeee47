"""The frozen section of a backup: what overruns its budget."""

from __future__ import annotations

import asyncio
import gc
import logging
from types import SimpleNamespace

import pytest

from vmbackupd.errors import GuestAgentUnavailable
from vmbackupd.job.steps.t1_snapshot import _Freeze, _snapshot_frozen


def test_what_is_in_time_gives_its_result_or_its_error() -> None:
    async def succeeds() -> int:
        return 5

    async def fails() -> int:
        raise GuestAgentUnavailable("no agent")

    async def main() -> None:
        freeze = _Freeze("web1", 60)
        assert await freeze.within(succeeds()) == 5
        with pytest.raises(GuestAgentUnavailable):
            await freeze.within(fails())
        assert not freeze.stragglers

    asyncio.run(main())


@pytest.mark.parametrize("budget", [0.5, 20.0, 300.0])
def test_the_agent_may_take_the_whole_budget_to_freeze(budget: float) -> None:
    class Context:
        coverage = SimpleNamespace(volumes=(), pre_copied=())
        t1 = 0.0

        async def agent(self, command: str, *, timeout: float) -> int:
            assert command == "guest-fsfreeze-freeze" and timeout > budget
            return 3

    ctx = Context()
    asyncio.run(_snapshot_frozen(ctx, _Freeze("web1", budget), {}, {}))  # type: ignore[arg-type]
    assert ctx.frozen_filesystems == 3  # type: ignore[attr-defined]


def test_what_overran_the_budget_goes_on_and_its_error_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    lost: list[object] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: lost.append(context))
        go = asyncio.Event()

        async def fails() -> None:
            await go.wait()
            raise GuestAgentUnavailable("no agent")

        freeze = _Freeze("web1", 0.01)
        with pytest.raises(TimeoutError):
            await freeze.within(fails())
        go.set()
        await asyncio.wait(freeze.stragglers)
        del freeze
        gc.collect()  # asyncio complains of an error that nobody asked for when its task is collected

    with caplog.at_level(logging.WARNING, "job.t1"):
        asyncio.run(main())
    assert not lost
    assert [record.getMessage() for record in caplog.records] == [
        "VM web1: what overran the freeze budget of 0.01 s has failed: no agent"
    ]
