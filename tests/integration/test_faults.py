"""Whatever dies, and whenever: the guest and the host are as before, and no half backup is listed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.service import Pause, Service
from tests.integration.state import State
from tests.lab import Lab
from tests.lab.guest import Guest
from tests.lab.services import until

pytestmark = pytest.mark.lab

HOOK = "/etc/qemu/fsfreeze-hook"
HANG = b'[ "$1" != freeze ] || until [ -e /run/hook-ends ]; do sleep 0.1; done'
KILLS = [
    "inspect:helper",
    "prepare:end",
    "t1-snapshot:frozen",
    "t1-snapshot:snapped",
    "passthrough-copy:one",
    "t2-snapshot:prepared",
    "t2-snapshot:taken",
    "vdisk-backup:one",
    "revert:one",
    "release:begin",
    "seal:begin",
]
CANCELS = [
    "inspect:helper",
    "prepare:channel",
    "t1-snapshot:frozen",
    "passthrough-copy:begin",
    "t2-snapshot:taken",
    "vdisk-backup:begin",
    "revert:begin",
    "release:begin",
    "seal:begin",
]


@pytest.fixture(scope="module")
def service(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(lab, tmp_path_factory.mktemp("faults")) as service:
        service.ctl("repository", "init")
        yield service


@pytest.fixture(autouse=True)
def untouched(lab: Lab, plain_guest: Guest, service: Service) -> Iterator[None]:
    before = State.of(lab, plain_guest, service)
    yield
    assert plain_guest.agent("guest-fsfreeze-status") == "thawed"
    plain_guest.exec("for m in / /mnt/data /mnt/iscsi /mnt/lun /mnt/span; do touch $m/.probe && rm $m/.probe; done")
    assert State.of(lab, plain_guest, service) == before
    assert not service.storage_daemons()


@pytest.mark.parametrize("point", KILLS)
def test_killed_daemon_is_cleaned_up_after_at_its_next_start(service: Service, plain_guest: Guest, point: str) -> None:
    service.restart(f"{point}=kill")
    listed = service.ctl("list")
    service.killed_in("backup", plain_guest.name)
    service.start()
    assert service.ctl("list") == listed


@pytest.mark.parametrize("point", CANCELS)
def test_cancelled_job_undoes_what_it_did(service: Service, plain_guest: Guest, point: str) -> None:
    service.restart(f"{point}=cancel")
    listed = service.ctl("list")
    code, _ = service.fails("backup", plain_guest.name)
    assert code == "Cancelled"
    assert service.ctl("list") == listed


@pytest.mark.parametrize("point", ["t1-snapshot:snapped", "t2-snapshot:taken"])
def test_failed_job_undoes_what_it_did(service: Service, plain_guest: Guest, point: str) -> None:
    service.restart(f"{point}=error")
    code, message = service.fails("backup", plain_guest.name)
    assert code == "InjectedFault"
    assert point in message


def test_a_freeze_over_its_budget_is_ended_and_fails_with_the_figure(
    service: Service, plain_guest: Guest, tmp_path: Path
) -> None:
    pause = Pause(tmp_path, "t1-snapshot:frozen")
    service.restart(pause.fault)
    command = service.begin("backup", plain_guest.name, "--freeze-budget", "3")
    pause.wait()
    until(lambda: plain_guest.agent("guest-fsfreeze-status") == "thawed", 60, "the guest is thawed", 0.1)
    pause.go()
    error = service.end(command, status=1)["error"]
    assert error["code"] == "FreezeBudgetExceeded"
    assert "budget of 3000 ms" in error["message"]


def test_a_guest_whose_host_falls_silent_thaws_by_itself(service: Service, plain_guest: Guest, tmp_path: Path) -> None:
    pause = Pause(tmp_path, "t1-snapshot:frozen")
    service.restart(pause.fault)
    command = service.begin("backup", plain_guest.name, "--freeze-budget", "4")
    pause.wait()
    service.signal(signal.SIGSTOP)
    try:
        plain_guest.exec("touch /mnt/data/.probe && rm /mnt/data/.probe", timeout=60)  # blocks until it is thawed
    finally:
        service.signal(signal.SIGCONT)
    pause.go()
    assert service.end(command, status=1)["error"]["code"] == "FreezeBudgetExceeded"


def test_a_guest_that_a_hook_keeps_from_freezing_is_thawed_when_it_freezes_after_all(
    service: Service, plain_guest: Guest
) -> None:
    """The agent answers nothing while the hook hangs, and freezes when it has ended, long after the backup failed."""
    service.restart()
    hooks, hook = plain_guest.hook_log(), plain_guest.read_file(HOOK)
    shebang, body = hook.split(b"\n", 1)
    plain_guest.write_file(HOOK, b"\n".join((shebang, HANG, body)), 0o755)
    try:
        code, message = service.fails("backup", plain_guest.name, "--freeze-budget", "3")
        assert code == "FreezeBudgetExceeded" and "thawed as soon as" in message
        (thaw,) = (job for job in service.ctl("jobs") if job["kind"] == "thaw")
        assert (thaw["vm"], thaw["state"]) == (plain_guest.name, "running")
        code, message = service.fails("backup", plain_guest.name)
        assert code == "Busy" and thaw["id"] in message
        assert plain_guest.hook_log() == hooks
    finally:
        plain_guest.exec("touch /run/hook-ends")

    def thawed() -> bool:
        return any(job["id"] == thaw["id"] and job["state"] == "succeeded" for job in service.ctl("jobs"))

    until(thawed, 60, "the guest is thawed", 0.2)
    assert plain_guest.hook_log() == [*hooks, "freeze", "thaw"]
    plain_guest.write_file(HOOK, hook, 0o755)
    plain_guest.exec("rm /run/hook-ends")


def test_after_all_that_a_backup_works(service: Service, plain_guest: Guest) -> None:
    service.restart()
    result = service.ctl("backup", plain_guest.name)
    assert [item["id"] for item in service.ctl("list")] == [result["backup"]]
