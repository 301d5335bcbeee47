"""Builds the disks that lab guests start from, once, and keeps them in a cache.

The root is a Debian 12 made by mmdebstrap and packed by ``mkfs.ext4 -d``; volume groups are made by a throw-away boot
(the host's kernel may lack device-mapper and loop devices); filesystems are put where the LVM metadata says. Nothing is
mounted on the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab import volumes

MiB = 1 << 20
HERE = Path(__file__).parent
FORMAT = 2
"""Raised when this file changes what an image holds in a way that its recipe does not show."""

UNUSED = 14 * 86400
"""Seconds after which images of other recipes, unused, are dropped when new ones are built."""
PACKAGES = """
    systemd-sysv udev kmod iproute2 e2fsprogs lvm2 open-iscsi qemu-guest-agent python3 initramfs-tools
    linux-image-cloud-amd64
""".split()  # noqa: SIM905 - a list of words
MODULES_DROPPED = """
    drivers/gpu drivers/infiniband drivers/net/ethernet drivers/net/wireless drivers/hwmon drivers/media
    drivers/usb drivers/iio drivers/target drivers/staging fs/btrfs fs/ocfs2 fs/gfs2 fs/nfs fs/nfsd fs/ceph
    fs/smb fs/cifs fs/jfs fs/ntfs3 fs/reiserfs fs/f2fs fs/xfs fs/ubifs fs/afs fs/dlm net/wireless net/mac80211
    net/bluetooth net/sctp net/openvswitch net/ceph net/sunrpc net/tipc net/batman-adv sound
""".split()  # noqa: SIM905 - a list of words
DIRECTORIES_DROPPED = """
    boot usr/share/doc usr/share/man usr/share/locale usr/share/info usr/share/lintian usr/share/zoneinfo
    usr/share/bash-completion usr/share/perl usr/lib/x86_64-linux-gnu/perl usr/lib/x86_64-linux-gnu/gconv
    usr/lib/udev/hwdb.d usr/lib/udev/hwdb.bin var/cache/apt var/lib/apt/lists var/cache/debconf
""".split()  # noqa: SIM905 - a list of words
MASKED = """
    systemd-logind.service getty.target console-getty.service getty-static.service serial-getty@ttyS0.service
    systemd-journal-flush.service systemd-random-seed.service systemd-update-utmp.service
    systemd-update-utmp-runlevel.service systemd-user-sessions.service systemd-firstboot.service
    systemd-machine-id-commit.service systemd-pstore.service systemd-repart.service systemd-binfmt.service
    systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-pcrphase-initrd.service
    systemd-sysusers.service systemd-ask-password-wall.path systemd-ask-password-console.path
    proc-sys-fs-binfmt_misc.automount sys-kernel-config.mount sys-kernel-debug.mount dev-hugepages.mount
    dev-mqueue.mount sys-fs-fuse-connections.mount systemd-tmpfiles-clean.timer apt-daily.timer
    apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer
    lvm2-monitor.service dm-event.socket lvm2-lvmpolld.socket blk-availability.service open-iscsi.service
    iscsi.service cryptsetup.target integritysetup.target veritysetup.target systemd-remount-fs.service
    modprobe@drm.service
""".split()  # noqa: SIM905 - a list of words
ROOT_SIZE = 384 * MiB
DISKS = {
    "root": ROOT_SIZE + 40 * MiB,
    "data": 64 * MiB,
    "spana": 40 * MiB,
    "spanb": 40 * MiB,
    "iscsi": 40 * MiB,
    "lun": 40 * MiB,
}
"""Disks with volume groups: name → size in bytes. ``root`` becomes the LVM guest's root disk."""


class ImageError(Exception):
    """The images could not be built; the message ends with what the failing tool printed."""


@dataclass(frozen=True)
class Images:
    """Finished images in the cache. They are templates: copy, never write."""

    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        return self.directory / "initrd"

    def disk(self, name: str) -> Path:
        """The template of disk ``name``: ``plain`` (bare ext4 root) or a key of DISKS. qcow2, but raw for LUNs."""
        path = self.directory / f"{name}.qcow2"
        return path if path.exists() else self.directory / f"{name}.raw"


def cache_directory() -> Path:
    """Where templates are kept: VMBACKUPD_LAB_CACHE, or ~/.cache/vmbackupd/lab."""
    given = os.environ.get("VMBACKUPD_LAB_CACHE")
    return Path(given) if given else Path.home() / ".cache/vmbackupd/lab"


def recipe() -> str:
    """A digest of everything that decides what the images hold, except the Debian archive's state."""
    digest = hashlib.sha256(repr((FORMAT, PACKAGES, MODULES_DROPPED, DIRECTORIES_DROPPED, MASKED, DISKS)).encode())
    for path in sorted((HERE / "guest").iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def ensure() -> Images:
    """The images of the present recipe, built now if the cache lacks them. Raises ImageError."""
    cache = cache_directory()
    final = cache / recipe()
    if (final / "complete").exists():
        (final / "complete").touch()  # still in use
        return Images(final)
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (final / "complete").exists():
            return Images(final)
        began = time.monotonic()
        _say(f"building guest images in {final} (some minutes, once)")
        stale = [*cache.glob("building-*")]  # we hold the lock: nobody builds there
        stale += [old.parent for old in cache.glob("*/complete") if time.time() - old.stat().st_mtime > UNUSED]
        for directory in stale:
            shutil.rmtree(directory)
        work = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        try:
            build(work)
            (work / "complete").touch()
            if final.exists():
                shutil.rmtree(final)
            work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _say(f"guest images built in {time.monotonic() - began:.0f} s")
    return Images(final)


def build(work: Path) -> None:
    """Make every template in the directory ``work``."""
    tree = work / "tree"
    _debootstrap(work, tree)
    _take_kernel(tree, work)
    _shrink(tree)
    (tree / "etc/lab-root-size").write_text(str(ROOT_SIZE))
    plain = work / "plain.raw"
    _filesystem(plain, ROOT_SIZE, "labroot", tree)
    shutil.rmtree(tree)
    for name, size in DISKS.items():
        with open(work / f"{name}.raw", "wb") as file:
            file.truncate(size)
    _provision(work)
    found = volumes.logical_volumes(work / f"{name}.raw" for name in DISKS)
    expected = {"vgroot/root", "vgdata/data", "vgspan/span", "vgiscsi/iscsi", "vglun/lun"}
    if set(found) != expected:
        raise ImageError(f"provisioning made {sorted(found)}, not {sorted(expected)}")
    if len(found["vgspan/span"].pieces) != 2:
        raise ImageError("vgspan/span does not span its two disks")
    found["vgroot/root"].insert(plain)
    for name, volume in found.items():
        if name != "vgroot/root":
            _filesystem(work / "filesystem", volume.size, name.split("/")[1])
            volume.insert(work / "filesystem")
            (work / "filesystem").unlink()
    for name in ("plain", "root", "data", "spana"):
        _run("qemu-img", "convert", "-O", "qcow2", work / f"{name}.raw", work / f"{name}.qcow2")
        (work / f"{name}.raw").unlink()


def _debootstrap(work: Path, tree: Path) -> None:
    overlay = work / "overlay"
    _overlay(overlay)
    sources = _sources(work)
    _run(
        "mmdebstrap",
        "--variant=minbase",
        "--mode=root",
        "--format=directory",
        "--aptopt=APT::Install-Recommends false",
        "--aptopt=Acquire::Languages none",
        *(
            f"--dpkgopt=path-exclude=/{path}/*"
            for path in DIRECTORIES_DROPPED
            if path.startswith("usr/share/") and "perl" not in path
        ),
        f"--essential-hook=cp -a {overlay}/. $1/",
        f"--include={','.join(PACKAGES)}",
        "bookworm",
        tree,
        *sources,
    )
    shutil.rmtree(overlay)


def _sources(work: Path) -> list[Path | str]:
    """Apt sources of Debian 12: this machine's own where it is one (its mirror, its keys), else Debian's."""
    found: list[Path | str] = []
    for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        text = path.read_text()
        if re.search(r"^deb .*\sbookworm\s.*\bmain\b|^Suites:.*\bbookworm(?![-\w])", text, re.MULTILINE):
            found.append(path)
    return found or ["deb http://deb.debian.org/debian bookworm main"]


def _overlay(root: Path) -> None:
    """Files laid over the new root before packages are configured."""

    def put(source: str, target: str, mode: int = 0o644) -> None:
        path = root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((HERE / "guest" / source).read_bytes())
        path.chmod(mode)

    def text(target: str, content: str) -> None:
        path = root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    put("lab-initramfs-hook", "etc/initramfs-tools/hooks/lab", 0o755)
    text("etc/initramfs-tools/conf.d/lab", "MODULES=list\nCOMPRESS=gzip\nRESUME=none\nBUSYBOX=n\n")
    put("lab-storage", "usr/local/sbin/lab-storage", 0o755)
    put("lab-provision", "usr/local/sbin/lab-provision", 0o755)
    put("lab-storage.service", "etc/systemd/system/lab-storage.service")
    put("lab-agent.service", "etc/systemd/system/lab-agent.service")
    put("lab-agent.rules", "etc/udev/rules.d/60-lab-agent.rules")
    put("qemu-guest-agent.conf", "etc/systemd/system/qemu-guest-agent.service.d/lab.conf")
    put("fsfreeze-hook", "etc/qemu/fsfreeze-hook.d/lab", 0o755)
    text("etc/systemd/journald.conf.d/lab.conf", "[Journal]\nStorage=volatile\n")
    text("etc/hostname", "labguest\n")
    text("etc/hosts", "127.0.0.1 localhost labguest\n")
    text("etc/fstab", "")
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "lab-storage.service").symlink_to("/etc/systemd/system/lab-storage.service")
    for unit in MASKED:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


def _take_kernel(tree: Path, work: Path) -> None:
    kernels = sorted((tree / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise ImageError("no kernel was installed in the guest")
    version = kernels[-1].name.removeprefix("vmlinuz-")
    shutil.copyfile(kernels[-1], work / "vmlinuz")
    with open(work / "initrd", "wb") as initrd:  # uncompressed: an emulated CPU unpacks slowly
        subprocess.run(["gzip", "-dc", str(tree / "boot" / f"initrd.img-{version}")], stdout=initrd, check=True)


def _shrink(tree: Path) -> None:
    """Drop what no test needs: every byte of the root disk is read by every backup in the suite."""
    for name in DIRECTORIES_DROPPED:
        path = tree / name
        if path.is_dir():
            shutil.rmtree(path)
            path.mkdir()
        elif path.exists():
            path.unlink()
    modules = next((tree / "usr/lib/modules").iterdir())
    for name in MODULES_DROPPED:
        shutil.rmtree(modules / "kernel" / name, ignore_errors=True)
    _run("depmod", "-b", tree / "usr", modules.name) if shutil.which("depmod") else _run(
        "chroot", tree, "depmod", modules.name
    )
    for name in ("etc/resolv.conf", "vmlinuz", "vmlinuz.old", "initrd.img", "initrd.img.old"):
        (tree / name).unlink(missing_ok=True)
    (tree / "etc/hostname").write_text("labguest\n")  # mmdebstrap writes the host's, and empties the machine's id
    (tree / "etc/machine-id").write_text("1ab01ab01ab01ab01ab01ab01ab01ab0\n")
    with open(tree / "etc/iscsi/iscsid.conf", "a") as config:
        config.write("node.session.initial_login_retry_max = 3\n")
    (tree / "etc/iscsi/initiatorname.iscsi").write_text("InitiatorName=iqn.1993-08.org.debian:01:labguest\n")


def _filesystem(path: Path, size: int, label: str, tree: Path | None = None) -> None:
    with open(path, "wb") as file:
        file.truncate(size)
    options = ["-d", tree] if tree else []
    _run(
        "mkfs.ext4",
        "-q",
        "-F",
        "-b",
        "4096",
        "-m",
        "0",
        "-L",
        label,
        "-J",
        "size=8",
        "-E",
        "lazy_itable_init=0,lazy_journal_init=0",
        *options,
        path,
    )


def _provision(work: Path) -> None:
    """Boot once, with lab-provision as init, to make the volume groups."""
    console = work / "provision.log"
    command: list[object] = [
        "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "512", "-nodefaults", "-no-reboot",
        "-display", "none", "-serial", f"file:{console}", "-kernel", work / "vmlinuz", "-initrd", work / "initrd",
        "-append",
        "console=ttyS0 loglevel=3 root=/dev/vda rw mitigations=off panic=-1 init=/usr/local/sbin/lab-provision",
    ]  # fmt: skip
    for name in ("plain", *DISKS):
        command += [
            "-drive",
            f"file={work}/{name}.raw,format=raw,if=none,id={name},snapshot={'on' if name == 'plain' else 'off'}",
        ]
        command += ["-device", f"virtio-blk-pci,drive={name},serial={name}"]
    try:
        _run(*command, timeout=300)
        text = console.read_text(errors="replace")
    except subprocess.TimeoutExpired:
        text = console.read_text(errors="replace") + "\n(no end after 300 s)"
    if "lab-provision: done" not in text:
        raise ImageError(f"the provisioning boot failed:\n{text[-4000:]}")
    console.unlink()


def _run(*argv: object, timeout: float | None = None) -> None:
    words = [str(word) for word in argv]
    done = subprocess.run(words, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise ImageError(f"{' '.join(words)}: exit status {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")


def _say(text: str) -> None:
    print(f"lab: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Tell on standard error how long ``what`` took."""
    began = time.monotonic()
    yield
    _say(f"{what}: {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    print(ensure().directory)
