"""Targets as users write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmbackupd.errors import InvalidArgument
from vmbackupd.restore.address import IscsiTarget, Target, TargetKind, parse_target, safe_name


def no_block(path: str) -> bool:
    return False


@pytest.mark.parametrize(("text", "target"), [
    ("/srv/vda.qcow2", Target(TargetKind.QCOW2, "/srv/vda.qcow2")),
    ("/srv//x/../vda.img", Target(TargetKind.RAW, "/srv/vda.img")),
    ("/srv/vda", Target(TargetKind.RAW, "/srv/vda")),
    ("iscsi://192.0.2.7/iqn.2024-01.org.example:disk1/1",
     Target(TargetKind.ISCSI, iscsi=IscsiTarget("192.0.2.7", 3260, "iqn.2024-01.org.example:disk1", 1))),
    ("iscsi://san.example:860/iqn.2024-01.org.example:a:b:c/12",
     Target(TargetKind.ISCSI, iscsi=IscsiTarget("san.example", 860, "iqn.2024-01.org.example:a:b:c", 12))),
    ("iscsi://[2001:db8::1]:3261/eui.02004567A425678D/0",
     Target(TargetKind.ISCSI, iscsi=IscsiTarget("2001:db8::1", 3261, "eui.02004567A425678D", 0))),
])
def test_a_target_is_told_by_its_form(text: str, target: Target) -> None:
    assert parse_target("vda", text, is_block=no_block) == target


def test_an_existing_block_device_is_one_whatever_its_name() -> None:
    for path in ("/dev/disk/by-id/wwn-0x5000", "/srv/link.qcow2"):
        assert parse_target("vda", path, is_block=lambda _: True) == Target(TargetKind.BLOCK, path)


def test_none_leaves_out() -> None:
    assert parse_target("vda", "none") is None


@pytest.mark.parametrize("text", [
    "", "vda.qcow2", "./vda", "/srv/", "/a\0b", "iscsi:", "iscsi://", "iscsi://host", "iscsi://host/iqn.x",
    "iscsi://host/iqn.x/", "iscsi://host/iqn.x/one", "iscsi://host/iqn.x/-1", "iscsi://host:0/iqn.x/1",
    "iscsi://host:65536/iqn.x/1", "iscsi:///iqn.x/1", "iscsi://host/disk/1", "iscsi://host/iqn.x/1/2",
    "iscsi://user%secret@host/iqn.x/1", "nbd://host/x",
])
def test_anything_else_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match="volume vda"):
        parse_target("vda", text, is_block=no_block)


def test_a_device_that_is_not_there_is_no_raw_file() -> None:
    with pytest.raises(InvalidArgument, match="no block device /dev/sdz"):
        parse_target("vda", "/dev/sdz", is_block=no_block)


@given(st.from_regex(r"[a-z0-9.-]{1,20}|[0-9a-f:]{2,20}", fullmatch=True), st.integers(1, 65535),
       st.from_regex(r"iqn\.[A-Za-z0-9.:_-]{1,60}", fullmatch=True), st.integers(0, 16383))
def test_a_target_reads_back_what_it_prints(host: str, port: int, iqn: str, lun: int) -> None:
    target = IscsiTarget(host, port, iqn, lun)
    assert parse_target("x", str(target)) == Target(TargetKind.ISCSI, iscsi=target)


@given(st.text())
def test_a_file_name_made_of_an_id_stays_in_its_directory(volume: str) -> None:
    name = safe_name(volume)
    assert name and "/" not in name and "\0" not in name and not name.startswith(".") and len(name.encode()) <= 200


def test_file_names_stay_readable() -> None:
    assert safe_name("vda") == "vda"
    assert safe_name("iscsi:iqn.2024-01.org.example:d/1") == "iscsi_iqn.2024-01.org.example_d_1"
