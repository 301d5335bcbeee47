"""Stacks of volumes over disks of both kinds, all in one backup: at one instant, and sound in the restored guest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration import stacks
from tests.integration.booted import boot_on_new_luns
from tests.integration.service import Service
from tests.integration.stacks import STACKS, Stack
from tests.lab import Lab
from tests.lab.guest import Guest
from tests.lab.workload import Workload

pytestmark = [pytest.mark.lab, pytest.mark.extended]
DIGEST = "sha256sum < /dev/vgs/raw"


@dataclass
class Backed:
    """A guest with stacks that was backed up while its writer wrote to all of them, restored and booted: what
    ``inspect`` had said of each disk (by the names that stacks.py has for them), and what the writer had written around
    the backup."""

    inspected: dict[str, dict[str, Any]]
    before: int
    after: int
    digest: bytes
    workload: Workload
    booted: Guest


@pytest.fixture(scope="module")
def backed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backed]:
    guest = stacks.start(lab)
    directory = tmp_path_factory.mktemp("stacks")
    with Service(lab, directory) as service:
        service.ctl("repository", "init")
        workload = Workload(guest, ["root", "data", "iscsi"], stacks.LOGS)
        digest = guest.exec(DIGEST)
        names = {f"iscsi:{lun.iqn}/{lun.lun}": name for name, lun in guest.luns.items()} | {"sdb": "d1"}
        coverage = service.ctl("inspect", guest.name)["coverage"]
        inspected = {names.get(item["id"], item["id"]): item for item in coverage}
        workload.start(interval=0.02)
        before = workload.round()
        result = service.ctl("backup", guest.name)
        after = workload.round() + 1
        workload.stop()
        for stack in STACKS:
            stacks.check(guest, stack)  # what the backup was taken of is as sound as before
        shown = service.ctl("show", result["backup"])
        guest.destroy()
        booted = boot_on_new_luns(lab, service, guest, shown, directory / "boot")
        stacks.open_all(booted)
        yield Backed(inspected, before, after, digest, workload, booted)
        booted.destroy()


def test_all_logs_are_at_one_instant_within_the_backup(backed: Backed) -> None:
    logs = backed.workload.check(backed.booted)
    assert set(logs) >= set(stacks.LOGS)
    numbers = [log.last for log in logs.values()]
    assert backed.before <= min(numbers) <= max(numbers) <= backed.after


def test_inspect_explains_how_each_disk_is_captured(backed: Backed) -> None:
    methods = {name: item["method"] for name, item in backed.inspected.items() if item["decision"] == "captured"}
    snapshotted = {"vdb", "vdc", "vdd", "s1", "s2", "d1", "iscsi", "span", "sda"}
    expected = dict.fromkeys(snapshotted, "guest-snapshot") | dict.fromkeys(("vda", "vde", "vdf"), "freeze-window")
    assert methods == expected | dict.fromkeys(("p1", "p2", "p3"), "pre-copy")
    reasons = {name: item["reason"] for name, item in backed.inspected.items()}
    assert "vgs-pool_tdata" in reasons["s1"] and "vgs-cipher" in reasons["s2"]
    assert "vault-one has a device-mapper target crypt" in reasons["vde"]
    assert "has a device-mapper target crypt" in reasons["p3"]  # of either half: the volume lies on both
    assert "a md device" in reasons["vdf"] and "a md device" in reasons["p2"]


def test_a_raw_volume_holds_what_it_did(backed: Backed) -> None:
    assert backed.booted.exec(DIGEST) == backed.digest


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: stack.name)
def test_a_restored_stack_is_sound(backed: Backed, stack: Stack) -> None:
    stacks.check(backed.booted, stack)
