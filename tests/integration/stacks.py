"""Stacks of volumes as guests have them, made by script on the empty disks of a ``big`` guest.

Every stack carries a filesystem that the writer logs to. What a stack is made of is found again by what the disks hold
(LVM's and LUKS' identities, filesystem labels), never by where they are attached: a restored guest has others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.lab import Lab
from tests.lab.guest import Guest

MOUNTS = "/mnt/stacks"
KEY = "/etc/stacks.key"
PRELUDE = f"""
set -e
export LVM_SUPPRESS_FD_WARNINGS=1
by_serial() {{ lsblk -dno PATH,SERIAL | while read -r path serial; do [ "$serial" != "$1" ] || echo "$path"; done; }}
lv() {{ name=$1; shift; lvcreate -q -q -y -Wn -n "$name" "$@"; }}
luks() {{
    cryptsetup -q luksFormat --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --luks2-keyslots-size 256k \\
        --sector-size 512 --label "$@" {KEY}
    udevadm settle
}}
unlock() {{
    [ -e "/dev/mapper/$2" ] || cryptsetup open --key-file {KEY} "$(blkid -c /dev/null -l -o device -t LABEL="$1")" "$2"
}}
idle() {{ until lvs --noheadings -o raid_sync_action "$1" | grep -q idle; do sleep 0.2; done; }}
raid1() {{
    name=$1; shift
    mdadm -q --create "/dev/md/$name" --run --homehost any --bitmap internal -l 1 -n 2 "$@"
    mirrored "$name"
}}
mirrored() {{
    sync=/sys/block/$(basename "$(readlink -f "/dev/md/$1")")/md
    echo readwrite > "$sync/array_state" || true
    until grep -q idle "$sync/sync_action"; do sleep 0.2; done
    echo check > "$sync/sync_action"
    until grep -q idle "$sync/sync_action"; do sleep 0.2; done
    [ "$(cat "$sync/mismatch_cnt")" = 0 ]
}}
agreed() {{
    idle "$1"
    lvchange --syncaction check "$1"
    idle "$1"
    lvs --noheadings -o raid_mismatch_count "$1" | grep -Eq '^ *0$'
}}
"""
"""Shell functions of the commands below. ``luks LABEL DEVICE``; ``agreed LV``: the legs of a raid hold the same."""
CHECK = {"ext4": "e2fsck -fn", "xfs": "xfs_repair -n", "btrfs": "btrfs check -q"}
"""Filesystem → what finds damage in one that is not mounted."""
MKFS = {"ext4": "mkfs.ext4 -q -b 4096 -J size=4", "xfs": "mkfs.xfs -q --unsupported", "btrfs": "mkfs.btrfs -q -M"}


@dataclass(frozen=True)
class Stack:
    """``make`` builds it on the volume group ``vgs`` (its disks are ``$dd``, ``$s1``, ``$s2`` and ``$d1``) or on disks
    of its own; ``device`` then takes the filesystem, unless ``make`` has made it. ``open`` brings it up after a boot,
    where LVM and udev do not by themselves; ``sound`` ends well if it is in order (besides its filesystem).
    """

    name: str
    device: str
    make: str
    open: str = ""
    fstype: str = "ext4"
    formatted: bool = False
    sound: str = "true"

    @property
    def mount(self) -> str:
        return f"{MOUNTS}/{self.name}"


STACKS = (
    Stack("striped", "/dev/vgs/striped", 'lv striped --type striped -i 3 -I 64k -l 12 vgs "$dd" "$s1" "$s2"'),
    Stack("raid1", "/dev/vgs/raid1", 'lv raid1 --type raid1 -m 1 -l 6 vgs "$dd" "$s1"', sound="agreed vgs/raid1"),
    Stack("raid5", "/dev/vgs/raid5", 'lv raid5 --type raid5 -i 2 -l 6 vgs "$dd" "$s1" "$s2"', sound="agreed vgs/raid5"),
    Stack("mirror", "/dev/vgs/mirror", 'lv mirror --type mirror -m 1 --mirrorlog core -l 5 vgs "$dd" "$d1"'),
    Stack(
        "thin",
        "/dev/vgs/thin",
        'lvcreate -q -q -y --type thin-pool -n pool -l 8 --poolmetadatasize 4m vgs "$s1" "$dd"\n'
        "lvcreate -q -q -y -V 32m -n thin --thinpool vgs/pool",
    ),
    Stack(
        "cached",
        "/dev/vgs/cached",
        'lv cached -l 6 vgs "$d1"\n'
        'lvcreate -q -q -y --type cache-pool -n fast -l 3 --poolmetadatasize 8m vgs "$dd"\n'
        "lvconvert -q -q -y --type cache --cachemode writeback --cachepool vgs/fast vgs/cached",
    ),
    Stack(
        "cipher",
        "/dev/mapper/secret",
        'lv cipher -l 8 vgs "$s2"\nluks stackcipher /dev/vgs/cipher\nunlock stackcipher secret',
        "unlock stackcipher secret",
    ),
    Stack(
        "vault",
        "/dev/vgv/vault",
        'luks stackvault "$de"\nunlock stackvault vault-one\nluks stackvault2 "$p3"\nunlock stackvault2 vault-two\n'
        "vgcreate -q -q vgv /dev/mapper/vault-one /dev/mapper/vault-two\n"
        "lv vault --type striped -i 2 -I 64k -l 100%FREE vgv",
        "unlock stackvault vault-one; unlock stackvault2 vault-two; vgchange -q -q -ay vgv",
    ),
    Stack(
        "md",
        "/dev/md/stack",
        'lv mda -l 7 vgs "$dd"\nlv mdb -l 7 vgs "$d1"\nraid1 stack /dev/vgs/mda /dev/vgs/mdb',
        sound="mirrored stack",
    ),
    Stack(
        "mdisk",
        "/dev/md/disks",
        'raid1 disks "$df" "$p2"',
        sound="mirrored disks",
    ),
    Stack("plain", "/dev/disk/by-label/plain", MKFS["ext4"] + ' -L plain "$p1"', formatted=True),
    Stack("xfs", "/dev/vgs/xfs", 'lv xfs -l 9 vgs "$d1"', fstype="xfs"),
    Stack(
        "btrfs",
        "/dev/vgs/btra",
        'lv btra -l 7 vgs "$s2"\nlv btrb -l 7 vgs "$dd"\n'
        f"{MKFS['btrfs']} -d single -m single -L btrfs /dev/vgs/btra /dev/vgs/btrb",
        fstype="btrfs",
        formatted=True,
    ),
)
LOGS = {stack.name: f"{stack.mount}/log" for stack in STACKS}
MiB = 1 << 20
VIRTUAL = {"vdd": 208 * MiB, "vde": 32 * MiB, "vdf": 32 * MiB}
LUNS = {"s1": 128 * MiB, "s2": 128 * MiB, "p1": 24 * MiB, "p2": 32 * MiB, "p3": 32 * MiB}
DIRECT = {"d1": 160 * MiB}
"""The disks that a guest with stacks is started with."""


def start(lab: Lab, name: str = "stacks") -> Guest:
    """A guest in which every stack is made, mounted and written to."""
    guest = lab.start_guest("big", name, disks=VIRTUAL, luns=LUNS, direct_luns=DIRECT)
    disks = {target[1:]: f"{name}-{target}" for target in VIRTUAL}
    disks |= {lun: f"lab-{name}-{lun}" for lun in LUNS | DIRECT}
    lines = [f"{disk}=$(by_serial {serial})" for disk, serial in disks.items()]
    lines += [f"head -c 64 /dev/urandom > {KEY}", "echo 'activation { monitoring = 0 }' > /etc/lvm/lvmlocal.conf"]
    lines += ['vgcreate -q -q vgs "$dd" "$s1" "$s2" "$d1"', "lv swap -l 2 vgs", "lv raw -l 2 vgs"]
    lines += ["head -c 8M /dev/urandom > /dev/vgs/raw", "mkswap -q /dev/vgs/swap && swapon /dev/vgs/swap"]
    run(guest, lines)
    for stack in STACKS:
        mkfs = "" if stack.formatted else f"{MKFS[stack.fstype]} -L {stack.name} {stack.device}"
        run(guest, [*lines[: len(disks)], stack.make, mkfs, "udevadm settle", *_mount(stack)])
    return guest


def open_all(guest: Guest) -> None:
    """Bring up and mount every stack in a guest that was booted."""
    for stack in STACKS:
        run(guest, [stack.open, *_mount(stack)])


def check(guest: Guest, stack: Stack) -> None:
    """Raises CommandFailed if the stack, or its unmounted filesystem, is not in order."""
    run(guest, [f"umount {stack.mount}", stack.sound, f"{CHECK[stack.fstype]} {stack.device}"])


def run(guest: Guest, lines: Sequence[str]) -> bytes:
    """Run shell lines that use the functions above; what they print. Raises CommandFailed."""
    return guest.exec("\n".join([PRELUDE, *lines]), timeout=240)


def _mount(stack: Stack) -> list[str]:
    return [f"mkdir -p {stack.mount}", f"mountpoint -q {stack.mount} || mount {stack.device} {stack.mount}"]
