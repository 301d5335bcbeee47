"""The configuration file: what it accepts, and how it names what it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmbackupd.config import MachineConfig, load, parse, seconds, size, to_toml
from vmbackupd.errors import ConfigError
from vmbackupd.units import GiB, MiB

EXAMPLE = Path(__file__).parents[3] / "packaging/vmbackupd.toml"


def test_defaults() -> None:
    config = parse("")
    assert config.state_directory == Path("/var/lib/vmbackupd")
    assert config.runtime_directory == Path("/run/vmbackupd")
    assert config.repository.path == Path("/var/lib/vmbackupd/repository")
    assert config.scratch.directory == Path("/var/lib/vmbackupd/scratch")
    assert config.hypervisor.uri == "qemu:///system"
    assert (config.guest.freeze_budget, config.guest.lease) == (5.0, 300.0)
    assert config.bus.address is None


def test_every_key_and_the_directories_that_follow_another() -> None:
    config = parse("""
        state_directory = "/state"
        [guest]
        freeze_budget = "500 ms"
        lease = 60
        [scratch]
        size = "10 GiB"
        share = "30 %"
        [jobs]
        parallel = 2
    """, overrides={"bus.address": "unix:path=/b", "guest.lease": "2 min"})
    assert config.repository.path == Path("/state/repository")
    assert config.scratch.directory == Path("/state/scratch")
    assert (config.guest.freeze_budget, config.guest.lease) == (0.5, 120.0)
    assert config.scratch.size == 10 * GiB
    assert config.scratch.share == pytest.approx(0.3)
    assert (config.jobs.parallel, config.bus.address) == (2, "unix:path=/b")


@pytest.mark.parametrize(("text", "words"), [
    ("guest = 5", ["guest", "section [guest]", "5"]),
    ("[guest]\nfreez_budget = 5", ["guest.freez_budget", "freeze_budget, lease"]),
    ("[gast]\nlease = 5", ["gast", "[guest]", "state_directory"]),
    ("[guest]\nfreeze_budget = 'soon'", ["guest.freeze_budget", "duration", "'soon'"]),
    ("[guest]\nfreeze_budget = true", ["guest.freeze_budget", "True"]),
    ("[guest]\nfreeze_budget = 0", ["guest.freeze_budget", "above zero"]),
    ("[guest]\nfreeze_budget = inf", ["guest.freeze_budget"]),
    ("[guest]\nfreeze_budget = nan", ["guest.freeze_budget"]),
    ("[scratch]\nsize = '10 GB'", ["scratch.size", "GiB", "'10 GB'"]),
    ("[scratch]\nsize = 1.5", ["scratch.size", "1.5"]),
    (f"[scratch]\nsize = {'9' * 400}", ["scratch.size"]),
    (f"[scratch]\nsize = '{'9' * 400}'", ["scratch.size"]),
    ("[scratch]\nshare = 2", ["scratch.share", "0.01 to 1"]),
    ("[repository]\npath = 'here'", ["repository.path", "absolute path", "'here'"]),
    ("[repository]\npath = ['/a']", ["repository.path", "absolute path"]),
    ("[hypervisor]\nuri = ''", ["hypervisor.uri", "not empty"]),
    ("[jobs]\nparallel = 0", ["jobs.parallel", "1 to 64"]),
    ("[guest\n", ["not valid TOML"]),
    ("[repository]\nurl = 'http://x'", ["repository.url", "s3://bucket/prefix", "'http://x'"]),
    ("[repository]\nurl = 's3://key:secret@bucket'", ["repository.url", "without credentials"]),
    ("[repository]\nurl = 's3://b'\npath = '/p'", ["repository.path and repository.url", "one of them"]),
    ("[repository]\ncompression_level = 99", ["repository.compression_level", "1 to 19", "99"]),
    ("[repository]\npack_size = '1 KiB'", ["repository.pack_size", "1 MiB to 256 MiB"]),
    ("[repository]\ns3 = 5", ["repository.s3", "section [repository.s3]"]),
    ("[repository.s3]\nsecret_key = 'x'", ["unknown key repository.s3.secret_key", "credentials_file"]),
    ("[repository.s3]\nendpoint = 'https://a:b@c'", ["repository.s3.endpoint", "without credentials"]),
    ("[repository.s3]\ncredential = 'c'\ncredentials_file = '/f'", ["credentials_file and", "one of them"]),
    ("[encryption]\ncredential = '../x'", ["encryption.credential", "no path"]),
    ("[encryption]\npassphrase = 'x'", ["unknown key encryption.passphrase", "passphrase_file"]),
    ("[retention]\nkeep_last = -1", ["retention.keep_last", "0 to 10000"]),
    ("machines = 5", ["machines", "[machines.NAME]"]),
    ("[machines]\nweb1 = 5", ["machines.web1", "section [machines.web1]"]),
    ("[machines.web1]\nagent = '/a'", ["machines.web1", "key qmp"]),
    ("[machines.web1]\nqmp = 'a'", ["machines.web1.qmp", "absolute path"]),
    ("[machines.web1]\nqmp = '/a'\nqpm = '/a'", ["unknown key machines.web1.qpm", "qmp, agent, uuid"]),
    ("[machines.web1]\nqmp = '/a'\nuuid = '7'", ["machines.web1.uuid", "a UUID"]),
    ("[machines.'a/b']\nqmp = '/a'", ["machines.a/b", "a name of letters"]),
    ("[machines.web1]\nqmp = '/a'", ["hypervisor.uri", "both or neither"]),
    ("[hypervisor]\nuri = 'qmp:'", ["hypervisor.uri", "both or neither"]),
    ("[retention]\nafter_backup = 1", ["retention.after_backup", "true or false"]),
    ("[retention]\nafter_backup = true", ["retention.after_backup", "keep_last", "keep nothing"]),
])
def test_errors_name_the_file_the_key_and_what_is_right(text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "/etc/file.toml")
    message = str(caught.value)
    assert message.startswith("/etc/file.toml: ")
    assert [word for word in words if word not in message] == []


def test_where_the_repository_is_and_how_it_opens() -> None:
    config = parse("""
        cache_directory = "/cache"
        [repository]
        url = "s3://bucket/hosts/a"
        compression_level = 3
        pack_size = "64 MiB"
        [repository.s3]
        endpoint = "https://s3.example.com:7480"
        timeout = "30s"
        [encryption]
        key_file = "/etc/key"
        [retention]
        keep_daily = 7
        keep_yearly = 1
        after_backup = true
    """)
    assert (config.repository.path, config.repository.place) == (None, "s3://bucket/hosts/a")
    assert (config.repository.compression_level, config.repository.pack_size) == (3, 64 * MiB)
    assert (config.repository.s3.timeout, config.repository.s3.endpoint) == (30.0, "https://s3.example.com:7480")
    assert config.encryption.configured and not parse("").encryption.configured
    assert config.retention.keeps == {"keep_daily": 7, "keep_yearly": 1}
    assert config.cache_directory == Path("/cache")
    assert parse(to_toml(config)) == config


def test_machines_that_run_without_libvirt() -> None:
    config = parse("""
        hypervisor.uri = "qmp:"
        [machines.web1]
        qmp = "/run/vm/web1.qmp"
        agent = "/run/vm/web1.agent"
        uuid = "0B49A1A8-6d39-4a0c-9ab0-1f7c8f0c1f5e"
        [machines."db.2"]
        qmp = "/run/vm/db.qmp"
        command_line = "/etc/vm/db.sh"
        nvram = "/var/lib/vm/db.nvram"
    """)
    assert config.hypervisor.is_qmp and not parse("").hypervisor.is_qmp
    assert config.machines == {
        "web1": MachineConfig(Path("/run/vm/web1.qmp"), agent=Path("/run/vm/web1.agent"),
                              uuid="0b49a1a8-6d39-4a0c-9ab0-1f7c8f0c1f5e"),
        "db.2": MachineConfig(Path("/run/vm/db.qmp"), command_line=Path("/etc/vm/db.sh"),
                              nvram=Path("/var/lib/vm/db.nvram")),
    }
    assert parse(to_toml(config)) == config


def test_the_command_line_puts_another_place_over_the_file() -> None:
    file = '[repository]\nurl = "s3://bucket/a"'
    assert parse(file, overrides={"repository.path": "/r"}).repository.place == "/r"
    assert parse("[repository]\npath = '/r'", overrides={"repository.url": "file:///s"}).repository.place == "file:///s"


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "binary.toml")
    with pytest.raises(ConfigError, match=r"command line: repository\.path"):
        load(None, {"repository.path": "relative"})


def test_the_example_is_the_defaults_and_its_comments_are_valid() -> None:
    text = EXAMPLE.read_text()
    assert parse(text) == parse("")
    switched_on = "\n".join(line[1:] if line.startswith("#") and not line.startswith("# ") else line
                            for line in text.splitlines())
    with pytest.raises(ConfigError, match=r"repository\.path and repository\.url: expected one of them"):
        parse(switched_on)
    either = [line for line in switched_on.splitlines() if not line.startswith(("path =", "credential = \"s3"))]
    given = parse("\n".join(either).replace("qemu:///system", "qmp:"))
    assert list(given.machines) == ["web1"]
    assert given.scratch.size == 100 * GiB
    assert given.bus.address == "unix:path=/run/test/bus"
    assert (given.guest, given.jobs, given.scratch.share) == (parse("").guest, parse("").jobs, parse("").scratch.share)
    assert (given.repository.place, given.repository.s3.region) == ("s3://bucket/prefix", "eu-central-1")
    assert (given.encryption.configured, given.retention) == (True, parse("").retention)


@settings(deadline=None)  # a busy machine is no fault
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1), st.floats(0.01, 1e6),
       st.integers(1, 2**60))
def test_what_is_shown_reads_back_the_same(text: str, budget: float, scratch: int) -> None:
    if not text.strip():
        return
    config = parse("", overrides={"hypervisor.uri": text, "repository.path": "/" + text})
    config = parse(to_toml(config).replace("freeze_budget = 5.0", f"freeze_budget = {budget!r}")
                   .replace("# size is not set", f"size = {scratch}"))
    assert config.hypervisor.uri == text
    assert config.guest.freeze_budget == budget
    assert parse(to_toml(config)) == config


@settings(deadline=None)  # a busy machine is no fault
@given(st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_quantities_are_read_or_refused(value: object) -> None:
    for read in (seconds, size):
        try:
            assert read(value) > 0
        except ValueError as error:
            assert "above zero" in str(error)


def test_quantities() -> None:
    assert [seconds(text) for text in ("5s", " 5 s ", "5", "0.5m", "2 min", "1h", 7)] == [5, 5, 5, 30, 120, 3600, 7]
    assert [size(text) for text in ("1.5 MiB", "1mib", "4096", 4096)] == [MiB * 3 // 2, MiB, 4096, 4096]
