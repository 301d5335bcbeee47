"""The linear device below an enrolled filesystem, and the files in /etc that make it at every boot.

Nothing in them needs the helper or its package: with both gone the filesystem is mounted as before. In the order of a
boot: the disk or partition appears; the rule gives it the link ``/dev/vmbackupd/UUID`` in place of the filesystem's own
links and starts the unit; the unit's script puts the device ``vmbackupd-UUID`` on it, which udev gives the filesystem's
links. Only then the mount, which waits for ``/dev/disk/by-uuid/UUID``, goes on. Where the script fails it leaves a mark
under ``/run``, with which the rule gives the links back to the disk or partition; enrolling leaves an empty one, until
the filesystem is mounted anew.
"""

import os
from typing import Dict, List

from . import mountunit

MARKS = "run/vmbackupd-guest"
SCRIPT = "etc/vmbackupd-guest/linear"

_SCRIPT = """\
#!/bin/sh
# Puts the device vmbackupd-UUID on the disk or partition that holds the filesystem UUID. Where that cannot be done, the
# filesystem gets its links back and is mounted without. Made by `vmbackup-guest enroll`.
PATH=/usr/sbin:/usr/bin:/sbin:/bin
uuid=$1 name=vmbackupd-$1 mark=/run/vmbackupd-guest/plain-$1

number() { # of the block device $1
    printf '%d:%d' $(stat -L -c '0x%t 0x%T' "$1")
}
show() { # let udev decide anew whether device $1 has the filesystem's links
    echo change > "/sys/dev/block/$1/uevent"
    udevadm settle --timeout=30
}

lower=$(number "/dev/vmbackupd/$uuid")
below=$(dmsetup deps -o devno "$name" 2> /dev/null | sed 's/.*(\\([0-9]*\\), \\([0-9]*\\)).*/\\1:\\2/')
if [ -n "$below" ]; then
    [ "$below" = "$lower" ] && exit 0
    [ -e "/sys/dev/block/$below" ] && exit 0 # another disk holds a copy: the first one stays
    dmsetup remove --retry "$name" || exit 1 # that disk went away, and this is the same filesystem again
fi
if grep -q "^[0-9]* [0-9]* $lower " /proc/self/mountinfo || [ -d "/sys/fs/btrfs/$uuid" ]; then
    echo "the filesystem $uuid is mounted without $name until it is mounted anew"
    [ ! -s "$mark" ]
    exit
fi
readonly=
[ "$(cat "/sys/dev/block/$lower/ro")" = 1 ] && readonly=--readonly
if dmsetup create "$name" $readonly --uuid "VMBACKUPD-LINEAR-$uuid" \\
    --table "0 $(cat "/sys/dev/block/$lower/size") linear $lower 0"; then
    [ -e "$mark" ] || exit 0
    rm -f "$mark"
    show "$lower"
    show "$(number "/dev/mapper/$name")"
    exit 0
fi
echo "the filesystem $uuid can be mounted, but without $name: backups cannot snapshot it" >&2
mkdir -p "${mark%/*}" && echo failed > "$mark"
show "$lower"
exit 1
"""

_UNIT = """\
# Made by `vmbackup-guest enroll`; `vmbackup-guest unenroll` takes it away.
[Unit]
Description=Linear device below the filesystem %(uuid)s, for snapshots of backups
DefaultDependencies=no
ConditionPathExists=/dev/vmbackupd/%(uuid)s
Before=systemd-fsck@%(device)s.service

[Service]
Type=oneshot
ExecStart=/bin/sh /%(script)s %(uuid)s
TimeoutStartSec=90
"""

# The number makes it come after the rules that look at what a disk holds. Links by the disk's own names stay with it.
_RULES = """\
# Made by `vmbackup-guest enroll`; `vmbackup-guest unenroll` takes it away.
SUBSYSTEM!="block", GOTO="vmbackupd_end"
ACTION=="remove", GOTO="vmbackupd_end"
KERNEL=="dm-*", GOTO="vmbackupd_end"
ENV{ID_FS_UUID}!="%(uuid)s", GOTO="vmbackupd_end"
TEST!="/etc/systemd/system/%(unit)s", GOTO="vmbackupd_end"
ENV{SYSTEMD_WANTS}+="%(unit)s"
TEST=="/run/vmbackupd-guest/plain-%(uuid)s", SYMLINK+="vmbackupd/%(uuid)s", GOTO="vmbackupd_end"
SYMLINK="vmbackupd/%(uuid)s", ENV{ID_FS_USAGE}="raid", ENV{ID_FS_TYPE}="vmbackupd_linear"
ENV{DEVTYPE}=="disk", ENV{ID_PATH}=="?*", SYMLINK+="disk/by-path/$env{ID_PATH}"
ENV{DEVTYPE}=="disk", ENV{ID_BUS}=="?*", ENV{ID_SERIAL}=="?*", SYMLINK+="disk/by-id/$env{ID_BUS}-$env{ID_SERIAL}"
ENV{DEVTYPE}=="disk", ENV{ID_WWN_WITH_EXTENSION}=="?*", SYMLINK+="disk/by-id/wwn-$env{ID_WWN_WITH_EXTENSION}"
ENV{DEVTYPE}=="partition", ENV{ID_PATH}=="?*", SYMLINK+="disk/by-path/$env{ID_PATH}-part%%n"
ENV{DEVTYPE}=="partition", ENV{ID_BUS}=="?*", ENV{ID_SERIAL}=="?*", \
SYMLINK+="disk/by-id/$env{ID_BUS}-$env{ID_SERIAL}-part%%n"
ENV{DEVTYPE}=="partition", ENV{ID_WWN_WITH_EXTENSION}=="?*", \
SYMLINK+="disk/by-id/wwn-$env{ID_WWN_WITH_EXTENSION}-part%%n"
ENV{ID_PART_ENTRY_UUID}=="?*", SYMLINK+="disk/by-partuuid/$env{ID_PART_ENTRY_UUID}"
LABEL="vmbackupd_end"
"""

_DROP_IN = """\
# Made by `vmbackup-guest enroll`; `vmbackup-guest unenroll` takes it away.
[Unit]
Wants=%(unit)s
After=%(unit)s
"""


class Linear:
    """The names of one filesystem's device and files; all paths are without the root's slash."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.name = "vmbackupd-" + uuid
        self.unit = "vmbackupd-linear-%s.service" % uuid
        self.unit_path = "etc/systemd/system/" + self.unit
        self.rules_path = "etc/udev/rules.d/61-vmbackupd-%s.rules" % uuid
        self.record_path = "etc/vmbackupd-guest/%s.json" % uuid
        self.mark_path = "%s/plain-%s" % (MARKS, uuid)

    @property
    def node(self) -> str:
        """The device, once it is there."""
        return "/dev/mapper/" + self.name

    @property
    def by_uuid(self) -> str:
        """Where the filesystem is found: on the device, or, where that could not be made, below it."""
        return "/dev/disk/by-uuid/" + self.uuid

    def drop_in_path(self, mount: str) -> str:
        """The drop-in of a mount unit."""
        return "etc/systemd/system/%s.d/50-vmbackupd.conf" % mount

    @property
    def spec(self) -> str:
        """What fstab calls the filesystem by."""
        return "UUID=" + self.uuid

    def files(self, mounts: List[str], moved: List[str]) -> Dict[str, str]:
        """Path to content of everything but the rules. ``mounts``: the names of the mount units; ``moved``: those whose
        ``What`` is to be the filesystem's UUID."""
        found = {SCRIPT: _SCRIPT, self.unit_path: _UNIT % self._words(), self.mark_path: ""}
        for mount in mounts:
            what = "\n[Mount]\nWhat=%s\n" % self.by_uuid if mount in moved else ""
            found[self.drop_in_path(mount)] = _DROP_IN % self._words() + what
        return found

    def rules(self) -> str:
        """udev's rules: from when they are there, it acts by them."""
        return _RULES % self._words()

    def _words(self) -> Dict[str, str]:
        return {"uuid": self.uuid, "unit": self.unit, "script": SCRIPT, "device": mountunit.escape(self.by_uuid)}


def enrolled(root: str = "/") -> List[str]:
    """The UUIDs that have a record."""
    directory = os.path.join(root, os.path.dirname(SCRIPT))
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    return [name[: -len(".json")] for name in names if name.endswith(".json")]
