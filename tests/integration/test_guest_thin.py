"""Changes below a thin pool, told from the pool's metadata alone, in a real guest.

The oracle is the LUN's file on the host at the two T1s: a chunk that is said to be unchanged is the same in both.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.service import Service
from tests.integration.test_guest_exports import CHUNK, chunks
from tests.integration.test_guest_helper import Rig, fetch, frozen, luns_of, run_in_lab
from tests.lab.guest import Guest
from tests.lab.lab import Lab
from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.guest import topology
from vmbackupd.guest.client import THIN, GuestHelper, ThinState
from vmbackupd.units import MiB

pytestmark = [pytest.mark.lab, pytest.mark.extended]

MAKE = """
set -e
pvcreate -q -q -y {device} && vgcreate -q -q vgthin {device}
lvcreate -q -q -y --type thin-pool -c 64k -L 260m -n pool --poolmetadatasize 4m vgthin
for name in a b idle; do
    lvcreate -q -q -y -V 100m -n $name --thinpool vgthin/pool
    mkfs.ext4 -q -b 4096 -J size=4 /dev/vgthin/$name
    mkdir -p /mnt/$name && mount -o discard /dev/vgthin/$name /mnt/$name
    head -c 20M /dev/urandom > /mnt/$name/file && sync
done
lvcreate -q -q -s -n older vgthin/b  # the guest's own snapshot, which is not live
umount /mnt/idle && lvchange -q -q -an vgthin/idle
"""


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    guest = lab.start_guest("big", "thin", luns={"pool": 320 * MiB})
    device = guest.exec(f"lsblk -dno PATH,SERIAL | grep -w {guest.luns['pool'].serial}").decode().split()[0]
    guest.exec(MAKE.format(device=device), timeout=180)
    yield guest
    guest.destroy()


def test_changes_below_a_pool(lab: Lab, guest: Guest, tmp_path: Path) -> None:
    """Blocks overwritten in place, discarded, freed and taken again, devices made and removed, between backups; at last
    the LUN is set back to what it was, which the pool cannot hide."""
    moments: list[str] = []

    async def work(rig: Rig) -> None:
        turn = len(moments)
        helper = await rig.start()
        state = await backup(rig, helper, moments[-1] if moments else "", tmp_path / f"t1-{turn}")
        moments.append(state.moment)
        assert state.known == (turn in (1, 2)), state
        if state.known:
            path = await rig.hypervisor.attach_channel(rig.guest.uuid, rig.data)
            await helper.serve(rig.data, {"pool": state.device})
            await fetch(path, f"pool{THIN}", tmp_path / "bitmap")
            compare(tmp_path / "bitmap", tmp_path / f"t1-{turn - 1}", tmp_path / f"t1-{turn}")
        elif turn:
            assert "has lost the mark" in state.reason
        await helper.release()
        await helper.quit()

    for turn in range(3):
        run_in_lab(lab, guest, tmp_path, work)
        assert "vmbk" not in guest.exec("lvs -a --noheadings; dmsetup ls").decode()
        change(guest, turn, "older" if turn == 0 else f"new{turn - 1}")
    guest.exec(STOP)
    with open(guest.luns["pool"].path, "r+b") as file:
        file.write((tmp_path / "t1-1").read_bytes())
    guest.exec(START)
    run_in_lab(lab, guest, tmp_path, work)
    assert len(moments) == 4 and len(set(moments)) == 4
    guest.exec(STOP + "lvchange -q -q -y -ay vgthin/pool_tmeta && thin_check /dev/vgthin/pool_tmeta")
    guest.exec("lvchange -an vgthin/pool_tmeta" + START)


def test_increments_by_pools(lab: Lab, guest: Guest, tmp_path: Path) -> None:
    """Whole backups: every chunk that a pool says is unchanged is audited, and none has changed."""
    ident = "iscsi:{0.iqn}/{0.lun}".format(guest.luns["pool"])
    with Service(lab, tmp_path) as service:
        service.configure(changes='tracking = false\nthin = true\naudit = "100 %"')
        service.restart()
        service.ctl("repository", "init")
        records = []
        for turn in range(2):
            if turn:
                change(guest, 10, "new0")
            shown = service.ctl("show", service.ctl("backup", guest.name)["backup"])
            records.append(next(volume for volume in shown["volumes"] if volume["id"] == ident)["change"])
    assert [record["method"] for record in records] == ["full", "thin-delta"]
    assert records[1]["missed"] == 0 and records[1]["audited"] * CHUNK > 30 * MiB


STOP = "umount /mnt/a /mnt/b && vgchange -q -q -an vgthin && sync;"
START = """
echo 3 > /proc/sys/vm/drop_caches
vgchange -q -q -ay vgthin && mount -o discard /dev/vgthin/a /mnt/a && mount -o discard /dev/vgthin/b /mnt/b
"""


async def backup(rig: Rig, helper: GuestHelper, since: str, copy: Path) -> ThinState:
    """T1 of a backup, with the LUN's file as it is then."""
    report = await helper.probe()
    await rig.plug_scratch()
    volumes = [
        item
        for item in topology.top_volumes(report)
        if item.dm is not None and item.dm.name in ("vgthin-pool_tdata", "vgthin-pool_tmeta")
    ]
    assert len(volumes) == 2
    await rig.prepare(helper, volumes)
    luns = luns_of(rig.guest, report)
    source = rig.guest.luns["pool"].path
    assert await helper.touch_pools([devno for path, devno in luns.items() if path != source]) == []
    touched = await helper.touch_pools([luns[source]])
    assert [pool.touched for pool in touched] == [True], touched
    await helper.arm(60)
    async with frozen(rig):
        await helper.snap()
        shutil.copyfile(source, copy)
    assert not await helper.disarm()
    (state,) = await helper.compare_pools({luns[source]: since})
    print(state)
    return state


def change(guest: Guest, turn: int, gone: str) -> None:
    """Whatever a guest does to a pool; ``gone`` is a volume that it removes."""
    guest.exec(
        f"""
        set -e
        python3 - <<'END'
import os, random
random.seed({turn})
for name in ("a", "b"):
    fd = os.open("/mnt/" + name + "/file", os.O_RDWR)
    for _ in range(100):
        os.pwrite(fd, os.urandom(random.choice([1, 4096, 65536])), random.randrange(19 << 20))
    os.fsync(fd)
END
        head -c 4M /dev/urandom > /mnt/a/other && rm -f /mnt/b/other && sync && fstrim /mnt/a && fstrim /mnt/b
        lvchange -q -q -ay -K vgthin/idle && mount /dev/vgthin/idle /mnt/idle
        dd if=/dev/urandom of=/mnt/idle/file bs=64k count=9 seek={20 * turn} conv=notrunc,fsync 2> /dev/null
        umount /mnt/idle && lvchange -q -q -an vgthin/idle
        lvcreate -q -q -s -n snap{turn} vgthin/a
        lvcreate -q -q -y -V 20m -n new{turn} --thinpool vgthin/pool
        dd if=/dev/urandom of=/dev/vgthin/new{turn} bs=1M count=3 oflag=direct 2> /dev/null
        lvremove -q -q -y vgthin/{gone}
        """,
        timeout=120,
    )


def compare(bitmap: Path, before: Path, now: Path) -> None:
    old, new = chunks(before.read_bytes()), chunks(now.read_bytes())
    changed = Bitmap.from_bytes(bitmap.read_bytes(), len(new))
    really = [at for at, chunk in enumerate(new) if chunk != old[at]]
    assert [at for at in really if not changed[at]] == []
    same = changed.length - changed.count()
    print(f"{len(new)} chunks, {len(really)} differ, {same} are known to be the same")
    assert len(really) > 50 and same * CHUNK > 30 * MiB
