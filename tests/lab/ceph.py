"""A Ceph cluster of one monitor, one OSD and one RADOS gateway on loopback: the object store of the tests.

Everything lies below one directory and listens on free ports of 127.0.0.1, so any number of checkouts can have theirs
at once. The processes belong to tests/lab/supervisor.py: none outlives the tests, however they end. Debian's packages
``ceph-mon ceph-osd radosgw ceph-common``; up in about 15 s, 120 MB of memory. Data is thrown away.
"""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import types
import uuid
from pathlib import Path
from typing import Any

from tests.lab.services import LabError, Processes, until

PROGRAMS = "ceph ceph-authtool ceph-mon ceph-osd monmaptool radosgw radosgw-admin"

# Ratios: the tests' disk may be rather full. Sizes: memory matters, speed does not. No msgr2: one port a daemon.
CONFIG = """
[global]
fsid = {fsid}
mon host = [v1:127.0.0.1:{mon_port}]
mon initial members = a
public network = 127.0.0.0/8
ms bind msgr2 = false
ms bind ipv4 = true
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pgp num = 8
mon allow pool size one = true
mon warn on pool no redundancy = false
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block size = {block_size}
bluestore fsck on mount = false
bluestore cache autotune = false
bluestore cache size = 67108864
osd memory target = 939524096
osd op num shards = 2
mon osd full ratio = .97
mon osd nearfull ratio = .95
mon osd backfillfull ratio = .96
mon data avail warn = 2
mon data avail crit = 1
run dir = {dir}/run
admin socket = {dir}/run/$name.asok
pid file = {dir}/run/$name.pid
log file = {dir}/log/$name.log
keyring = {dir}/keyring
mon data = {dir}/mon
osd data = {dir}/osd
osd max object name len = 256
osd max object namespace len = 64
[client.rgw.a]
rgw data = {dir}/rgw
rgw frontends = beast endpoint=127.0.0.1:{rgw_port}
rgw thread pool size = 64
rgw zone = default
rgw lc debug interval = -1
"""
KEYRING = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *", "mds": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
    "client.rgw.a": {"mon": "allow rwx", "osd": "allow rwx", "mgr": "allow rw"},
}
BLOCK_SIZE = 16 * 2**30  # of a sparse file


def missing() -> list[str]:
    """The programs that this machine lacks."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [name for name in PROGRAMS.split() if shutil.which(name, path=path) is None]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ceph:
    """``with Ceph() as ceph``: ``endpoint`` answers S3 requests of ``access_key`` and ``secret_key``."""

    def __init__(self) -> None:
        self.access_key = "AK" + secrets.token_hex(8).upper()
        self.secret_key = secrets.token_hex(20)
        self.user = "backup"
        self.endpoint = ""
        self._port = 0
        self._rgw = 0
        self._starts = 0

    def __enter__(self) -> Ceph:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Make and start the cluster; LabError with a log if a part of it does not come up."""
        self.dir = Path(tempfile.mkdtemp(prefix="vmbackupd-ceph-"))  # short: sockets live in it
        self.processes = Processes(self.dir)
        try:
            self._port = free_port()
            self.endpoint = f"http://127.0.0.1:{self._port}"
            self._start_cluster()
            self.start_gateway()
            self.admin("user", "create", f"--uid={self.user}", "--display-name=backup",
                       f"--access-key={self.access_key}", f"--secret-key={self.secret_key}")  # fmt: skip
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every process and remove the directory."""
        self.processes.close()

    def _start_cluster(self) -> None:
        for name in ("mon", "osd", "rgw", "run", "log"):
            (self.dir / name).mkdir()
        fsid, mon_port = str(uuid.uuid4()), free_port()
        self._config = self.dir / "ceph.conf"
        self._config.write_text(
            CONFIG.format(fsid=fsid, mon_port=mon_port, rgw_port=self._port, dir=self.dir, block_size=BLOCK_SIZE)
        )
        keyring, monmap = self.dir / "keyring", self.dir / "monmap"
        create = ["--create-keyring"]
        for name, capabilities in KEYRING.items():
            caps = [word for daemon, what in capabilities.items() for word in ("--cap", daemon, what)]
            self._run("ceph-authtool", keyring, *create, "--gen-key", "-n", name, *caps)
            create = []
        self._run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{mon_port}]", "--fsid", fsid, monmap)
        conf = ("--conf", self._config)
        self._run("ceph-mon", *conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
        self.processes.start("mon", ["ceph-mon", *conf, "-i", "a", "-f"])
        self.processes.ready("mon", lambda: _listening(mon_port))
        self._run("ceph", *conf, "auth", "import", "-i", keyring)
        osd = str(uuid.uuid4())
        self._run("ceph", *conf, "osd", "new", osd)
        self._run("ceph-osd", *conf, "-i", "0", "--mkfs", "--osd-uuid", osd)
        self.processes.start("osd", ["ceph-osd", *conf, "-i", "0", "-f"])
        self.processes.ready("osd", lambda: "1 up" in self._run("ceph", *conf, "osd", "stat"), 60)

    def start_gateway(self) -> None:
        """Start the gateway (again) and wait until it answers."""
        self._starts += 1
        name = f"rgw-{self._starts}"
        self._rgw = self.processes.start(name, ["radosgw", "--conf", self._config, "-n", "client.rgw.a", "-f"])
        self.processes.ready(name, self._answers, 60)

    def kill_gateway(self) -> None:
        """SIGKILL; whatever it was doing for a client stays half done."""
        os.kill(self._rgw, signal.SIGKILL)
        name = f"rgw-{self._starts}"
        until(lambda: self.processes.status(name) is not None, 30, "the gateway ends")

    def restart_gateway(self) -> None:
        """In good order: one that was killed is waited for half a minute when the next one makes a bucket."""
        self.processes.stop(f"rgw-{self._starts}", 20)
        self.start_gateway()

    def pause_gateway(self) -> None:
        """SIGSTOP: connections are still accepted by the kernel, and nothing is ever answered."""
        os.kill(self._rgw, signal.SIGSTOP)

    def resume_gateway(self) -> None:
        os.kill(self._rgw, signal.SIGCONT)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def admin(self, *words: str) -> str:
        """radosgw-admin; what it prints."""
        return self._run("radosgw-admin", "--conf", self._config, "-n", "client.rgw.a", *words)

    def client(self) -> Any:
        """A boto3 client of the gateway, as any other program would have it."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="default",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 3}),
        )

    def make_bucket(self, kind: str) -> str:
        """The name of a new bucket: ``plain``, ``versioned`` or ``locked`` (versioned, with object lock)."""
        name = f"{kind}-{secrets.token_hex(6)}"
        client = self.client()
        try:
            client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=kind == "locked")
            if kind == "versioned":
                client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        finally:
            client.close()
        return name

    def set_retention(self, bucket: str, *, days: int) -> None:
        """Let a bucket with object lock lock all that is put into it from now on."""
        rule = {"DefaultRetention": {"Mode": "GOVERNANCE", "Days": days}}
        client = self.client()
        try:
            client.put_object_lock_configuration(
                Bucket=bucket, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
            )
        finally:
            client.close()

    def versions(self, bucket: str, prefix: str = "") -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Every version and every delete marker in a bucket."""
        client = self.client()
        try:
            found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
            for page in client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix):
                found[0].extend(page.get("Versions", ()))
                found[1].extend(page.get("DeleteMarkers", ()))
            return found
        finally:
            client.close()

    def credentials_file(self, directory: Path) -> Path:
        """A file with the keys, in the format that the AWS tools share."""
        path = directory / "credentials"
        if path.exists():
            return path  # somebody may be reading it
        path.write_text(
            f"[default]\naws_access_key_id = {self.access_key}\naws_secret_access_key = {self.secret_key}\n"
        )
        path.chmod(0o600)
        return path

    def _run(self, *argv: object) -> str:
        words = [str(word) for word in argv]
        environment = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment)
        except subprocess.TimeoutExpired:
            raise LabError(f"{' '.join(words)}: not within 60 s") from None
        if done.returncode != 0:
            raise LabError(f"{' '.join(words)}: exit status {done.returncode}\n{done.stderr[-4000:]}")
        return done.stdout


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
