"""vmbackupctl as a process, against the real service on a real bus."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.unit.api.support import DEADLINE, BusDaemon, SmallRunner, cli_command, cli_environment, served
from vmbackupd.job.manager import JobManager
from vmbackupd.job.options import BackupOptions, RestoreOptions
from vmbackupd.model import T2, RevertMode


class Ended:
    """How a run ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def document(self) -> Any:
        return json.loads(self.out)


async def start(address: str, *arguments: str, cwd: Path | None = None) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *cli_command(*arguments), env=cli_environment(address), cwd=cwd, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


async def end(process: asyncio.subprocess.Process) -> Ended:
    out, err = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def ctl(address: str, *arguments: str, cwd: Path | None = None) -> Ended:
    return await end(await start(address, *arguments, cwd=cwd))


async def line(process: asyncio.subprocess.Process, *, containing: str) -> str:
    """Read stderr up to a line."""
    assert process.stderr is not None
    async with asyncio.timeout(DEADLINE):
        while True:
            text = (await process.stderr.readline()).decode()
            assert text, f"stderr ended without {containing!r}"
            if containing in text:
                return text


def test_backup_says_what_it_made_and_its_steps(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "backup", "web", "--revert=both", "--allow-uncovered", "a",
                             "--allow-uncovered", "b", "--freeze-budget", "500ms", "--full", "--t2=fleece")
            assert done.status == 0, done.err
            assert "backup: web-1" in done.out and "2023-11-14 22:13:20.250Z" in done.out and "12 ms" in done.out
            assert done.err.splitlines()[-1] == "backup web: seal"
            assert runner.calls == [("backup", "web", BackupOptions(RevertMode.BOTH, ("a", "b"), 0.5, True, T2.FLEECE))]
            done = await ctl(address, "--json", "backup", "web", "--quiet")
            assert done.status == 0 and done.err == ""
            assert done.document["backup"] == "web-1" and done.document["uncovered"] == []
            assert done.document["job"].startswith("j")

    asyncio.run(main())


def test_an_allowed_gap_is_exit_3(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _):
            done = await ctl(address, "backup", "gaps")
            assert done.status == 3
            assert "warning: sdb is not in this backup" in done.err
            assert "vmbackupctl: uncovered: serial:sdb" in done.err
            done = await ctl(address, "backup", "gaps", "--json")
            assert (done.status, done.document["uncovered"]) == (3, ["serial:sdb"])
            assert done.document["warnings"] == ["sdb is not in this backup"]

    asyncio.run(main())


@pytest.mark.parametrize(("arguments", "code", "text"), [
    (("backup", "none"), "NotFound", "there is no VM none"),
    (("backup", "lun"), "UncoveredVolume", "VM lun: sdb is passed through and cannot be captured"),
    (("backup", "cold"), "FreezeBudgetExceeded", "VM cold: frozen for 7.1 s, the budget is 5.0 s"),
    (("backup", "bug"), "Failed", "internal error: ZeroDivisionError: a bug"),
    (("backup", ""), "InvalidArgument", "the VM has no name"),
    (("show", "x"), "NotFound", "there is no backup x"),
    (("cancel", "x"), "NotFound", "'x' is no job: a job is j and 8 hexadecimal digits, see `vmbackupctl jobs`"),
    (("cancel", "j00000000"), "NotFound", "there is no job j00000000"),
    (("repository", "info"), "RepositoryMissing", "there is no repository at /repository"),
])
def test_errors_in_text_and_json(address: str, arguments: tuple[str, ...], code: str, text: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _):
            done = await ctl(address, *arguments)
            assert (done.status, done.out, done.err.splitlines()[-1]) == (1, "", f"vmbackupctl: {text}")
            done = await ctl(address, *arguments, "--json")
            assert (done.status, done.document) == (1, {"error": {"code": code, "message": text}})

    asyncio.run(main())


@pytest.mark.parametrize("arguments", [
    (), ("explode",), ("backup",), ("backup", "web", "--revert=never"), ("backup", "web", "--freeze-budget", "-1"),
    ("restore", "b", "--volume", "wwn:1"), ("restore", "b", "--dry-run", "--start"), ("repository",),
])
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(cli_command(*arguments), env=cli_environment("unix:path=/nowhere"), capture_output=True,
                          check=False)
    assert done.returncode == 2
    assert b"usage: vmbackupctl" in done.stderr


def test_no_daemon_and_no_bus(address: str, tmp_path: Path) -> None:
    async def main() -> None:
        done = await ctl(address, "machines")
        assert done.status == 1
        assert "vmbackupd does not answer" in done.err and "systemctl status vmbackupd" in done.err
        done = await ctl(f"unix:path={tmp_path}/bus", "machines", "--json")
        assert (done.status, done.document["error"]["code"]) == (1, "DaemonUnreachable")
        done = await ctl("", "--bus-address", f"unix:path={tmp_path}/bus", "machines")
        assert done.status == 1 and str(tmp_path) in done.err

    asyncio.run(main())


def test_listings(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "machines")
            assert done.out.splitlines() == ["NAME  STATE    UUID", "web   running  uuid-of-web", "db    off      u2"]
            done = await ctl(address, "machines", "--json")
            assert done.document[1] == {"name": "db", "uuid": "u2", "running": False}
            done = await ctl(address, "list")
            assert (done.status, done.out) == (0, "BACKUP  VM  T1  SIZE  NOTE\n")
            runner.backups = [{"id": f"web-{n}", "vm": "web", "t1": 1700000000, "size": 5 << 30} for n in range(2500)]
            done = await ctl(address, "list", "web", "--json")
            assert [item["id"] for item in done.document] == [f"web-{n}" for n in range(2500)]
            done = await ctl(address, "list")
            assert done.out.splitlines()[1].split() == ["web-0", "web", "2023-11-14", "22:13:20Z", "5.0", "GiB"]
            assert (await ctl(address, "list", "db", "--json")).document == []
            runner.backups = [{"id": "web-1", "vm": "web", "protected": True},
                              {"id": "00ff", "vm": "", "error": "is damaged"}]
            notes = [row.split()[-1] for row in (await ctl(address, "list")).out.splitlines()]
            assert notes == ["NOTE", "protected", "damaged"]
            done = await ctl(address, "repository", "init")
            assert done.out.split() == ["id:", "r1", "path:", "/repository"]

    asyncio.run(main())


def test_show_prints_the_proof(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _):
            done = await ctl(address, "show", "web-1")
            assert done.status == 0
            for words in ("T1:      2023-11-14 22:13:20.250Z", "T2:      2023-11-14 22:13:23.500Z", "frozen:  12 ms",
                          "VM:      web"):
                assert words in done.out
            last = done.out.splitlines()[-1].split()
            assert last[:4] == ["vda", "virtual", "guest-snapshot", "application"]
            assert last[4:] == ["1.0", "GiB", "1.0", "MiB", "4.0", "KiB", "7"]
            assert (await ctl(address, "show", "web-1", "--json")).document["volumes"][0]["reverted_chunks"] == 7

    asyncio.run(main())


def test_inspect_prints_every_device(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _):
            done = await ctl(address, "inspect", "web")
            lines = done.out.splitlines()
            assert done.status == 0
            assert lines[0].split() == ["DEVICE", "VOLUME", "SIZE", "KIND", "METHOD", "DECISION", "REASON"]
            assert lines[1].split() == ["vda", "vda", "1.0", "GiB", "virtual", "guest-snapshot", "captured"]
            assert "a \\x1b[31mCD-ROM" in lines[2]  # a guest's names do not control the terminal
            assert (await ctl(address, "inspect", "web", "--json")).document["coverage"][1]["device"] == "sr0"
            done = await ctl(address, "inspect", "lun")
            assert (done.status, "A backup would fail" in done.out) == (0, True)

    asyncio.run(main())


def test_restore_passes_everything_on_with_absolute_paths(address: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "restore", "web-1", "--name", "new", "--to", "disks", "--volume", "wwn:1=iscsi://h/i/1",
                             "--volume", "serial:a=raw", "--dry-run", "--force", "--revert=restore", cwd=tmp_path)
            assert done.status == 0, done.err
            assert runner.calls == [("restore", "web-1", RestoreOptions(
                "new", str(tmp_path / "disks"), {"wwn:1": "iscsi://h/i/1", "serial:a": str(tmp_path / "raw")},
                dry_run=True, force=True, revert=RevertMode.RESTORE))]
            for words in ("new VM: new", "/new/vda.qcow2  an ext4 filesystem  no", "wwn:1: log in to i",
                          "problem: volume vda: /new/vda.qcow2 is not empty"):
                assert words in done.out
            done = await ctl(address, "restore", "web-1", "--start", "--json")
            assert runner.calls[-1] == ("restore", "web-1", RestoreOptions(start=True))
            assert done.document["backup"] == "web-1"

    asyncio.run(main())


def test_jobs_no_wait_and_cancel(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            assert (await ctl(address, "jobs", "--json")).document == []
            done = await ctl(address, "backup", "slow", "--no-wait", "--json")
            job = done.document["job"]
            await asyncio.wait_for(runner.running.wait(), DEADLINE)
            listed = (await ctl(address, "jobs", "--json")).document
            assert [(item["id"], item["state"], item["done"], item["total"]) for item in listed] == [
                (job, "running", 400, 1000)]
            assert "400 B of 1000 B" in (await ctl(address, "jobs")).out
            waiting = await start(address, "backup", "slow-alias", "--json")
            assert (await end(waiting)).document["error"]["code"] == "Busy"
            done = await ctl(address, "cancel", job)
            assert (done.status, done.out) == (0, f"job {job} is cancelled; everything it did is undone\n")
            done = await ctl(address, "cancel", job, "--json")
            assert (done.status, done.document["error"]["code"]) == (1, "InvalidArgument")
            assert "Cancelled" in json.dumps((await ctl(address, "jobs", "--json")).document[0]["error"])

    asyncio.run(main())


def test_who_waits_for_a_cancelled_job_is_told(address: str) -> None:
    async def main() -> None:
        async with served(address) as (manager, runner, _):
            waiting = await start(address, "backup", "slow")
            await line(waiting, containing="passthrough-copy")
            await asyncio.wait_for(runner.running.wait(), DEADLINE)
            only_job(manager).cancel()
            done = await end(waiting)
            assert done.status == 1
            assert "was cancelled; everything it did is undone" in done.err

    asyncio.run(main())


def only_job(manager: JobManager) -> Any:
    (job,) = manager.jobs.values()
    return job


def test_ctrl_c_without_a_terminal_leaves_the_job_alone(address: str) -> None:
    async def main() -> None:
        async with served(address) as (manager, _, _):
            waiting = await start(address, "backup", "slow")
            await line(waiting, containing="passthrough-copy")
            waiting.send_signal(signal.SIGINT)
            done = await end(waiting)
            job = only_job(manager)
            assert done.status == 130
            assert f"job {job.id} goes on" in done.err and f"vmbackupctl cancel {job.id}" in done.err
            assert job.state == "running"

    asyncio.run(main())


def test_recover(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "recover")
            assert done.status == 0
            assert done.out.splitlines()[1].split() == ["j00000000", "web", "thaw"]
            assert runner.calls == [("recover", frozenset())]

    asyncio.run(main())


def test_a_daemon_that_dies_ends_the_wait(address: str) -> None:
    async def main() -> None:
        runner = SmallRunner()
        async with served(address, runner=runner) as (_, _, bus):
            waiting = await start(address, "backup", "slow")
            await line(waiting, containing="passthrough-copy")
            await bus.close()  # what the bus sees of a process that is killed
            done = await end(waiting)
            assert done.status == 1
            assert "vmbackupctl recover" in done.err and "journalctl -u vmbackupd" in done.err

    asyncio.run(main())


def test_a_bus_that_dies_ends_the_wait() -> None:
    async def main(bus_daemon: BusDaemon) -> None:
        async with served(bus_daemon.address) as (_, _, _):
            waiting = await start(bus_daemon.address, "backup", "slow", "--json")
            await line(waiting, containing="passthrough-copy")
            bus_daemon.kill()
            done = await end(waiting)
            assert (done.status, done.document["error"]["code"]) == (1, "DaemonLost")

    with BusDaemon() as bus_daemon:
        asyncio.run(main(bus_daemon))


def test_output_into_a_closed_pipe_is_no_traceback(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            runner.backups = [{"id": f"web-{n}", "vm": "web"} for n in range(5000)]
            process = await asyncio.create_subprocess_shell(
                f"{' '.join(cli_command('list'))} | head -n 1", env=cli_environment(address),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            done = await end(process)
            assert done.out.startswith("BACKUP") and done.err == ""

    asyncio.run(main())
