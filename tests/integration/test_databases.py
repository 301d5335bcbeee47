"""PostgreSQL and MariaDB under load: data on a LUN, WAL and binary log on a virtual disk. The restored guest recovers
them, everything that was acknowledged before T1 is there, and the databases find no fault with themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.booted import boot_on_new_luns
from tests.integration.service import Service
from tests.lab import Lab, dbload
from tests.lab.guest import Guest
from vmbackupd.units import MiB

pytestmark = [pytest.mark.lab, pytest.mark.extended]

HOOKS = Path(__file__).parents[2] / "packaging/guest/fsfreeze-hook.d"
LOAD = "/run/dbload.py"
BIN = "/usr/lib/postgresql/15/bin"
CLIENTS = {
    "postgresql": f"runuser -u postgres -- {BIN}/psql -qAtX -v ON_ERROR_STOP=1 -h /run/postgresql postgres",
    "mariadb": "mariadb --skip-column-names --batch --unbuffered lab",
}
SERVERS = {
    "postgresql": "--uid=postgres --gid=postgres "
    f"{BIN}/postgres -D /mnt/db/pg -k /run/postgresql -c listen_addresses= -c shared_buffers=8MB "
    "-c max_connections=20 -c max_wal_size=8MB -c checkpoint_timeout=30s -c jit=off",
    "mariadb": "/usr/sbin/mariadbd --defaults-file=/etc/lab-mariadb.cnf",
}
CONFIGURATION = """\
[mariadbd]
user = mysql
datadir = /mnt/db/my
socket = /run/mysqld/mysqld.sock
skip-networking
log-bin = /mnt/dblog/binlog/log
sync_binlog = 1
innodb_flush_log_at_trx_commit = 1
innodb_buffer_pool_size = 8M
innodb_log_file_size = 4M
innodb_data_file_path = ibdata1:5M:autoextend
performance_schema = off
key_buffer_size = 256K
aria_pagecache_buffer_size = 1M
"""
MOUNT = """set -e
vgchange -ay -qq vgdb vgdblog
mkdir -p /mnt/db /mnt/dblog
mount /dev/vgdb/db /mnt/db
mount /dev/vgdblog/log /mnt/dblog
"""
MAKE = f"""set -e
for pair in vgdb/db=$1 vgdblog/log=/dev/vdd; do
    device=${{pair#*=}} name=${{pair%%=*}}
    vgcreate -qq ${{name%/*}} $device
    lvcreate -qq -Zn -Wn -l 100%FREE -n ${{name#*/}} ${{name%/*}}
    mkfs.ext4 -q -J size=4 /dev/$name
done
{MOUNT}
install -d -o postgres -m 700 /mnt/db/pg /mnt/dblog/wal
install -d -o mysql -m 700 /mnt/db/my /mnt/dblog/binlog
runuser -u postgres -- {BIN}/initdb -N -D /mnt/db/pg -X /mnt/dblog/wal --wal-segsize=1 --data-checksums --no-locale \\
    -E UTF8 -A trust > /dev/null & initdb=$!
mariadb-install-db --defaults-file=/etc/lab-mariadb.cnf --skip-test-db --skip-name-resolve \\
    --auth-root-authentication-method=normal > /dev/null
wait $initdb
"""


@dataclass
class Backed:
    """A backup, and per database what had been acknowledged: numbers with the guest's time."""

    hooks: bool
    shown: dict[str, Any]
    acknowledged: dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def guest(lab: Lab) -> Iterator[Guest]:
    """Both databases, running, in a guest whose agent has no hooks."""
    guest = lab.start_guest("big", "db", disks={"vdd": 96 * MiB}, luns={"db": 160 * MiB})
    lun = guest.luns["db"]
    path = f"/dev/disk/by-path/ip-{lun.portal_guest}-iscsi-{lun.iqn}-lun-{lun.lun}"
    guest.write_file("/etc/lab-mariadb.cnf", CONFIGURATION.encode())
    guest.exec(["sh", "-c", MAKE, "sh", path], timeout=300)
    guest.exec("rm /etc/qemu/fsfreeze-hook.d/*")
    start_servers(guest)
    guest.exec("mariadb -e 'CREATE DATABASE lab CHARACTER SET utf8mb3'")
    yield guest
    guest.destroy()


@pytest.fixture(scope="module")
def service(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with Service(lab, tmp_path_factory.mktemp("databases")) as service:
        service.ctl("repository", "init")
        yield service


@pytest.fixture(scope="module", params=["no hooks", "hooks"])
def backed(request: pytest.FixtureRequest, guest: Guest, service: Service) -> Backed:
    """A backup of the guest under load."""
    if request.param == "hooks":
        for hook in HOOKS.iterdir():
            guest.write_file(f"/etc/qemu/fsfreeze-hook.d/{hook.name}", hook.read_bytes(), 0o755)
    start_load(guest)
    try:
        backup = service.ctl("backup", guest.name)["backup"]
    finally:
        guest.exec("systemctl stop 'lab-load-*'")
    assert not guest.exec("ls -d /run/fsfreeze-hook-mariadb 2> /dev/null || true"), "the read lock is held still"
    acknowledged = {}
    for name in CLIENTS:
        lines = guest.read_file(f"/run/{name}.acknowledged").decode().splitlines()
        acknowledged[name] = [(int(line.split()[0]), float(line.split()[1])) for line in lines if " " in line]
    return Backed(request.param == "hooks", service.ctl("show", backup), acknowledged)


def start_servers(guest: Guest) -> None:
    guest.write_file(LOAD, Path(dbload.__file__).read_bytes())
    guest.exec("install -d -o postgres /run/postgresql; install -d -o mysql /run/mysqld")
    for name, words in SERVERS.items():
        guest.exec(f"systemd-run --quiet --collect --unit=lab-{name} {words}")
    ready = f"{BIN}/pg_isready -q -h /run/postgresql && mariadb-admin --silent ping 2> /dev/null"
    guest.exec(f"until {ready}; do sleep 0.2; done", timeout=180)


def start_load(guest: Guest) -> None:
    """Both loads anew, well under way on return; the binary log holds nothing older."""
    guest.exec("mariadb -e 'RESET MASTER'")
    for name, client in CLIENTS.items():
        run = f"systemd-run --quiet --collect --unit=lab-load-{name} python3 {LOAD}"
        guest.exec(f"rm -f /run/{name}.acknowledged; {run} /run/{name}.acknowledged {client}")
    for name in CLIENTS:
        guest.exec(f"until [ $(grep -c . /run/{name}.acknowledged) -ge 20 ]; do sleep 0.2; done", timeout=120)


def test_the_restored_databases_have_all_that_was_acknowledged(
    lab: Lab, service: Service, guest: Guest, backed: Backed, tmp_path: Path
) -> None:
    wanted = "application" if backed.hooks else "filesystem"
    assert {volume["consistency"] for volume in backed.shown["volumes"]} == {wanted}
    booted = boot_on_new_luns(lab, service, guest, backed.shown, tmp_path)
    try:
        booted.exec(MOUNT)
        start_servers(booted)
        for name, client in CLIENTS.items():
            found = json.loads(booted.exec(f"python3 {LOAD} --check {client}", timeout=120))
            before = [number for number, when in backed.acknowledged[name] if when < backed.shown["t1"]]
            assert len(before) >= 20 and len(backed.acknowledged[name]) > len(before) + 20
            rows = found["rows"]
            assert found == {
                "rows": rows,
                "first": 1,
                "last": rows,
                "count": rows,
                "sum": rows * (rows + 1) // 2,
                "bad": 0,
            }
            assert before[-1] <= rows <= before[-1] + 1, name
        logged = booted.exec("mariadb-binlog --base64-output=decode-rows /mnt/dblog/binlog/log.0* | grep -c 'Xid = '")
        assert int(logged) == rows + 1  # and the one that made the tally
        find_no_fault(booted)
    finally:
        booted.destroy()


def find_no_fault(guest: Guest) -> None:
    """Ask the databases themselves."""
    said = guest.exec("journalctl --no-pager -u lab-postgresql -u lab-mariadb").decode()
    assert "automatic recovery in progress" in said and "Recovering after a crash" in said
    postgres = f"runuser -u postgres -- {BIN}"
    guest.exec(f"{postgres}/pg_amcheck --install-missing --heapallindexed -h /run/postgresql postgres", timeout=180)
    guest.exec(f"{postgres}/pg_dump -h /run/postgresql postgres > /dev/null", timeout=60)
    checked = guest.exec("mariadb-check --extended --databases lab mysql", timeout=120).decode()
    assert checked.count("OK") > 2 and "error" not in checked.lower() and "corrupt" not in checked.lower(), checked
    guest.exec("systemctl stop lab-postgresql lab-mariadb", timeout=60)
    guest.exec(f"{postgres}/pg_checksums --check -D /mnt/db/pg", timeout=60)
