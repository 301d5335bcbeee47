"""What the work reports reaches the job at once, progress at a bounded rate."""

from __future__ import annotations

import asyncio

from vmbackupd.job.observer import PROGRESS_INTERVAL, JobObserver


def test_steps_and_warnings_at_once_progress_not_too_often() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        seen: list[tuple[float, set[str], int]] = []
        done = asyncio.Event()

        def notify(changed: set[str]) -> None:
            seen.append((loop.time(), changed, observer.bytes_done))
            if observer.bytes_done == 1000:
                done.set()

        observer = JobObserver(notify)
        observer.expect(1000)
        for count in range(1, 1001):
            observer.progress(count)
            if count == 500:
                observer.step("copy")
        await asyncio.wait_for(done.wait(), 10)
        assert [(changed, count) for _, changed, count in seen] == [
            ({"progress"}, 0), ({"step", "progress"}, 500), ({"progress"}, 1000)]
        assert seen[2][0] - seen[1][0] >= PROGRESS_INTERVAL * 0.9
        observer.progress(1000)
        observer.warning("w")
        assert seen[-1][1] == {"warnings"}
        assert observer.warnings == ["w"]
        observer.progress(2000)
        assert observer.close() == {"progress"}
        assert len(seen) == 4

    asyncio.run(main())
