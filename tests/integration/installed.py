"""The guest helper as the package ``vmbackupd-guest`` installs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.lab.guest import Guest
from vmbackupd.guest.deploy import build_zipapp

PACKAGING = Path(__file__).parents[2] / "packaging/guest"
HELPER = "/usr/lib/vmbackupd-guest/helper.pyz"
FILES = {
    "vmbackup-guest": "/usr/sbin/vmbackup-guest",
    "vmbackupd-guest@.service": "/etc/systemd/system/vmbackupd-guest@.service",
    "90-vmbackupd-guest.rules": "/etc/udev/rules.d/90-vmbackupd-guest.rules",
}


@contextlib.contextmanager
def helper_installed(guest: Guest) -> Iterator[None]:
    """A block in which the package's files are in the guest."""
    reload = "systemctl daemon-reload && udevadm control --reload"
    guest.exec(["mkdir", "-p", str(Path(HELPER).parent)])
    guest.write_file(HELPER, build_zipapp())
    for name, path in FILES.items():
        guest.write_file(path, (PACKAGING / name).read_bytes(), (PACKAGING / name).stat().st_mode & 0o777)
    guest.exec(reload)
    try:
        yield
    finally:
        guest.exec(f"rm -rf {Path(HELPER).parent} {' '.join(FILES.values())}; {reload}")
