"""The daemon from start to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor

from vmbackupd import __version__
from vmbackupd.api.bus import Bus, BusUnavailable, connect
from vmbackupd.api.service import Service
from vmbackupd.config import Config, to_toml
from vmbackupd.daemon import arguments, sd
from vmbackupd.daemon.lock import StateLock
from vmbackupd.daemon.wiring import RunnerFactory, job_runner, make_directories
from vmbackupd.errors import BackupError, ConfigError
from vmbackupd.job.job import Job
from vmbackupd.job.manager import JobManager

log = logging.getLogger("daemon")

CHATTY = ("botocore", "boto3", "s3transfer", "urllib3", "asyncio")  # libraries whose debug messages are not ours
THREADS = 256  # at most; made when they are needed
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str] | None = None, factory: RunnerFactory = job_runner) -> int:
    """Run the daemon until it is told to stop; returns the exit status: 2 for a wrong configuration."""
    args = arguments.parse(argv)
    logging.basicConfig(level=args.log_level.upper(), handlers=[sd.log_handler()], force=True)
    for library in CHATTY:
        logging.getLogger(library).setLevel(max(logging.INFO, logging.getLogger().level))
    try:
        config = arguments.configuration(args)
        if args.show_config:
            print(to_toml(config), end="")
            return 0
        make_directories(config)
        with StateLock(config.state_directory):
            return asyncio.run(serve(config, factory))
    except ConfigError as error:
        log.error("%s", error)
        return 2
    except (BackupError, OSError) as error:
        log.error("%s", error)
        return 1


async def serve(config: Config, factory: RunnerFactory) -> int:
    """Recover, serve on the bus until a signal or the loss of the bus, and wind up; returns the exit status."""
    loop = asyncio.get_running_loop()
    # A thread each for what jobs wait for. The default is a few a processor: a verify of days and some volumes that are
    # served would take them all, and the next step of a backup, with a guest frozen, would wait for one of them.
    loop.set_default_executor(ThreadPoolExecutor(THREADS, "work"))
    stop = asyncio.Event()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, stop.set)
    notifier = sd.Notifier()
    notifier.start_watchdog()
    try:
        notifier.extend_timeout()
        async with factory(config) as runner:
            manager = JobManager(runner, parallel=config.jobs.parallel)
            try:
                await _recover(manager, notifier, stop)
                return 0 if stop.is_set() else await _serve_bus(config, manager, notifier, stop)
            finally:
                await manager.close()
    finally:
        notifier.close()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)


async def _recover(manager: JobManager, notifier: sd.Notifier, stop: asyncio.Event) -> None:
    """Undo what a daemon that died left behind. A failure is logged and does not keep the service down."""
    notifier.status("recovering")
    recovery = asyncio.ensure_future(manager.recover_at_start())
    await _first(recovery, stop.wait())
    if not recovery.done():
        await manager.close()  # what is not recovered now is in its journal for the next start
    job = await recovery
    if job.error is not None:
        log.error("recovery at start: %s", job.error)
    for warning in job.warnings:
        log.warning("recovery at start: %s", warning)


async def _serve_bus(config: Config, manager: JobManager, notifier: sd.Notifier, stop: asyncio.Event) -> int:
    bus = await connect(config.bus.address)
    try:
        service = Service(bus, manager)
        await service.start()
        unsubscribe = manager.subscribe(lambda job, changed: _show_status(manager, notifier, job, changed))
        notifier.ready("no job")
        log.info("vmbackupd %s serves on %s", __version__, config.bus.address or "the system bus")
        await _first(stop.wait(), bus.gone())
        lost = not bus.connected
        if lost:
            log.error("the bus connection ended: jobs are cancelled and vmbackupd ends")
        active = sum(not job.state.final for job in manager.jobs.values())
        notifier.stopping(f"stopping: undoing {active} jobs" if active else "stopping")
        await manager.close()  # before the bus, so that those who wait for a job learn how it ended
        unsubscribe()
        if not lost:
            await _leave(service)
        return 1 if lost else 0
    finally:
        await _close(bus)


async def _leave(service: Service) -> None:
    try:
        await service.stop()
    except (BusUnavailable, OSError, EOFError) as error:
        log.warning("leaving the bus: %s", error)


async def _close(bus: Bus) -> None:
    with contextlib.suppress(OSError, EOFError):
        await bus.close()


def _show_status(manager: JobManager, notifier: sd.Notifier, job: Job, changed: set[str]) -> None:
    if changed == {"progress"}:
        return
    active = [job for job in manager.jobs.values() if not job.state.final]
    texts = [f"{job.kind} {job.vm} {job.step or job.state}" for job in active]
    notifier.status(f"{len(active)} jobs: {'; '.join(texts)}" if active else "no job")


async def _first(*awaitables: Awaitable[object]) -> None:
    """Wait for the first of ``awaitables``; coroutines among them are ended, futures go on."""
    tasks = [asyncio.ensure_future(item) for item in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        own = [task for task, item in zip(tasks, awaitables, strict=True) if task is not item]
        for task in own:
            task.cancel()
        await asyncio.gather(*own, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(main())
