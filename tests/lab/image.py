"""Builds the disks that lab guests start from, once, and keeps them in a cache.

A root is a Debian made by mmdebstrap and packed by ``mkfs.ext4 -d``; there are several (SYSTEMS), each built when it is
first asked for. Volume groups are made once, by a throw-away boot of the standard one (the host's kernel may lack
device-mapper and loop devices); filesystems are put where the LVM metadata says. Nothing is mounted on the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
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
FORMAT = 3
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
BIG_PACKAGES = """
    cryptsetup-bin mdadm thin-provisioning-tools multipath-tools kpartx btrfs-progs xfsprogs fio postgresql
    mariadb-server
""".split()  # noqa: SIM905 - a list of words
BIG_DROPPED = """
    usr/lib/x86_64-linux-gnu/libLLVM-14.so.1 usr/lib/x86_64-linux-gnu/libz3.so.4 usr/lib/postgresql/15/lib/bitcode
    usr/lib/postgresql/15/lib/llvmjit.so usr/share/i18n usr/bin/replace usr/bin/mariadb-waitpid usr/bin/mariadb-slap
    usr/bin/mariadb-conv usr/bin/mariadb-upgrade usr/bin/mariadb-plugin usr/bin/mariadb-tzinfo-to-sql
    usr/bin/mariadb-import usr/bin/innochecksum usr/bin/resolve_stack_dump usr/bin/perror usr/bin/myisam* usr/bin/aria_*
    var/lib/mysql/* var/lib/postgresql/*
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
MERGE_USR = 'for name in bin sbin lib lib64; do mkdir -p "$1/usr/$name" && ln -s "usr/$name" "$1/$name"; done'
BIG_MASKED = """
    mariadb.service postgresql.service multipathd.service multipathd.socket mdmonitor.service mdcheck_start.timer
    mdcheck_continue.timer mdmonitor-oneshot.timer
""".split()  # noqa: SIM905 - a list of words


@dataclass(frozen=True)
class System:
    """A Debian that guests boot. ``packages`` come on top of PACKAGES, ``dropped`` on top of what is always dropped;
    ``modules_kept`` are taken out of MODULES_DROPPED. ``merge_usr``: its packages do not merge /usr by themselves.
    ``root_size`` in bytes.
    """

    suite: str
    root_size: int = 384 * MiB
    packages: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    masked: tuple[str, ...] = ()
    modules_kept: tuple[str, ...] = ()
    merge_usr: bool = False


STANDARD = "bookworm"
"""The system whose images include the disks with volume groups, which guests of every system have."""
SYSTEMS = {
    STANDARD: System("bookworm"),
    "big": System(
        "bookworm",
        544 * MiB,
        packages=tuple(BIG_PACKAGES),
        dropped=tuple(BIG_DROPPED),
        masked=tuple(BIG_MASKED),
        modules_kept=("fs/btrfs", "fs/xfs"),
    ),
    "trixie": System("trixie", masked=("ldconfig.service", "systemd-journal-catalog-update.service")),
    "bullseye": System("bullseye", masked=("lvm2-pvscan@.service",), merge_usr=True),
}
"""``big``: Debian 12 with what stacks of volumes, databases and benchmarks need, nothing of it started. The others: the
standard root in Debian 13 (Linux 6.12) and 11 (5.10, the oldest that Debian's mirrors still serve)."""
DISKS = {
    "root": SYSTEMS[STANDARD].root_size + 40 * MiB,
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
        """The template of disk ``name``: ``plain`` (bare ext4 root) or, of the standard system, a key of DISKS. qcow2,
        but raw for LUNs.
        """
        path = self.directory / f"{name}.qcow2"
        return path if path.exists() else self.directory / f"{name}.raw"


def cache_directory() -> Path:
    """Where templates are kept: VMBACKUPD_LAB_CACHE, or ~/.cache/vmbackupd/lab."""
    given = os.environ.get("VMBACKUPD_LAB_CACHE")
    return Path(given) if given else Path.home() / ".cache/vmbackupd/lab"


def recipe(name: str = STANDARD) -> str:
    """A digest of everything that decides what the images of a system hold, except the Debian archive's state."""
    decisive = [FORMAT, SYSTEMS[name], PACKAGES, MODULES_DROPPED, DIRECTORIES_DROPPED, MASKED]
    digest = hashlib.sha256(repr([*decisive, DISKS] if name == STANDARD else decisive).encode())
    for path in sorted((HERE / "guest").iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def ensure(name: str = STANDARD) -> Images:
    """The images of a system (a key of SYSTEMS) of the present recipe, built now if the cache lacks them. Raises
    ImageError.
    """
    cache = cache_directory()
    final = cache / recipe(name)
    if (final / "complete").exists():
        (final / "complete").touch()  # still in use
        return Images(final)
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (final / "complete").exists():
            return Images(final)
        began = time.monotonic()
        _say(f"building guest images of {name} in {final} (some minutes, once)")
        stale = [*cache.glob("building-*")]  # we hold the lock: nobody builds there
        stale += [old.parent for old in cache.glob("*/complete") if time.time() - old.stat().st_mtime > UNUSED]
        for directory in stale:
            shutil.rmtree(directory)
        work = Path(tempfile.mkdtemp(prefix="building-", dir=cache))
        try:
            build(work, name)
            (work / "complete").touch()
            if final.exists():
                shutil.rmtree(final)
            work.rename(final)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _say(f"guest images of {name} built in {time.monotonic() - began:.0f} s")
    return Images(final)


def build(work: Path, name: str) -> None:
    """Make every template of a system in the directory ``work``."""
    system = SYSTEMS[name]
    tree = work / "tree"
    _debootstrap(work, tree, system)
    _take_kernel(tree, work)
    _shrink(tree, system)
    (tree / "etc/lab-root-size").write_text(str(system.root_size))
    _filesystem(work / "plain.raw", system.root_size, "labroot", tree)
    shutil.rmtree(tree)
    if name == STANDARD:
        _volume_groups(work)
    for disk in ("plain", "root", "data", "spana") if name == STANDARD else ("plain",):
        _run("qemu-img", "convert", "-O", "qcow2", work / f"{disk}.raw", work / f"{disk}.qcow2")
        (work / f"{disk}.raw").unlink()


def _volume_groups(work: Path) -> None:
    """Make the disks of DISKS; the root's logical volume gets a copy of ``plain.raw``."""
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
    found["vgroot/root"].insert(work / "plain.raw")
    for name, volume in found.items():
        if name != "vgroot/root":
            _filesystem(work / "filesystem", volume.size, name.split("/")[1])
            volume.insert(work / "filesystem")
            (work / "filesystem").unlink()


def _debootstrap(work: Path, tree: Path, system: System) -> None:
    overlay = work / "overlay"
    _overlay(overlay, system)
    _run(
        "mmdebstrap",
        "--variant=minbase",
        "--mode=root",
        "--format=directory",
        "--aptopt=APT::Install-Recommends false",
        "--aptopt=Acquire::Languages none",
        *([f"--setup-hook={MERGE_USR}"] if system.merge_usr else []),
        *(
            f"--dpkgopt=path-exclude=/{path}/*"
            for path in DIRECTORIES_DROPPED
            if path.startswith("usr/share/") and "perl" not in path
        ),
        f"--essential-hook=cp -a {overlay}/. $1/",
        f"--include={','.join([*PACKAGES, *system.packages])}",
        system.suite,
        tree,
        *_sources(system.suite),
    )
    shutil.rmtree(overlay)


def _sources(suite: str) -> list[Path | str]:
    """Apt sources of a Debian: this machine's own where it is one (its mirror, its keys), else Debian's."""
    found: list[Path | str] = []
    for path in [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]:
        if path.suffix not in (".list", ".sources") or not path.is_file():
            continue
        text = path.read_text()
        if re.search(rf"^deb .*\s{suite}\s.*\bmain\b|^Suites:.*\b{suite}(?![-\w])", text, re.MULTILINE):
            found.append(path)
    return found or [f"deb http://deb.debian.org/debian {suite} main"]


def _overlay(root: Path, system: System) -> None:
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
    put("lab.rules", "etc/udev/rules.d/60-lab.rules")
    put("qemu-guest-agent.conf", "etc/systemd/system/qemu-guest-agent.service.d/lab.conf")
    put("fsfreeze-hook", "etc/qemu/fsfreeze-hook.d/lab", 0o755)
    text("etc/systemd/journald.conf.d/lab.conf", "[Journal]\nStorage=volatile\n")
    text("etc/hostname", "labguest\n")
    text("etc/hosts", "127.0.0.1 localhost labguest\n")
    text("etc/fstab", "")
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(parents=True)
    (wants / "lab-storage.service").symlink_to("/etc/systemd/system/lab-storage.service")
    for unit in [*MASKED, *system.masked]:
        (root / "etc/systemd/system" / unit).symlink_to("/dev/null")


def _take_kernel(tree: Path, work: Path) -> None:
    kernels = sorted((tree / "boot").glob("vmlinuz-*"))
    if not kernels:
        raise ImageError("no kernel was installed in the guest")
    version = kernels[-1].name.removeprefix("vmlinuz-")
    shutil.copyfile(kernels[-1], work / "vmlinuz")
    packed = (tree / "boot" / f"initrd.img-{version}").read_bytes()
    magic = b"\x1f\x8b\x08"  # Debian 13 has an archive of modules before what it compresses
    at = 0 if packed.startswith(magic) else packed.index(magic, packed.index(b"TRAILER!!!"))
    (work / "initrd").write_bytes(packed[:at] + gzip.decompress(packed[at:]))  # an emulated CPU unpacks slowly


def _shrink(tree: Path, system: System) -> None:
    """Drop what no test needs: every byte of the root disk is read by every backup in the suite."""
    for name in DIRECTORIES_DROPPED:
        path = tree / name
        if path.is_dir():
            shutil.rmtree(path)
            path.mkdir()
        elif path.exists():
            path.unlink()
    for pattern in system.dropped:
        for path in tree.glob(pattern):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    modules = next((tree / "usr/lib/modules").iterdir())
    for name in set(MODULES_DROPPED) - set(system.modules_kept):
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
        for what in ("interval", "timeout"):  # a host that stalls has not gone: no pings, and patience (lab.rules)
            config.write(f"node.conn[0].timeo.noop_out_{what} = 0\n")
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
