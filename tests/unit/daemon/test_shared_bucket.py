"""Two hosts with a daemon each and one encrypted repository in an object store: a real Ceph gateway."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.ceph import Ceph
from tests.unit.api.support import BusDaemon
from tests.unit.daemon.test_repository_care import Host, MiB, wait_for

pytestmark = pytest.mark.slow


def hosts_on(ceph: Ceph, bucket: str, directory: Path, addresses: list[str]) -> list[Host]:
    """A host for each bus, with the same repository and the same key."""
    made = []
    for number, address in enumerate(addresses):
        place = directory / f"host{number}"
        place.mkdir()
        host = Host(address, place)
        host.sections = {
            "repository": {"url": f"s3://{bucket}/site"},
            "repository.s3": {"endpoint": ceph.endpoint, "addressing": "path",
                              "credentials_file": str(ceph.credentials_file(place))},
            "encryption": {"key_file": str(directory / "key")},
        }
        host.top["cache_directory"] = str(place / "cache")
        made.append(host)
    return made


@pytest.fixture
def two(ceph: Ceph, address: str, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that share a repository, both serving."""
    with BusDaemon() as other:
        one, another = hosts_on(ceph, ceph.make_bucket("plain"), tmp_path, [address, other.address])
        try:
            one.start()
            one.ctl("repository", "init", "--encrypt")
            another.start()
            yield one, another
        finally:
            for host in (one, another):
                host.kill()


def test_hosts_share_what_they_have_in_common(two: tuple[Host, Host], tmp_path: Path) -> None:
    one, another = two
    image = one.image("disk.raw", 1)
    mine = one.backup(image, "web")
    theirs = another.json("import", str(image), "--name", "db", "--format", "raw")
    assert theirs["bytes_stored"] < MiB
    assert {item["id"] for item in one.json("list")} == {mine, theirs["backup"]}
    assert list((another.directory / "cache").rglob("*"))  # indexes are loaded once
    # one host forgets what the other has built on, and collects
    one.ctl("forget", mine)
    one.json("gc")
    shutil.rmtree(another.directory / "cache")
    out = another.directory / "out"
    another.ctl("export", theirs["backup"], "vda", str(out))
    assert out.read_bytes() == image.read_bytes()
    assert another.json("verify", "--data")["sound"] is True
    another.ctl("forget", theirs["backup"])
    assert another.json("gc")["freed_bytes"] > 4 * MiB
    assert one.json("repository", "info")["packs"] == 0


def test_gc_of_one_host_leaves_what_another_reads(two: tuple[Host, Host]) -> None:
    one, another = two
    image = one.image("disk.raw", 2)
    backup = one.backup(image)
    served = another.json("serve", backup, "vda", "--no-wait")
    wait_for(another, served["job"], lambda view: view["step"].startswith("serving"))
    forgotten = one.json("forget", backup)
    assert len(forgotten["waiting"]) == 1 and "reader" in forgotten["waiting"][0]
    collected = one.json("gc")
    assert collected["freed_bytes"] == 0 and collected["waiting_for"] == forgotten["waiting"]
    another.ctl("cancel", served["job"])
    assert one.json("gc")["freed_bytes"] > 4 * MiB


def test_a_store_that_is_gone_is_an_error_that_names_it_and_no_hang(two: tuple[Host, Host], ceph: Ceph) -> None:
    one, _ = two
    one.sections["repository.s3"] |= {"timeout": "1 s"}
    one.sections["repository.s3"]["endpoint"] = "http://127.0.0.1:9"  # discard: nobody listens
    one.restart()
    code, message = one.error("list")
    assert code.startswith("Storage") and "127.0.0.1:9" in message
    assert one.ctl("jobs").returncode == 0  # and no reason for the daemon not to start


def test_what_the_store_has_locked_goes_when_it_may(ceph: Ceph, address: str, tmp_path: Path) -> None:
    (host,) = hosts_on(ceph, ceph.make_bucket("locked"), tmp_path, [address])
    host.sections["repository.s3"]["lock_days"] = 1
    try:
        host.start()
        host.ctl("repository", "init", "--encrypt")
        backup = host.backup(host.image("disk.raw", 3))
        done = host.ctl("forget", backup)
        assert host.json("list") == []
        assert "locked by the store until 20" in done.stdout
        done = host.ctl("gc")
        assert "locked by the store" in done.stdout and "until 20" in done.stdout
        assert host.json("repository", "info")["packs"] > 0
    finally:
        host.kill()
