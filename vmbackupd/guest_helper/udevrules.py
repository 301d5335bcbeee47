"""Keeps udev, LVM and systemd off our devices: they show the labels and identifiers of the volumes they are copies
of."""

import os
import subprocess

DIRECTORY = "/run/udev/rules.d"
PATH = DIRECTORY + "/11-vmbackupd.rules"
RULES = """\
# Made by vmbackupd's guest helper for the time of a backup.
SUBSYSTEM=="block", ENV{DM_UUID}=="VMBK-?*", ENV{DM_UDEV_DISABLE_SUBSYSTEM_RULES_FLAG}="1", \
ENV{DM_UDEV_DISABLE_DISK_RULES_FLAG}="1", ENV{DM_UDEV_DISABLE_OTHER_RULES_FLAG}="1", OPTIONS:="nowatch"
"""


def install() -> None:
    """Write the rules and have udev read them. The ioctls carry the same wish (``dm.NO_UDEV_RULES``), so a guest
    without udev, or with one that does not answer, is no reason to fail."""
    if not os.path.isdir("/run/udev"):
        return
    os.makedirs(DIRECTORY, exist_ok=True)
    with open(PATH, "w") as file:
        file.write(RULES)
    _reload()


def remove() -> None:
    """Take the rules away again."""
    try:
        os.unlink(PATH)
    except FileNotFoundError:
        return
    _reload()


def _reload() -> None:
    run(["udevadm", "control", "--reload"])


def run(command: "list[str]") -> None:
    """Run a program of the guest's, for its effect if it is there; its failure shows in what comes after."""
    environment = dict(os.environ, PATH="/usr/sbin:/usr/bin:/sbin:/bin")
    try:
        subprocess.run(
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=30,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired):
        pass
