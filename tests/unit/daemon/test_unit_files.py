"""The files systemd and the bus read agree with the program."""

from __future__ import annotations

import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vmbackupd.api.names import BUS_NAME
from vmbackupd.config import DEFAULT_CACHE, DEFAULT_RUNTIME, DEFAULT_STATE

ROOT = Path(__file__).parents[3]


def unit(name: str) -> ConfigParser:
    parser = ConfigParser(interpolation=None, strict=False, delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(ROOT / "systemd" / name)
    return parser


def test_the_unit_fits_the_daemon() -> None:
    service = unit("vmbackupd.service")["Service"]
    assert (service["Type"], service["BusName"]) == ("notify", BUS_NAME)
    assert Path("/var/lib", service["StateDirectory"]) == DEFAULT_STATE
    assert Path("/run", service["RuntimeDirectory"]) == DEFAULT_RUNTIME
    assert Path("/var/cache", service["CacheDirectory"]) == DEFAULT_CACHE
    assert (service["StateDirectoryMode"], service["RuntimeDirectoryMode"], service["CacheDirectoryMode"]) == (
        "0711", "0700", "0700")


def test_a_call_to_the_name_starts_the_unit() -> None:
    activation = unit("org.vmbackupd1.service")["D-BUS Service"]
    assert activation["Name"] == BUS_NAME
    assert (ROOT / "systemd" / activation["SystemdService"]).exists()


def test_the_bus_policy_is_about_the_name_and_root_only() -> None:
    policies = ElementTree.parse(ROOT / "packaging/dbus/org.vmbackupd1.conf").getroot().findall("policy")
    allowed = {policy.get("user") for policy in policies if policy.find("allow") is not None}
    assert allowed == {"root"}
    names = {value for policy in policies for rule in policy for value in rule.attrib.values()}
    assert names == {BUS_NAME}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    text = (ROOT / "systemd/vmbackupd.service").read_text().replace("/usr/bin/vmbackupd", "/bin/true")
    (tmp_path / "vmbackupd.service").write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(tmp_path / "vmbackupd.service")],
                          capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "vmbackupd.service" in line]
    assert not complaints
