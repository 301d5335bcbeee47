"""What every test shares: the lab, its guests, and the rule that a test leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests import outliving

if TYPE_CHECKING:
    from tests.lab.ceph import Ceph
    from tests.lab.guest import Guest
    from tests.lab.lab import Lab
    from tests.lab.qemu import PlainGuest

PROGRAMS = """
    qemu-system-x86_64 qemu-img qemu-storage-daemon libvirtd dbus-daemon tgtd tgtadm mmdebstrap mkfs.ext4 debugfs e2fsck
    unshare gzip
"""
LAB_FIXTURES = {"lab", "plain_guest", "lvm_guest", "trixie_guest", "bullseye_guest", "unmanaged_guest"}


def missing() -> list[str]:
    """What this machine lacks for the lab."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS.split() if shutil.which(name, path=path) is None]
    return lacking if os.geteuid() == 0 else ["root's rights", *lacking]


def require(what: str, present: bool) -> None:
    """Skip the test where a part is missing; in CI (``CI=true``) it fails: a suite that skips proves nothing."""
    if present:
        return
    if os.environ.get("CI"):
        pytest.fail(f"missing on this machine: {what}", pytrace=False)
    pytest.skip(f"missing on this machine: {what}")


def pytest_report_header() -> list[str]:
    lacking = missing()
    cache = "?"
    if not lacking:
        from tests.lab import image

        built = (image.cache_directory() / image.recipe() / "complete").exists()
        cache = "guest images built" if built else "guest images to be built (about 80 s, once)"
    kvm = "present (tried when the lab starts)" if Path("/dev/kvm").exists() else "absent: guests are emulated"
    return [f"lab: {'missing ' + ', '.join(lacking) if lacking else cache}; /dev/kvm {kvm}; {os.cpu_count()} CPUs"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the lab, and run it last: cheap tests fail first."""
    for item in items:
        if LAB_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("lab")
    items.sort(key=lambda item: item.get_closest_marker("lab") is not None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where a test fails that has guests, their kernels' last words are part of the report, and all of it is said at
    once: a run may be cut short before its summary."""
    report = yield
    if not report.failed:
        return report
    opened = getattr(item, "funcargs", {}).get("lab")
    if opened is not None:
        from tests.lab.silence import words_of

        for guest in sorted(opened.guests, key=lambda guest: guest.name):
            report.sections.append((f"kernel log of guest {guest.name}", words_of(guest)))
    terminal = item.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        terminal.write_sep("_", f"{report.when} of {item.nodeid} failed")
        for title, text in [("", report.longreprtext), *report.sections]:
            terminal.write_line(f"{title}\n{text}")
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What needs a guest that fell silent fails at once, instead of waiting for it in vain."""
    wanted = LAB_FIXTURES & set(getattr(item, "fixturenames", ()))
    if wanted:
        from tests.lab.silence import silent_among

        silent = silent_among(wanted)
        if silent is not None:
            pytest.fail(silent, pytrace=False)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The session's lab, started when the first test asks for it."""
    lacking = missing()
    require(", ".join(lacking), not lacking)
    from tests.lab.lab import Lab

    with Lab() as opened:
        yield opened


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """The session's object store, a Ceph cluster with a gateway; started when the first test asks for it (15 s)."""
    from tests.lab.ceph import Ceph, missing

    lacking = missing()
    require(", ".join(lacking), not lacking)
    with Ceph() as opened:
        yield opened


@pytest.fixture(scope="session")
def plain_guest(lab: Lab) -> Iterator[Guest]:
    """The session's guest whose root is a bare ext4 on vda. Shared: leave it as it was."""
    guest = lab.start_guest("plain")
    yield guest
    require_healthy_kernel(guest)


@pytest.fixture(scope="session")
def lvm_guest(lab: Lab) -> Iterator[Guest]:
    """The session's guest with everything on LVM. Shared: leave it as it was."""
    guest = lab.start_guest("lvm")
    yield guest
    require_healthy_kernel(guest)


@pytest.fixture(scope="session")
def trixie_guest(lab: Lab) -> Iterator[Guest]:
    """The session's guest with Debian 13 (Linux 6.12). Shared: leave it as it was."""
    guest = lab.start_guest("trixie")
    yield guest
    require_healthy_kernel(guest)


@pytest.fixture(scope="session")
def bullseye_guest(lab: Lab) -> Iterator[Guest]:
    """The session's guest with Debian 11 (Linux 5.10). Shared: leave it as it was."""
    guest = lab.start_guest("bullseye")
    yield guest
    require_healthy_kernel(guest)


@pytest.fixture(scope="session")
def unmanaged_guest(lab: Lab) -> Iterator[PlainGuest]:
    """The session's guest that no libvirt runs, otherwise as ``plain_guest``. Shared: leave it as it was."""
    from tests.lab.qemu import PlainGuest

    guest = lab.start_guest("plain", "unmanaged", libvirt=False)
    assert isinstance(guest, PlainGuest)
    yield guest
    require_healthy_kernel(guest)


def require_healthy_kernel(guest: Guest) -> None:
    """Nothing that was done to a guest in the whole session may have cost it an I/O error, a hang or a filesystem."""
    log = guest.exec("dmesg").decode(errors="replace").splitlines()
    complaints = ("I/O error", "EXT4-fs error", "EXT4-fs warning", "blocked for more than", "Oops", "BUG:")
    bad = [line for line in log if any(complaint in line for complaint in complaints)]
    assert not bad, f"{guest.name}: " + "; ".join(bad[:10])


def children() -> dict[int, str]:
    """Our child processes, also those that ended and were not waited for: pid → command line."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            pids = (task / "children").read_text().split()
        except OSError:
            continue
        for pid in pids:
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            found[int(pid)] = words or "(a zombie)"
    return found


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a child process, a thread or a running event loop behind. The lab outlives a test."""
    if LAB_FIXTURES & set(request.fixturenames):
        request.getfixturevalue("lab")  # its threads and processes are older than the test
    if "ceph" in request.fixturenames:
        request.getfixturevalue("ceph")
    threads = set(threading.enumerate())
    before = children()
    yield
    left = [
        f"process {pid}: {words}"
        for pid, words in children().items()
        if pid not in before and pid not in outliving.PIDS and "supervisor.py" not in words
    ]
    for thread in threading.enumerate():
        if thread not in threads and not thread.daemon and thread.is_alive():
            thread.join(2)  # a pool's threads end a moment after its shutdown
            if thread.is_alive():
                left.append(f"thread {thread.name}")
    if asyncio._get_running_loop() is not None:
        left.append("a running event loop")
    assert not left, "left behind: " + "; ".join(left)
