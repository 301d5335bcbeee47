"""The commands ``enroll`` and ``unenroll`` of ``vmbackup-guest``, for the administrator of a guest: a plain filesystem
is put on a linear device at its next mount, so that backups can snapshot it from then on."""

import argparse
import json
import os
import shutil
import sys
from typing import List

from . import devices, enrollment, files, linear, mounts, udevrules
from .failures import HelperError

COMMANDS = ("enroll", "unenroll")


def main(words: List[str]) -> int:
    """``enroll [--dry-run] DEVICE``, ``enroll --list``, ``unenroll [--dry-run] DEVICE``; exit status."""
    parser = argparse.ArgumentParser(prog="vmbackup-guest " + words[0])
    parser.add_argument("--dry-run", action="store_true", help="only tell what would be done")
    parser.add_argument("device", metavar="DEVICE", nargs="?", help="/dev/sdb1, a link to it, or UUID=...")
    if words[0] == "enroll":
        parser.add_argument("--list", action="store_true", help="the enrolled filesystems")
        parser.epilog = enrollment.__doc__
    options = parser.parse_args(words[1:])
    listing = words[0] == "enroll" and options.list
    if listing == bool(options.device):
        parser.error("name one device" if not listing else "--list takes no device")
    try:
        if listing:
            print("\n".join(_described(uuid) for uuid in linear.enrolled()) or "no filesystem is enrolled")
        elif words[0] == "enroll":
            _enroll(options.device, options.dry_run)
        else:
            _unenroll(options.device, options.dry_run)
    except (HelperError, OSError) as error:
        print("vmbackup-guest: %s" % error, file=sys.stderr)
        return 1
    return 0


def _enroll(argument: str, dry: bool) -> None:
    _require_system()
    plan = enrollment.look(argument)
    print("\n  ".join(["/dev/%s:" % plan.device["name"], *enrollment.changes(plan)]))
    if dry:
        return
    mounted = [mount.path for mount in mounts.own_mounts() if mount.devno == plan.device["devno"]]
    try:
        enrollment.apply(plan)
        if not mounted:
            enrollment.command("systemctl", "start", plan.names.unit)
    except BaseException:
        enrollment.withdraw(plan.names, plan.old, plan.units)
        raise
    if mounted:
        again = " && ".join(["umount " + " ".join(mounted), "systemctl start " + " ".join(plan.units)])
        print("It will lie on %s from the next boot on, or now with: %s" % (plan.names.node, again))
    else:
        print("It lies on %s now" % plan.names.node)


def _unenroll(argument: str, dry: bool) -> None:
    uuid = _uuid_of(argument)
    if uuid not in linear.enrolled():
        raise HelperError("NotEnrolled", "%s is not enrolled; see vmbackup-guest enroll --list" % argument)
    names = linear.Linear(uuid)
    record = json.loads(files.read("/" + names.record_path))
    used = [mount.path for mount in mounts.own_mounts() if mount.devno == mounts.devno_of_node(names.node)]
    if used:
        raise HelperError(
            "InUse", "%s is mounted at %s: unmount it first, and mount it again afterwards" % (names.node, used[0])
        )
    back = "; puts back in /%s: %s" % (enrollment.FSTAB, ", ".join(sorted(record["old"].values())))
    print("removes %s and its files%s" % (names.node, back if record["old"] else ""))
    if not dry:
        enrollment.withdraw(names, record["old"], record["units"])


def _require_system() -> None:
    if os.geteuid() != 0:
        raise HelperError("NotRoot", "must be run as root")
    if not os.path.isdir("/run/systemd/system"):
        raise HelperError("NoSystemd", "this guest does not run systemd, which has to make the device before the mount")
    if shutil.which("dmsetup", path=enrollment.PATH) is None:
        raise HelperError("NoDmsetup", "there is no dmsetup: install the package dmsetup (or device-mapper)")
    udevrules.run(["modprobe", "dm_mod"])
    if not devices.read("/sys/class/misc/device-mapper/dev"):
        raise HelperError("NoDeviceMapper", "the kernel has no device-mapper (module dm_mod)")


def _uuid_of(argument: str) -> str:
    """The UUID that a device on the command line stands for, enrolled or not, there or not."""
    tag, _, value = argument.partition("=")
    if tag == "UUID":
        return value
    devno = mounts.devno_of_node(argument)
    return devices.properties(devno).get("ID_FS_UUID", "") if devno is not None else ""


def _described(uuid: str) -> str:
    """A line of the listing."""
    names = linear.Linear(uuid)
    record = json.loads(files.read("/" + names.record_path))
    lower = os.path.realpath("/dev/vmbackupd/" + uuid)
    if mounts.devno_of_node(names.node) is not None:
        state = "on %s over %s" % (names.node, lower)
    elif mounts.devno_of_node(lower) is not None:
        state = "on %s until it is mounted anew" % lower
    else:
        state = "not there"
    return "UUID=%s at %s: %s" % (uuid, ", ".join(record["where"]), state)
