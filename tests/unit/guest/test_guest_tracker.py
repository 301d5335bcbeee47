"""Changed-block tracking on this machine's own kernel: what is marked, when it is trusted, what outlives whom."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import random
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.lab.services import until
from tests.unit.guest.support import Start
from tests.unit.guest.tracking import (
    CHUNK,
    Disk,
    Tracking,
    chunks,
    loop_disk,
    pins,
    ranges,
    run,
    unmount,
    usable,
    zram_disk,
)
from vmbackupd.errors import GuestHelperError
from vmbackupd.guest.client import GuestHelper
from vmbackupd.guest_helper import bpf, btf, tracked
from vmbackupd.guest_helper.failures import HelperError
from vmbackupd.guest_helper.program import BIOS, REQUESTS, Fields
from vmbackupd.guest_helper.tracker import Trackers
from vmbackupd.units import GiB, MiB, TiB

pytestmark = pytest.mark.skipif(not usable(), reason="no root, BPF or loop devices")

SIZE = 64 * MiB + 512 * 3
BLKDISCARD, BLKSECDISCARD, BLKZEROOUT = 0x1277, 0x127D, 0x127F
WRITE, DISCARD, ZEROES = 1, 3, 9


@pytest.fixture
def tracking(tmp_path: Path) -> Iterator[Tracking]:
    bpffs = tmp_path / "bpf"
    bpffs.mkdir()
    tracking = Tracking(bpffs)
    yield tracking
    tracking.trackers.close()
    unmount(bpffs)


@pytest.fixture
def file() -> Iterator[Path]:
    """A file in memory: it knows discards, and no filesystem below delays its writes."""
    path = Path(f"/dev/shm/vmbackupd-test-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(params=["requests", "bios"])
def disk(request: pytest.FixtureRequest, file: Path) -> Iterator[Disk]:
    """A disk of either kind."""
    if request.param == "requests":
        with loop_disk(file, SIZE) as made:
            yield made
        return
    if not Path("/sys/class/zram-control").exists():
        pytest.skip("no zram")
    with zram_disk(SIZE) as made:
        yield made


@pytest.fixture
def loop(file: Path) -> Iterator[Disk]:
    with loop_disk(file, SIZE) as made:
        yield made


def ioctl(path: str, code: int, offset: int, length: int) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.ioctl(descriptor, code, struct.pack("QQ", offset, length))
    finally:
        os.close(descriptor)


# what is marked


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 4096),
        (5 * CHUNK, CHUNK),
        (CHUNK - 4096, 8192),
        (7 * CHUNK + 4096, 4096),
        (3 * CHUNK - 4096, 2 * CHUNK + 8192),
        (MiB + 4096, 12 * MiB),
        (64 * MiB - CHUNK, CHUNK),
    ],
)
def test_a_write_marks_the_chunks_that_it_touches(tracking: Tracking, disk: Disk, offset: int, length: int) -> None:
    tracking.track(disk)
    disk.write(offset, length)
    assert tracking.collect(disk) == chunks(offset, length) == tracking.changed(disk)
    assert tracking.collect(disk) == set()


def test_the_last_sectors_of_a_disk_that_ends_within_a_chunk(tracking: Tracking, loop: Disk) -> None:
    tracking.track(loop)
    loop.write(SIZE - 512, 512)
    assert tracking.collect(loop) == {SIZE // CHUNK}


def test_reading_and_flushing_mark_nothing(tracking: Tracking, disk: Disk) -> None:
    disk.write(0, MiB)
    tracking.track(disk)
    disk.read(0, MiB)
    disk.flush()
    assert tracking.collect(disk) == set()


def test_many_random_writes(tracking: Tracking, disk: Disk) -> None:
    tracking.track(disk)
    size = disk.size // 4096 * 4096
    expected = set()
    for offset, length in ranges(7, size // 8, 300):  # zram has blocks of 4 KiB
        disk.write(offset * 8, length // 512 * 512 if length % 4096 == 0 else 4096)
        expected |= chunks(offset * 8, length if length % 4096 == 0 else 4096)
    assert tracking.collect(disk) == expected


def test_writes_through_the_page_cache_and_through_memory(tracking: Tracking, loop: Disk) -> None:
    tracking.track(loop)
    with open(loop.path, "r+b", buffering=0) as file:
        file.seek(9 * CHUNK + 100)
        file.write(b"x" * 10)
        with mmap.mmap(file.fileno(), 2 * CHUNK, offset=20 * CHUNK) as memory:
            memory[CHUNK + 5] = 1
            memory.flush()
        os.fsync(file.fileno())
    assert tracking.collect(loop) == {9, 21}


def test_writes_through_a_partition_that_was_made_later(tracking: Tracking, file: Path) -> None:
    with loop_disk(file, SIZE, "--partscan") as loop:
        tracking.track(loop)
        run("addpart", loop.path, "1", "2048", "8192")
        with open(loop.path + "p1", "r+b", buffering=0) as part:
            part.seek(3 * CHUNK)
            part.write(b"x" * 4096)
            os.fsync(part.fileno())
        assert tracking.collect(loop) == {16 + 3}


def test_writes_discards_and_zeroes_are_told_apart(tracking: Tracking, loop: Disk) -> None:
    tracking.track(loop)
    loop.write(0, CHUNK)
    assert tracking.kinds(loop) == {WRITE}
    tracking.collect(loop)
    ioctl(loop.path, BLKDISCARD, 16 * MiB, 20 * MiB)
    assert tracking.kinds(loop) == {DISCARD}
    assert tracking.collect(loop) == chunks(16 * MiB, 20 * MiB)
    ioctl(loop.path, BLKZEROOUT, CHUNK, 3 * CHUNK)
    name = os.path.basename(loop.path)
    knows = int(Path(f"/sys/block/{name}/queue/write_zeroes_max_bytes").read_text()) > 0
    assert tracking.kinds(loop) == {ZEROES if knows else WRITE}
    assert tracking.collect(loop) == {1, 2, 3}


def test_a_discard_of_terabytes_is_marked_exactly(tracking: Tracking, file: Path) -> None:
    with loop_disk(file, TiB) as disk:
        assert tracking.track(disk)[0]["tracking"]
        ioctl(disk.path, BLKDISCARD, 100 * GiB + 5 * CHUNK, 900 * GiB + 33 * CHUNK)
        count = tracking.trackers.collect(disk.devno)
        assert count == (900 * GiB + 33 * CHUNK) // CHUNK
        first = (100 * GiB) // CHUNK + 5
        value = int.from_bytes(tracking.trackers.fresh(disk.devno), "little")
        assert value >> first == (1 << count) - 1 and value & ((1 << first) - 1) == 0


def test_a_disk_whose_discards_may_have_many_ranges(
    tracking: Tracking, loop: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As NVMe has them. Those with one range are marked as exactly as on other disks."""
    look = tracked.look
    monkeypatch.setattr(tracked, "look", lambda device: look(device)._replace(scattered=True))
    tracking.track(loop)
    ioctl(loop.path, BLKDISCARD, 16 * MiB + CHUNK, 20 * MiB)
    assert tracking.collect(loop) == chunks(16 * MiB + CHUNK, 20 * MiB)
    loop.write(CHUNK, 4096)
    assert tracking.collect(loop) == {1}


@pytest.mark.parametrize(
    ("name", "reason"), [("nvme0n1", "NVMe multipath head"), ("nvme10n2", "multipath"), ("md0", "")]
)
def test_disks_that_do_not_show_when_writes_end(name: str, reason: str) -> None:
    if not reason:
        tracked._require_whole_bios(name, "9:0")
        return
    with pytest.raises(HelperError, match=reason):
        tracked._require_whole_bios(name, "259:0")


def test_a_disk_that_grows_counts_as_changed(tracking: Tracking, loop: Disk, file: Path) -> None:
    tracking.track(loop)
    os.truncate(file, 2 * SIZE)
    run("losetup", "--set-capacity", loop.path)
    loop.write(SIZE + MiB, 4096)
    assert len(tracking.collect(loop)) == -(-SIZE // CHUNK)
    assert "behind the disk's former end" in tracking.trackers.reason(loop.devno)


def test_other_disks_are_not_marked(tracking: Tracking, loop: Disk) -> None:
    other = Path(f"/dev/shm/vmbackupd-test-{os.getpid()}-other")
    try:
        with loop_disk(other, SIZE) as second:
            tracking.track(loop, second)
            second.write(0, 4096)
            assert (tracking.collect(loop), tracking.collect(second)) == (set(), {0})
            loop.write(CHUNK, 4096)
            assert tracking.collect(second) == set()  # it has flipped for both
            assert tracking.collect(loop) == {1}
    finally:
        other.unlink()


# T1 and generations


def test_what_changes_after_t1_belongs_to_the_next_backup(tracking: Tracking, disk: Disk) -> None:
    tracking.track(disk)
    disk.write(0, 4096)
    tracking.trackers.flip()
    disk.write(CHUNK, 4096)
    assert tracking.collect(disk) == {0} == tracking.changed(disk)
    disk.write(2 * CHUNK, 4096)
    assert tracking.collect(disk) == set()
    tracking.trackers.settle("backup-1")
    answer = tracking.track(disk)[0]
    assert (answer["generation"], answer["reason"]) == ("backup-1", "")
    assert tracking.changed(disk) == {1, 2}


def test_a_disk_captured_later_than_t1(tracking: Tracking, loop: Disk) -> None:
    """Its T1 is when a pass finds nothing new; for the others nothing after T1 is lost."""
    other = Path(f"/dev/shm/vmbackupd-test-{os.getpid()}-other")
    try:
        with loop_disk(other, SIZE) as second:
            tracking.track(loop, second)
            for disk in (loop, second):
                disk.write(0, 4096)
            tracking.trackers.flip()
            for number, found in ((1, [(0, 1)]), (2, [(1, 3)]), (3, [(3, 4)])):
                loop.write(number * CHUNK, 4096)
                second.write(number * CHUNK, 4096)
                assert tracking.trackers.marked([loop.devno]) == {loop.devno: found}
            assert tracking.trackers.marked([loop.devno]) == {loop.devno: []}
            assert (tracking.changed(loop), tracking.changed(second)) == ({0, 1, 2, 3}, {0})
            tracking.trackers.again(loop.devno, [(2, 3)])  # T1 of a part of it had come before
            tracking.trackers.settle("backup-1")
            tracking.track(loop, second)
            assert (tracking.changed(loop), tracking.changed(second)) == ({2}, {1, 2, 3})
    finally:
        other.unlink()


def test_a_backup_that_is_not_published_forgets_nothing(tracking: Tracking, disk: Disk) -> None:
    tracking.backup(disk, "backup-1")
    disk.write(0, 4096)
    tracking.track(disk)
    tracking.trackers.flip()
    disk.write(CHUNK, 4096)
    tracking.collect(disk)
    disk.write(2 * CHUNK, 4096)
    assert tracking.track(disk)[0]["generation"] == "backup-1"
    assert tracking.changed(disk) == {0, 1, 2}


def test_rounds_before_t1(tracking: Tracking, disk: Disk) -> None:
    tracking.backup(disk, "backup-1")
    tracking.track(disk)
    for number in range(4):
        disk.write(number * CHUNK, 4096)
        assert tracking.collect(disk) == {number}
    disk.write(9 * CHUNK, 4096)
    tracking.trackers.flip()
    assert tracking.collect(disk) == {9}
    assert tracking.changed(disk) == {0, 1, 2, 3, 9}


def test_a_child_sees_what_is_collected(tracking: Tracking, loop: Disk) -> None:
    tracking.track(loop)
    ask, asked = os.pipe()
    answer, answered = os.pipe()
    changed, fresh = tracking.trackers.changed(loop.devno), tracking.trackers.fresh(loop.devno)
    child = os.fork()
    if child == 0:
        os.read(ask, 1)
        os.write(answered, bytes((changed[0], fresh[0])))
        os._exit(0)
    loop.write(3 * CHUNK, 4096)
    tracking.collect(loop)
    os.write(asked, b"x")
    assert os.read(answer, 2) == b"\x08\x08"
    os.waitpid(child, 0)
    for descriptor in (ask, asked, answer, answered):
        os.close(descriptor)


# what is trusted


def test_a_disk_not_seen_before(tracking: Tracking, loop: Disk) -> None:
    answer = tracking.track(loop)[0]
    assert answer == {
        "device": loop.devno,
        "tracking": True,
        "generation": None,
        "reason": "it was not tracked since the guest started",
    }
    assert tracking.track(loop)[0]["reason"] == "no backup of it was completed yet"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("consumer", "another host or repository used the tracker"),
        ("identity", "another disk has this device number now"),
        ("size", "the disk was resized"),
        ("refilled", "the disk was detached and attached again"),
        ("boot", "the guest was started anew"),
        ("version", "the tracker is another version's"),
        ("record", "the tracker's record is damaged"),
        ("link", "the tracker is damaged: No such file or directory"),
        ("jump", "the tracker is damaged: No such file or directory"),
        ("marks", "the tracker is damaged: No such file or directory"),
        ("switch", "the tracker's switch was replaced"),
    ],
)
def test_what_does_not_match_is_begun_anew(
    tracking: Tracking, loop: Disk, file: Path, change: str, reason: str
) -> None:
    tracking.backup(loop, "backup-1")
    tracking.track(loop)
    disk, pinned = tracking.trackers._disks[loop.devno], tracking.bpffs / "vmbackupd" / loop.devno.replace(":", "-")
    wanted = {}
    if change in ("consumer", "identity"):
        wanted[change] = "another"
    elif change == "size":
        os.truncate(file, 2 * SIZE)
        run("losetup", "--set-capacity", loop.path)
    elif change == "refilled":
        loop.close()
        run("losetup", "--detach", loop.path)
        run("losetup", loop.path, str(file))
        loop.__init__(loop.path)  # type: ignore[misc]
    elif change == "boot":
        disk._keep(boot_id="another")
    elif change == "version":
        disk._keep(version=0)
    elif change == "record":
        disk.marks._memory[80] ^= 1
    elif change == "link":
        (pinned / f"{REQUESTS[1]}-2").unlink()
    elif change == "jump":
        (pinned / REQUESTS[0]).unlink()
    elif change == "marks":
        (pinned / "marks").unlink()
    else:
        (tracking.bpffs / "vmbackupd/switch").unlink()
    answer = tracking.track(loop, **wanted)[0]
    assert answer["tracking"] is True and answer["generation"] is None
    assert answer["reason"].startswith(reason)
    loop.write(5 * CHUNK, 4096)
    assert tracking.collect(loop) == {5}, "the new tracker works"


# who is refused


def test_partitions_and_what_is_not_there_are_refused(tracking: Tracking, file: Path) -> None:
    with loop_disk(file, SIZE, "--partscan") as loop:
        run("addpart", loop.path, "1", "2048", "8192")
        part = Path(f"/sys/class/block/{os.path.basename(loop.path)}p1/dev").read_text().strip()
        for device, reason in ((part, "is a partition: whole disks are tracked"), ("4095:1", "there is no device")):
            asked = {"consumer": "x", "disks": [{"device": device, "identity": "x"}]}
            answer = tracking.helper().track(asked)["disks"][0]
            assert not answer["tracking"] and reason in answer["reason"]


def test_the_longest_names_fit_into_the_record(tracking: Tracking, loop: Disk) -> None:
    names = {"consumer": "\U0001f4be" * 255, "identity": "\U0001f4be" * 1024}
    tracking.track(loop, **names)
    tracking.trackers.flip()
    tracking.trackers.settle("\U0001f4be" * 255)
    assert tracking.track(loop, **names)[0]["generation"] == "\U0001f4be" * 255


def test_marks_have_a_limit(tracking: Tracking, loop: Disk) -> None:
    answer = tracking.track(loop, limit=4096)[0]
    assert answer["tracking"] is False
    assert "MiB of kernel memory" in answer["reason"]
    assert pins(tracking.bpffs) == ["vmbackupd", "vmbackupd/switch"]


def test_two_helpers_at_a_time(tracking: Tracking, loop: Disk) -> None:
    tracking.track(loop)
    other = Trackers(str(tracking.bpffs))
    answer = other.track({"consumer": "host", "disks": [{"device": loop.devno, "identity": "wwn"}]})["disks"][0]
    assert (answer["tracking"], answer["reason"]) == (False, "another backup of this guest uses the tracker")
    with pytest.raises(HelperError, match="another backup"):
        other.untrack()


def test_a_child_does_not_keep_the_next_out(tracking: Tracking, loop: Disk) -> None:
    """A data server may end later than the session that it served."""
    tracking.track(loop)
    ask, asked = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(asked)
        os.read(ask, 1)
        os._exit(0)
    try:
        assert tracking.trackers.untrack() == [loop.devno]
        assert tracking.track(loop)[0]["tracking"]
    finally:
        for descriptor in (ask, asked):
            os.close(descriptor)
        os.waitpid(child, 0)


def test_a_kernel_without_types(tmp_path: Path) -> None:
    with pytest.raises(HelperError, match="does not describe its types"):
        btf.Types(str(tmp_path / "none"))
    (tmp_path / "short").write_bytes(Path(btf.VMLINUX).read_bytes()[:1000])
    with pytest.raises(HelperError, match="does not describe its types"):
        btf.Types(str(tmp_path / "short"))


def test_a_refused_program_says_why() -> None:
    with pytest.raises(HelperError, match=r"the kernel refuses the program test: .*R0"):
        bpf.load("test", struct.pack("<BBhi", 0x95, 0, 0, 0))


def test_the_kernel_tells_where_everything_is() -> None:
    fields = Fields(btf.Types())
    for event in REQUESTS + BIOS:
        assert fields.of(event).argument in (0, 1)


# what stays and what goes


def test_tracking_outlives_its_processes(tracking: Tracking, loop: Disk) -> None:
    """Nothing but pins keeps it: no process, no descriptor."""
    tracking.backup(loop, "backup-1")
    loop.write(4 * CHUNK, 4096)
    assert tracking.track(loop)[0]["generation"] == "backup-1"
    assert tracking.changed(loop) == {4}


def test_untrack_leaves_nothing(tracking: Tracking, loop: Disk) -> None:
    tracking.backup(loop, "backup-1")
    tracking.track(loop)
    key = loop.devno.replace(":", "-")
    programs = [*REQUESTS, *(f"{event}-{copy}" for event in REQUESTS for copy in range(3))]
    expected = ["", f"/{key}", *(f"/{key}/{name}" for name in (*programs, "marks")), "/switch"]
    assert pins(tracking.bpffs) == sorted("vmbackupd" + name for name in expected)
    links = [
        struct.unpack_from("=I", bpf._info(link, 64), 4)[0] for link in tracking.trackers._disks[loop.devno]._links
    ]
    assert all(running(link) for link in links)
    assert tracking.helper().untrack() == [loop.devno]
    assert tracking.helper().untrack() == []
    assert pins(tracking.bpffs) == []
    until(lambda: not any(running(link) for link in links), 10, "the programs are gone", 0.01)


def running(link: int) -> bool:
    """Whether the kernel still has a link, by its number."""
    try:
        os.close(bpf._bpf(30, struct.pack("=III", link, 0, 0)))  # BPF_LINK_GET_FD_BY_ID
    except FileNotFoundError:
        return False
    return True


def test_a_disk_that_is_gone_is_forgotten(tracking: Tracking, loop: Disk) -> None:
    tracking.backup(loop, "backup-1")
    (tracking.bpffs / "vmbackupd/4095-1").mkdir()
    tracking.track(loop)
    assert "vmbackupd/4095-1" not in pins(tracking.bpffs)


@pytest.fixture
def system_bpffs() -> Iterator[Path]:
    """The one that a helper takes, for one test on this machine at a time; unmounted again where it was not mounted."""
    path = Path("/sys/fs/bpf")
    with open("/run/lock/vmbackupd-test-bpffs", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        mounted = os.path.ismount(path)
        yield path
        run(sys.executable, "-m", "vmbackupd.guest_helper", "--untrack")
        assert not (path / "vmbackupd").exists()
        if not mounted:
            unmount(path)


def test_over_the_control_protocol(start_helper: Start, tmp_path: Path, loop: Disk, system_bpffs: Path) -> None:
    """A real helper; the next one takes over from it."""

    async def helper() -> GuestHelper:
        start_helper()
        return await GuestHelper.reconnect(str(tmp_path / "control"), vm="vm", job="j01234567")

    async def backup(since: str | None, generation: str) -> int:
        session = await helper()
        answers = await session.track("host", {loop.devno: "wwn", "4095:1": "none"})
        assert [(answer.tracking, answer.generation) for answer in answers] == [(True, since), (False, None)]
        loop.write(3 * CHUNK, 4096)
        collected = await session.collect(loop.devno)
        with pytest.raises(GuestHelperError, match="T1 was not taken"):
            await session.settle(generation)
        await session.prepare_capture([loop.devno], limit=MiB)
        await session.arm(60)
        captured = await session.capture([loop.devno], deadline=10)
        await session.disarm()
        await session.settle(generation)
        await session.quit()
        await session.close()
        assert captured.disks[0].chunks == 0
        return collected.chunks

    assert asyncio.run(backup(None, "backup-1")) == 1
    loop.write(9 * CHUNK, 4096)
    (tmp_path / "control").unlink()
    assert asyncio.run(backup("backup-1", "backup-2")) == 2
    assert "vmbackupd/switch" in pins(system_bpffs)


# writers that nobody waits for


def test_a_write_that_is_under_way_at_the_switch_is_marked_on_both_sides(tracking: Tracking, tmp_path: Path) -> None:
    """The disk lies on a filesystem that is frozen: its writes wait for the thaw."""
    below = Path(f"/dev/shm/vmbackupd-test-{os.getpid()}-below")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    try:
        with loop_disk(below, 128 * MiB) as lower:
            run("mkfs.ext4", "-q", lower.path)
            run("mount", lower.path, str(mounted))
            try:
                with loop_disk(mounted / "disk", SIZE) as disk:
                    tracking.track(disk)
                    run("fsfreeze", "--freeze", str(mounted))
                    writer = threading.Thread(target=disk.write, args=(7 * CHUNK, 4096))
                    try:
                        writer.start()
                        until(lambda: bool(tracking.kinds(disk)), 10, "the write is submitted", 0.01)
                        tracking.trackers.flip()
                        assert tracking.collect(disk) == {7}
                        assert tracking.kinds(disk) == set()
                    finally:
                        run("fsfreeze", "--unfreeze", str(mounted))
                        writer.join()
                    tracking.trackers.settle("backup-1")
                    tracking.track(disk)
                    assert tracking.changed(disk) == {7}
            finally:
                run("umount", str(mounted))
    finally:
        below.unlink()


def test_no_change_is_lost_between_backups_under_a_writer(tracking: Tracking, loop: Disk) -> None:
    """Each backup reads, after its T1, only what changed, from the live disk; every fourth is not published. When the
    writer rests, the copy is the disk."""
    copy = bytearray(loop.size)
    tracking.backup(loop, "backup-0")
    published, rest = 0, threading.Event()
    writer = threading.Thread(target=write_until, args=(rest, loop.path))
    writer.start()
    try:
        for number in range(1, 25):
            assert tracking.track(loop)[0]["generation"] == f"backup-{published}"
            if number % 3 == 0:
                tracking.collect(loop)
            tracking.trackers.flip()
            tracking.collect(loop)
            copy_changed(tracking, loop, copy)
            if number % 4:
                published = number
                tracking.trackers.settle(f"backup-{number}")
    finally:
        rest.set()
        writer.join()
    tracking.track(loop)
    assert len(tracking.changed(loop)) < loop.size // CHUNK, "everything was marked: this proves nothing"
    copy_changed(tracking, loop, copy)
    loop.flush()
    different = [
        chunk
        for chunk in range(loop.size // CHUNK)
        if copy[chunk * CHUNK : (chunk + 1) * CHUNK] != loop.read(chunk * CHUNK, CHUNK)
    ]
    assert different == []


def write_until(rest: threading.Event, path: str) -> None:
    """Writes, discards and zeroes at random places, all through the first half of the disk."""
    disk, dice = Disk(path), random.Random(3)
    try:
        while not rest.is_set():
            length = 4096 * dice.choice((1, 1, 1, 2, 16, 33))
            offset = 4096 * dice.randrange(SIZE // 2 // 4096)
            kind = dice.randrange(20)
            if kind > 1:
                disk.write(offset, length, dice.randrange(1 << 30))
            else:
                ioctl(path, (BLKDISCARD, BLKZEROOUT)[kind], offset, length)
    finally:
        disk.close()


def copy_changed(tracking: Tracking, disk: Disk, copy: bytearray) -> None:
    for chunk in sorted(tracking.changed(disk)):
        length = min(CHUNK, disk.size - chunk * CHUNK)
        copy[chunk * CHUNK : chunk * CHUNK + length] = disk.read(chunk * CHUNK, length)


def test_a_helper_that_is_killed_at_any_line_loses_nothing(tracking: Tracking, loop: Disk) -> None:
    """It costs a full read at worst. The helper's process dies at one line after the other of a whole backup."""
    tracking.backup(loop, "backup-0")
    base, number, at, full, outcomes = "backup-0", 0, 0, 0, set()
    unread: set[int] = set()  # written since ``base``
    while True:
        number, at = number + 1, at + 4
        before, after = number * 3 % 1000, number * 3 % 1000 + 1
        loop.write(before * CHUNK, 4096)
        tracking.helper()
        ended = killed_backup(tracking, loop, f"backup-{number}", after, at)
        answer = tracking.track(loop)[0]
        assert answer["tracking"]
        wrote = loop.read(after * CHUNK, 512)[:4] == struct.pack("=I", number)
        if answer["generation"] == f"backup-{number}":
            base, unread = f"backup-{number}", set()
        else:
            unread.add(before)
        unread |= {after} if wrote else set()
        outcomes.add(answer["generation"] is not None and answer["generation"] == f"backup-{number}")
        if answer["generation"] is None:
            full += 1
            tracking.trackers.flip()
            base, unread = f"full-{number}", set()
            tracking.trackers.settle(base)
        else:
            assert answer["generation"] == base
            assert unread <= tracking.changed(loop), f"killed at line {at}"
        if ended:
            break
    assert outcomes == {False, True} and number > 30
    assert full <= number // 10


def killed_backup(tracking: Tracking, disk: Disk, generation: str, chunk: int, lines: int) -> bool:
    """A helper in a process of its own that makes a backup, and writes ``chunk`` after T1, but is killed after some
    lines; False then."""
    child = os.fork()
    if child == 0:
        left = lines

        def line(frame: FrameType, event: str, argument: object) -> object:
            nonlocal left
            if "guest_helper" not in frame.f_code.co_filename:
                return None
            left -= event == "line"
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return line

        try:
            sys.settrace(line)  # type: ignore[arg-type]
            tracking.track(disk)
            tracking.trackers.collect(disk.devno)
            tracking.trackers.flip()
            disk.write_bytes(chunk * CHUNK, struct.pack("=I", int(generation[7:])).ljust(4096, b"x"))
            tracking.trackers.collect(disk.devno)
            tracking.trackers.settle(generation)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status == 0
