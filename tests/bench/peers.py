"""The peers, as their own users would run them for the job: zstd at level 1 or their fastest, no encryption where they
can do without, a local directory on the same filesystem.

borg: the fixed chunker of 4 MiB that its manual recommends for disk images; ``--sparse``. restic knows no unencrypted
repository. Making the repository is not part of the measured time.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path

from tests.bench.measure import Finished, Sample, remove, run, settle, stored_below
from tests.bench.works import Bench, check_same
from tests.lab.services import Processes, open_libvirt, start_libvirt


def _sample(bench: Bench, done: Finished, stored: int) -> Sample:
    return Sample(done.seconds, done.peak_rss, bench.data_bytes, stored)


def _writes(bench: Bench, argv: list[object], target: Path) -> Sample:
    """A command that reads the image and writes one file."""
    settle(bench.image)
    done = run(argv)
    stored = stored_below(target)
    remove(target)
    return _sample(bench, done, stored)


def _restores(bench: Bench, source: Path, argv: list[object], target: Path) -> Sample:
    """A command that makes the image again from ``source``."""
    settle(source)
    done = run(argv)
    check_same(bench.image, target)
    stored = stored_below(target)
    remove(target)
    return _sample(bench, done, stored)


# ---- qemu-img


def _to_qcow2(bench: Bench, target: Path) -> list[object]:
    return ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd", bench.image, target]


def qemu_img_backup(bench: Bench) -> Sample:
    target = bench.path("backup.qcow2")
    return _writes(bench, _to_qcow2(bench, target), target)


def qemu_img_restore(bench: Bench) -> Sample:
    source, target = bench.path("kept.qcow2"), bench.path("restored.raw")
    if not source.exists():
        run(_to_qcow2(bench, source))
    return _restores(bench, source, ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", source, target], target)


# ---- zstd, nbdcopy


def zstd_backup(bench: Bench) -> Sample:
    target = bench.path("backup.zst")
    return _writes(bench, ["zstd", "-q", "-1", "-T0", bench.image, "-o", target], target)


def zstd_restore(bench: Bench) -> Sample:
    source, target = bench.path("kept.zst"), bench.path("restored.raw")
    if not source.exists():
        run(["zstd", "-q", "-1", "-T0", bench.image, "-o", source])
    return _restores(bench, source, ["zstd", "-q", "-d", "--sparse", source, "-o", target], target)


def nbdcopy_backup(bench: Bench) -> Sample:
    """A plain copy over NBD, nothing compressed."""
    target = bench.path("backup.raw")
    target.touch()
    os.truncate(target, bench.size)
    return _writes(
        bench, ["nbdcopy", "--destination-is-zero", "--", "[", "nbdkit", "file", bench.image, "]", target], target
    )


# ---- virtnbdbackup

DOMAIN = """<domain type='qemu'><name>bench</name><memory>65536</memory>
<os><type arch='x86_64' machine='q35'>hvm</type></os><devices><disk type='file' device='disk'>
<driver name='qemu' type='qcow2'/><source file='{disk}'/><target dev='vda' bus='virtio'/></disk></devices></domain>"""


def virtnbdbackup_backup(bench: Bench) -> Sample:
    """A shut-off guest with the image as its disk, in a libvirtd of our own; lz4 is all it can compress with."""
    disk, target = bench.path("guest.qcow2"), bench.path("backup-virtnbdbackup")
    if not disk.exists():
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", bench.image, disk])
    with tempfile.TemporaryDirectory(prefix="vmbackupd-bench-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        processes = Processes(Path(directory))
        try:
            uri = start_libvirt(processes, Path(directory))
            connection = open_libvirt(uri)
            connection.defineXML(DOMAIN.format(disk=disk))
            connection.close()
            settle(disk)
            # it asks for a user where the URI has a socket; this libvirtd does not
            options = ["--user", "bench", "--password", "bench", "-n", "-z", "-f", bench.path("virtnbdbackup.sock")]
            done = run(["virtnbdbackup", "-U", uri, "-d", "bench", "-l", "copy", "-o", target, *options])
        finally:
            processes.close()
    stored = stored_below(target)
    remove(target)
    return _sample(bench, done, stored)


# ---- borg


class Borg:
    """A borg repository in this directory."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench = bench
        self.path = bench.path(name)
        self._environment = {
            "BORG_BASE_DIR": str(bench.path("borg-home")),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        }
        if not self.path.exists():
            self.run("init", "--encryption", "none", self.path)

    def run(self, *words: object, cwd: Path | None = None) -> Finished:
        return run(["borg", *words], environment=self._environment, cwd=cwd)

    def create(self, archive: str) -> Finished:
        options = shlex.split("--compression zstd,1 --chunker-params fixed,4194304 --sparse --files-cache disabled")
        return self.run("create", *options, f"{self.path}::{archive}", "image.raw", cwd=self.bench.directory)


def borg_kept(bench: Bench) -> Borg:
    made = bench.path("kept-borg").exists()
    borg = Borg(bench, "kept-borg")
    if not made:
        borg.create("first")
    return borg


def borg_backup(bench: Bench) -> Sample:
    borg = Borg(bench, "new-borg")
    settle(bench.image)
    done = borg.create("first")
    stored = stored_below(borg.path)
    remove(borg.path)
    return _sample(bench, done, stored)


def borg_scan(bench: Bench) -> Sample:
    borg = borg_kept(bench)
    settle(bench.image, borg.path)
    before = stored_below(borg.path)
    done = borg.create(f"again-{os.urandom(4).hex()}")
    return _sample(bench, done, stored_below(borg.path) - before)


def borg_restore(bench: Bench) -> Sample:
    borg, directory = borg_kept(bench), bench.path("restored-borg")
    directory.mkdir()
    settle(borg.path)
    done = borg.run("extract", "--sparse", f"{borg.path}::first", cwd=directory)
    check_same(bench.image, directory / "image.raw")
    stored = stored_below(directory / "image.raw")
    remove(directory)
    return _sample(bench, done, stored)


def borg_verify(bench: Bench) -> Sample:
    borg = borg_kept(bench)
    settle(borg.path)
    return _sample(bench, borg.run("check", "--verify-data", borg.path), stored_below(borg.path))


# ---- restic


class Restic:
    """A restic repository in this directory."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench = bench
        self.path = bench.path(name)
        if not self.path.exists():
            self.run("init")

    def run(self, *words: object, cwd: Path | None = None) -> Finished:
        options = ["--quiet", "--repo", self.path, "--cache-dir", self.bench.path("restic-cache")]
        return run(["restic", *options, *words], environment={"RESTIC_PASSWORD": "bench"}, cwd=cwd)

    def backup(self, *options: str) -> Finished:
        return self.run("backup", *options, "image.raw", cwd=self.bench.directory)


def restic_kept(bench: Bench) -> Restic:
    made = bench.path("kept-restic").exists()
    restic = Restic(bench, "kept-restic")
    if not made:
        restic.backup()
    return restic


def restic_backup(bench: Bench) -> Sample:
    restic = Restic(bench, "new-restic")
    settle(bench.image)
    done = restic.backup()
    stored = stored_below(restic.path)
    remove(restic.path)
    return _sample(bench, done, stored)


def restic_scan(bench: Bench) -> Sample:
    restic = restic_kept(bench)
    settle(bench.image, restic.path)
    before = stored_below(restic.path)
    done = restic.backup("--force")
    return _sample(bench, done, stored_below(restic.path) - before)


def restic_restore(bench: Bench) -> Sample:
    restic, directory = restic_kept(bench), bench.path("restored-restic")
    settle(restic.path)
    done = restic.run("restore", "latest", "--target", directory)
    [found] = directory.rglob("image.raw")
    check_same(bench.image, found)
    stored = stored_below(found)
    remove(directory)
    return _sample(bench, done, stored)


def restic_verify(bench: Bench) -> Sample:
    restic = restic_kept(bench)
    settle(restic.path)
    return _sample(bench, restic.run("check", "--read-data"), stored_below(restic.path))
