"""The main job in guests whose agent runs no programs and touches no files, as Red Hat's: through an installed helper
alone, whatever dies."""

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
    service.run("backup", restricted.name)
    service.wait_killed()
    service.start()
    assert service.ctl("list") == listed
    assert not list((service.state / "journal").iterdir())


@pytest.mark.usefixtures("untouched")
def test_after_all_that_a_backup_holds_one_instant(service: Service, restricted: Guest, tmp_path: Path) -> None:
    service.restart()
    workload = Workload(restricted)
    workload.start(interval=0.02)
    try:
        before = workload.round()
        backup = service.ctl("backup", restricted.name)["backup"]
        after = workload.round() + 1
    finally:
        workload.stop()
    shown = service.ctl("show", backup)
    disks = {
        volume["id"]: tmp_path / (f"{number}.raw" if volume["kind"] == "pass-through" else f"{volume['id']}.qcow2")
        for number, volume in enumerate(shown["volumes"])
    }
    words = [word for ident, path in disks.items() if path.suffix == ".raw" for word in ("--volume", f"{ident}={path}")]
    service.ctl("restore", backup, "--name", "restricted-restored", "--to", str(tmp_path), *words)
    numbers = [log.last for log in oracle.judge(disks, tmp_path / "judged").values()]
    assert before <= min(numbers) <= max(numbers) <= after
