"""A LUN that the domain hands to the guest is read by the host itself while the guest writes to it: T1 all the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration import oracle
from tests.integration.service import Pause, Service
from tests.lab import Lab
from tests.lab.guest import Guest
from tests.lab.workload import Workload

pytestmark = pytest.mark.lab


@dataclass
class Setup:
    lab: Lab
    guest: Guest
    service: Service
    workload: Workload
    directory: Path
    runs: int = 0

    def back_up(self, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A backup in which the writer is well past T1 before the first disk is read; what was said of it, and of
        ``sda``. The restored disks are at one instant within it."""
        self.runs += 1
        before = self.workload.round()
        pause = Pause(self.service.directory, "t1-snapshot:thawed")
        command = self.service.begin("backup", self.guest.name, *words)
        pause.wait()
        self.workload.wait(self.workload.round() + 20)
        pause.go()
        result = self.service.end(command)
        after = self.workload.round() + 1
        pause.again()
        shown = self.service.ctl("show", result["backup"])
        files = self.service.restore_files(result["backup"], f"direct-{self.runs}", self.directory / f"to-{self.runs}")
        logs = oracle.judge(files, self.directory / f"raw-{self.runs}")
        numbers = [log.last for log in logs.values()]
        assert before <= min(numbers) <= max(numbers) <= after
        return result, next(volume for volume in shown["volumes"] if volume["id"] == "sda")


@pytest.fixture(scope="module")
def setup(lab: Lab, plain_guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    directory = tmp_path_factory.mktemp("direct")
    workload = Workload(plain_guest)
    with Service(lab, directory) as service:
        service.ctl("repository", "init")
        service.restart(Pause(directory, "t1-snapshot:thawed").fault)
        workload.start(interval=0.02)
        try:
            yield Setup(lab, plain_guest, service, workload, directory)
        finally:
            workload.stop()


def test_the_host_reads_the_lun_and_the_guest_what_it_overwrote(setup: Setup) -> None:
    result, lun = setup.back_up()
    assert lun["details"]["read_by"] == "host" and not about_it(result)
    assert lun["bytes_read"] > 0


def test_an_increment_is_read_so_too(setup: Setup) -> None:
    result, lun = setup.back_up()
    assert lun["details"]["read_by"] == "host" and not about_it(result)
    assert lun["change"]["method"] in ("tracked", "hashed")


def test_a_lun_that_the_host_cannot_open_is_read_through_the_guest(setup: Setup) -> None:
    with setup.lab.iscsi.closed(setup.guest.luns["lun"].iqn):
        result, lun = setup.back_up("--full")
    assert "read_by" not in lun["details"]
    (warning,) = about_it(result)
    assert "read through the guest, because the host could not" in warning


def about_it(result: dict[str, Any]) -> list[str]:
    """The warnings about how ``sda`` was read."""
    return [warning for warning in result["warnings"] if warning.startswith("sda: ")]
