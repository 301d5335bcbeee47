"""The main job in guests whose agent runs no programs and touches no files, as Red Hat's: through an installed helper
alone, whatever dies. Up to Red Hat Enterprise Linux 9.3 a list says what is forbidden, later what is allowed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration import oracle
from tests.integration.installed import helper_installed
from tests.integration.service import Pause, Service
from tests.integration.state import State
from tests.lab import Lab
from tests.lab.guest import Guest
from tests.lab.services import until
from tests.lab.workload import Workload

pytestmark = [pytest.mark.lab, pytest.mark.extended]

ALLOWED = """guest-sync-delimited guest-sync guest-ping guest-get-time guest-set-time guest-info guest-shutdown
    guest-fsfreeze-status guest-fsfreeze-freeze guest-fsfreeze-freeze-list guest-fsfreeze-thaw guest-fstrim
    guest-suspend-disk guest-suspend-ram guest-suspend-hybrid guest-network-get-interfaces guest-get-vcpus
    guest-set-vcpus guest-get-disks guest-get-fsinfo guest-set-user-password guest-get-memory-blocks
    guest-set-memory-blocks guest-get-memory-block-info guest-get-host-name guest-get-users guest-get-timezone
    guest-get-osinfo guest-get-devices guest-ssh-get-authorized-keys guest-ssh-add-authorized-keys
    guest-ssh-remove-authorized-keys guest-get-diskstats guest-get-cpustats""".split()  # noqa: SIM905 - a list of words


@pytest.fixture(scope="module")
def service(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(lab, tmp_path_factory.mktemp("restricted")) as service:
        service.ctl("repository", "init")
        yield service


@pytest.fixture(scope="module")
def restricted(plain_guest: Guest) -> Iterator[Guest]:
    """The guest whose agent has a list of what is forbidden."""
    with helper_installed(plain_guest), plain_guest.agent_restricted():
        yield plain_guest


@pytest.fixture
def untouched(lab: Lab, restricted: Guest, service: Service) -> Iterator[None]:
    """The guest's own means take a moment more than the host waits for."""
    before = State.of(lab, restricted, service)
    yield
    until(lambda: State.of(lab, restricted, service) == before, 30, "guest and host are as before", 0.5)
    assert restricted.agent("guest-fsfreeze-status") == "thawed"


@pytest.mark.usefixtures("untouched")
def test_a_host_that_is_silent_for_the_lease_loses_the_snapshots(
    service: Service, restricted: Guest, tmp_path: Path
) -> None:
    pause = Pause(tmp_path, "passthrough-copy:begin")
    service.configure(guest="lease = 12")
    service.restart(pause.fault)
    try:
        command = service.begin("backup", restricted.name)
        pause.wait()
        service.signal(signal.SIGSTOP)
        try:
            until(lambda: not restricted.exec("dmsetup ls | grep vmbk- || true"), 60, "the lease has ended", 0.5)
        finally:
            service.signal(signal.SIGCONT)
        pause.go()
        assert service.end(command, status=1)["error"]["code"] in ("GuestHelperUnavailable", "SnapshotLost")
    finally:
        service.configure()
        service.restart()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("point", ["t1-snapshot:snapped", "t2-snapshot:taken"])
def test_a_daemon_that_is_killed_is_cleaned_up_after(service: Service, restricted: Guest, point: str) -> None:
    service.restart(f"{point}=kill")
    listed = service.ctl("list")
    service.killed_in("backup", restricted.name)
    service.start()
    assert service.ctl("list") == listed
    assert not list((service.state / "journal").iterdir())


@pytest.mark.usefixtures("untouched")
def test_what_a_killed_helper_left_is_released_by_the_guest_itself(
    service: Service, restricted: Guest, tmp_path: Path
) -> None:
    pause = Pause(tmp_path, "passthrough-copy:begin")
    service.restart(pause.fault)
    command = service.begin("backup", restricted.name)
    pause.wait(command)
    restricted.exec("systemctl kill --signal=KILL 'vmbackupd-guest@*'")
    until(lambda: not restricted.exec("dmsetup ls | grep vmbk- || true"), 60, "the snapshots are released", 0.5)
    pause.go()
    assert service.end(command, status=1)["error"]["code"] in ("GuestHelperUnavailable", "SnapshotLost")


@pytest.mark.usefixtures("untouched")
def test_after_all_that_a_backup_holds_one_instant(service: Service, restricted: Guest, tmp_path: Path) -> None:
    service.restart()
    back_up_and_judge(service, restricted, tmp_path)


def test_an_agent_that_is_told_what_it_may_do_is_enough(
    lab: Lab, service: Service, trixie_guest: Guest, tmp_path: Path
) -> None:
    service.restart()
    before = State.of(lab, trixie_guest, service)
    with helper_installed(trixie_guest), trixie_guest.agent_restricted("--allow-rpcs=" + ",".join(ALLOWED)):
        back_up_and_judge(service, trixie_guest, tmp_path)
    assert State.of(lab, trixie_guest, service) == before


def back_up_and_judge(service: Service, guest: Guest, directory: Path) -> None:
    """A backup under a writer, restored, is at one instant within it."""
    backup, window = service.backup_under(Workload(guest))
    files = service.restore_files(backup, f"{guest.name}-restored", directory / "restored")
    numbers = [log.last for log in oracle.judge(files, directory / "judged").values()]
    assert min(numbers) in window and max(numbers) in window
