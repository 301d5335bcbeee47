"""Care of the repository from the command line to the bytes: vmbackupctl, a real bus, the real daemon, a repository."""

from __future__ import annotations

import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.api.support import DEADLINE, ROOT_DIRECTORY, cli_command, cli_environment

pytestmark = pytest.mark.slow

MiB = 2**20
SIZE = 24 * MiB


class Host:
    """A host with a bus, a configuration, and a daemon that can be started and ended."""

    def __init__(self, address: str, directory: Path) -> None:
        self.address = address
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        self.log = directory / "log"
        self.top: dict[str, object] = {
            "state_directory": f"{directory}/state", "runtime_directory": f"{directory}/run"}
        self.sections: dict[str, dict[str, object]] = {"repository": {"path": str(directory / "repository")}}

    @property
    def repository(self) -> Path:
        return self.directory / "repository"

    def start(self, **environment: str) -> None:
        """Start the daemon with the present ``sections`` and wait until it serves."""
        file = self.directory / "vmbackupd.toml"
        text = ""
        for section, keys in [("", self.top), *self.sections.items()]:
            text += f"[{section}]\n" if section else ""
            text += "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        file.write_text(text)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.unit.daemon.repository_daemon", "--config", str(file),
                 "--log-level=debug"], cwd=ROOT_DIRECTORY,
                env={**os.environ, "VMBACKUPD_BUS_ADDRESS": self.address, **environment},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 3 * DEADLINE
        while self.ctl("jobs", check=False).returncode:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)  # there is no event to wait for: the name comes up on the bus

    def stop(self, number: int = signal.SIGTERM) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(number)
            assert process.wait(DEADLINE) == (0 if number == signal.SIGTERM else -number), self.log.read_text()

    def kill(self) -> None:
        """End it, if it runs."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(DEADLINE)

    def restart(self, **environment: str) -> None:
        self.stop()
        self.start(**environment)

    def ctl(self, *arguments: str, check: bool = True, given: bytes = b"") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(cli_command(*arguments), env=cli_environment(self.address), input=given,
                              capture_output=True, check=False, timeout=2 * DEADLINE)
        result = subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())
        assert not check or result.returncode == 0, (arguments, result.stdout, result.stderr)
        return result

    def json(self, *arguments: str, status: int = 0, given: bytes = b"") -> Any:
        """What a command prints with ``--json``."""
        done = self.ctl(*arguments, "--json", check=False, given=given)
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        return json.loads(done.stdout)

    def error(self, *arguments: str, given: bytes = b"") -> tuple[str, str]:
        """Code and message of the error a command ends with."""
        error = self.json(*arguments, status=1, given=given)["error"]
        return error["code"], error["message"]

    def image(self, name: str, seed: int, *, size: int = SIZE) -> Path:
        """A raw image: random, repeated and zero blocks, and holes."""
        path = self.directory / name
        rng = random.Random(seed)
        with path.open("wb") as file:
            for at in range(0, size, MiB):
                file.seek(at)
                match rng.randrange(4):
                    case 0:
                        file.write(rng.randbytes(MiB))
                    case 1:
                        file.write(rng.randbytes(4096) * 256)
                    case 2:
                        file.write(bytes(MiB))
            file.truncate(size)
        return path

    def backup(self, image: Path, vm: str = "web") -> str:
        """Make an image a backup; its id."""
        return str(self.json("import", str(image), "--name", vm, "--format", "raw")["backup"])

    def packs(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in (self.repository / "packs").glob("*/*")}


@pytest.fixture
def host(address: str, tmp_path: Path) -> Iterator[Host]:
    host = Host(address, tmp_path)
    yield host
    host.kill()


@pytest.fixture
def site(host: Host) -> Host:
    """A host with a repository."""
    host.start()
    host.ctl("repository", "init")
    return host


def test_a_volume_goes_in_and_comes_out_the_same(site: Host) -> None:
    image = site.image("disk.raw", 1)
    backup = site.backup(image)
    (listed,) = site.json("list", "web")
    assert listed["id"] == backup
    raw, qcow2 = site.directory / "out.raw", site.directory / "out.qcow2"
    done = site.json("export", backup, "vda", str(raw))
    assert (done["size"], done["format"], done["path"]) == (SIZE, "raw", str(raw))
    assert raw.read_bytes() == image.read_bytes()
    assert raw.stat().st_blocks * 512 < SIZE  # holes stay holes
    site.ctl("export", backup, "vda", str(qcow2), "--format=qcow2", "--compress")
    for command in (["check", str(qcow2)], ["compare", str(qcow2), str(image)]):
        assert subprocess.run(["qemu-img", *command], capture_output=True, check=False).returncode == 0
    code, message = site.error("export", backup, "vda", str(raw))
    assert code == "TargetRefused" and str(raw) in message
    site.ctl("export", backup, "vda", str(raw), "--force")
    code, message = site.error("export", backup, "vdz", str(raw), "--force")
    assert code == "NotFound" and "vda" in message
    again = site.json("import", str(qcow2), "--name", "web", "--format", "qcow2")
    assert again["bytes_stored"] < MiB  # it is all there already


def test_a_volume_is_served_until_it_is_told_to_end(site: Host) -> None:
    image = site.image("disk.raw", 2)
    backup = site.backup(image)
    served = site.json("serve", backup, "vda", "--no-wait")
    assert subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "raw", served["uri"], str(image)],
                          capture_output=True, check=False).returncode == 0
    socket = site.directory / "s.sock"
    with subprocess.Popen(cli_command("serve", backup, "vda", str(socket)), env=cli_environment(site.address),
                          stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        uri = process.stdout.readline().strip()
        size = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, check=True, text=True).stdout
        assert int(size) == SIZE
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE) == 0
    assert not socket.exists()
    site.ctl("cancel", served["job"])
    assert not Path(served["socket"]).exists()
    assert site.error("serve", "web-0", "vda")[0] == "NotFound"


def test_forget_and_gc_give_the_room_back_and_leave_the_rest(site: Host) -> None:
    first, second = site.image("first.raw", 3), site.image("second.raw", 4)
    gone, kept = site.backup(first), site.backup(second)
    before = sum(site.packs().values())
    preview = site.json("forget", gone, "--dry-run")
    assert [(row["backup"], row["keep"]) for row in preview["decisions"]] == [(gone, False)]
    assert [item["id"] for item in site.json("list")] == [gone, kept]
    done = site.ctl("forget", gone)
    assert re.search(rf"{gone} +removed +\S+", done.stdout)
    assert [item["id"] for item in site.json("list")] == [kept]
    dry = site.json("gc", "--dry-run")
    assert sum(site.packs().values()) == before
    result = site.json("gc")
    assert result["freed_bytes"] > 4 * MiB and result["removed_packs"] > 0 and dry["dry_run"]
    assert sum(site.packs().values()) < before - 4 * MiB
    assert site.json("gc")["removed_packs"] == 0
    out = site.directory / "out"
    site.ctl("export", kept, "vda", str(out))
    assert out.read_bytes() == second.read_bytes()
    assert site.json("verify", "--data")["sound"] is True
    assert site.error("export", gone, "vda", str(out), "--force")[0] == "NotFound"


def test_forget_is_all_or_nothing(site: Host) -> None:
    image = site.image("disk.raw", 5)
    first, second = site.backup(image), site.backup(image)
    site.ctl("protect", second)
    code, message = site.error("forget", first, second)
    assert (code, second in message) == ("Protected", True)
    code, message = site.error("forget", first, "web-20200101T000000Z-00000000")
    assert (code, "web-20200101T000000Z-00000000" in message) == ("NotFound", True)
    assert len(site.json("list")) == 2
    assert site.json("show", second)["protected"] is True
    site.ctl("unprotect", second)
    site.ctl("forget", first, second)
    assert site.json("list") == []


def test_prune_keeps_what_the_rules_and_protection_keep(host: Host) -> None:
    host.sections["retention"] = {"keep_last": 2}
    host.start()
    host.ctl("repository", "init")
    image = host.image("disk.raw", 6, size=MiB)
    backups = [host.backup(image) for _ in range(5)]
    other = host.backup(image, "db")
    host.ctl("protect", backups[0])
    preview = host.json("prune", "web", "--dry-run")
    rows = {row["backup"]: (row["keep"], row["reason"]) for row in preview["decisions"]}
    assert rows == {
        backups[0]: (True, "protected"), backups[1]: (False, "no rule keeps it"),
        backups[2]: (False, "no rule keeps it"), backups[3]: (True, "keep-last 2 of 2"),
        backups[4]: (True, "keep-last 1 of 2")}
    assert len(host.json("list")) == 6
    assert host.json("prune", "web", "--keep-last", "3")["forgotten"] == [backups[1]]
    host.ctl("prune")
    assert [item["id"] for item in host.json("list")] == sorted(
        [backups[0], backups[3], backups[4], other], key=[*backups, other].index)
    code, message = host.error("prune", "nobody")
    assert (code, "nobody" in message) == ("NotFound", True)


def test_prune_without_a_rule_is_refused(site: Host) -> None:
    code, message = site.error("prune")
    assert code == "InvalidArgument" and "--keep-last" in message and "[retention]" in message


def test_verify_names_what_is_damaged_and_the_next_backup_heals_it(site: Host) -> None:
    image = site.image("disk.raw", 7)
    backup = site.backup(image)
    other = site.backup(site.image("other.raw", 8, size=MiB), "db")
    assert site.json("verify")["sound"] is True
    content = image.read_bytes()
    packs = {path: path.read_bytes() for path in (site.repository / "packs").glob("*/*")}
    starts = ((at, content[at : at + 4096]) for at in range(0, SIZE, MiB))
    at, chunk, pack = next(  # the first block that does not compress lies in a pack as it is
        (at, start, path) for at, start in starts for path in packs if start in packs[path])
    data = bytearray(packs[pack])
    data[data.index(chunk)] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    done = site.ctl("verify", "--data", check=False)
    assert done.returncode == 1
    assert backup in done.stdout and "the repository is damaged" in done.stderr
    report = site.json("verify", "--data", "--restart", status=1)
    assert {row["backup"] for row in report["damage"]} == {backup} and other not in str(report["damage"])
    (row,) = report["damage"]
    assert row["volume"] == "vda" and 0 < row["length"] <= MiB and row["offset"] <= at < row["offset"] + row["length"]
    site.backup(image)  # stores again what is damaged
    site.ctl("gc")
    assert site.json("verify", "--data")["sound"] is True
    out = site.directory / "out"
    site.ctl("export", backup, "vda", str(out))
    assert out.read_bytes() == image.read_bytes()


def test_a_slow_verify_is_stopped_and_goes_on_where_it_was(host: Host) -> None:
    host.sections["repository"]["pack_size"] = "1 MiB"
    host.start()
    host.ctl("repository", "init")
    image = host.directory / "disk.raw"
    image.write_bytes(random.Random(9).randbytes(20 * MiB))
    host.backup(image)
    stored = sum(host.packs().values())
    job = host.json("verify", "--data", "--rate", "1MiB", "--no-wait")["job"]
    assert host.error("verify")[0] == "Busy"
    enough = (min(len(os.sched_getaffinity(0)), 8) + 2) * MiB  # each thread has a pack in hand; the first is done
    progress = wait_for(host, job, lambda view: view["done"] > enough)
    assert progress["done"] <= progress["total"] == stored
    began = time.monotonic()
    assert "what it had completed stays" in host.ctl("cancel", job).stdout
    assert time.monotonic() - began < 10
    went_on = host.json("verify", "--data")
    assert (went_on["sound"], went_on["resumed"]) == (True, True) and went_on["bytes_read"] < stored
    assert host.json("verify", "--data")["resumed"] is False
    assert host.json("verify", "--data", "--restart")["bytes_read"] >= stored


def wait_for(host: Host, job: str, accept: Any) -> dict[str, Any]:
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        (view,) = [view for view in host.json("jobs") if view["id"] == job]
        if accept(view):
            return dict(view)
    raise AssertionError(f"job {job} is still {view}")


def test_an_encrypted_repository_from_birth_to_a_lost_key(host: Host) -> None:
    key = host.directory / "key"
    host.start()
    code, message = host.error("repository", "init", "--encrypt")
    assert code == "InvalidArgument" and "key_file" in message
    host.sections["encryption"] = {"key_file": str(key)}
    host.restart()
    made = host.json("repository", "init", "--encrypt")
    assert made["encrypted"] is True and {slot["kind"] for slot in made["keys"]} == {"keyfile", "recovery"}
    assert key.stat().st_mode & 0o777 == 0o600 and key.stat().st_size >= 32
    recovery = made["recovery_key"]
    image = host.image("disk.raw", 10)
    backup = host.backup(image, "warehouse-7")
    # nothing of names or content can be seen
    names = " ".join(str(path.relative_to(host.repository)) for path in host.repository.rglob("*"))
    assert "warehouse-7" in backup and "warehouse" not in names
    content = b"".join(path.read_bytes() for path in host.repository.rglob("*") if path.is_file())
    assert b"warehouse" not in content

    code, _ = host.error("repository", "keys", "add", "--passphrase-file", "-", given=b"short\n")
    assert code == "InvalidArgument"
    passphrase = secrets.token_hex(12)
    added = host.json("repository", "keys", "add", "--passphrase-file", "-", "--label", "in the safe",
                      given=passphrase.encode() + b"\n")
    assert (added["kind"], added["label"]) == ("passphrase", "in the safe")
    (keyfile,) = [slot["id"] for slot in host.json("repository", "keys", "list") if slot["kind"] == "keyfile"]
    host.ctl("repository", "keys", "revoke", keyfile)
    host.restart()
    code, message = host.error("list")
    assert code == "WrongKey" and str(key) in message

    file = host.directory / "passphrase"
    file.write_text(passphrase + "\n")
    host.sections["encryption"] = {"passphrase_file": str(file)}
    host.restart()
    assert [item["id"] for item in host.json("list")] == [backup]
    file.write_text("something else\n")
    assert host.error("list")[0] == "WrongKey"
    file.unlink()
    assert host.error("list")[0] == "KeyRequired"

    # the paper from the safe
    code, _ = host.error("repository", "keys", "add", "--key-file", str(key), "--unlock", "-", given=b"WRONG")
    assert code == "InvalidArgument"
    typed = recovery.lower().replace("-", " ").encode()
    host.json("repository", "keys", "add", "--key-file", str(key), "--unlock", "-", given=typed)
    host.sections["encryption"] = {"key_file": str(key)}
    host.restart()
    out = host.directory / "out"
    host.ctl("export", backup, "vda", str(out))
    assert out.read_bytes() == image.read_bytes()
    assert host.json("verify", "--data")["sound"] is True
    another = host.json("repository", "recovery-key", "--label", "second safe")
    assert another["recovery_key"] != recovery
    host.stop()
    log = host.log.read_text()
    assert [secret for secret in (recovery, passphrase, another["recovery_key"]) if secret in log] == []


def test_a_key_refuses_a_repository_that_is_not_encrypted(site: Host) -> None:
    key = site.directory / "key"
    key.write_bytes(secrets.token_bytes(32))
    site.sections["encryption"] = {"key_file": str(key)}
    site.restart()
    assert site.error("list")[0] == "NotEncrypted"
    assert site.json("repository", "keys", "list") == []
    assert site.error("repository", "recovery-key")[0] == "NotEncrypted"


def test_a_key_file_is_not_left_when_there_is_a_repository_already(site: Host) -> None:
    key = site.directory / "key"
    site.sections["encryption"] = {"key_file": str(key)}
    site.restart()
    code, message = site.error("repository", "init")
    assert (code, "already" in message, key.exists()) == ("InvalidArgument", True, False)


def test_a_credential_of_the_unit_opens_the_repository(host: Host) -> None:
    credentials = host.directory / "credentials"
    credentials.mkdir()
    (credentials / "repository-key").write_bytes(secrets.token_bytes(32))
    host.sections["encryption"] = {"credential": "repository-key"}
    host.start(CREDENTIALS_DIRECTORY=str(credentials))
    made = host.json("repository", "init", "--encrypt", "--no-recovery-key")
    assert [slot["kind"] for slot in made["keys"]] == ["credential"] and "recovery_key" not in made
    host.restart()  # a start without systemd
    code, message = host.error("list")
    assert code == "KeyRequired" and "LoadCredential" in message
    host.restart(CREDENTIALS_DIRECTORY=str(credentials))
    assert host.json("list") == []
    (slot,) = host.json("repository", "keys", "list")
    code, message = host.error("repository", "keys", "revoke", slot["id"])
    assert code == "InvalidArgument" and "last" in message


def test_imports_at_the_same_time_with_gc_beside_them(site: Host) -> None:
    images = [site.image(f"disk{number}.raw", 20 + number) for number in range(4)]
    site.ctl("forget", site.backup(site.image("old.raw", 30)))
    running = [subprocess.Popen(cli_command("import", str(image), f"--name=vm{number}", "--format=raw", "--json"),
                                env=cli_environment(site.address), stdout=subprocess.PIPE, text=True)
               for number, image in enumerate(images)]
    collected = [site.json("gc") for _ in range(3)]
    backups = []
    for process in running:
        out, _ = process.communicate(timeout=2 * DEADLINE)
        assert process.returncode == 0
        backups.append(json.loads(out)["backup"])
    collected.append(site.json("gc"))
    assert sum(result["removed_packs"] for result in collected) > 0
    for backup, image in zip(backups, images, strict=True):
        out_file = site.directory / backup
        site.ctl("export", backup, "vda", str(out_file))
        assert out_file.read_bytes() == image.read_bytes()
    assert site.json("verify", "--data")["sound"] is True


def test_a_killed_daemon_leaves_a_repository_that_works(site: Host) -> None:
    image = site.image("disk.raw", 40, size=4 * SIZE)
    kept = site.backup(site.image("kept.raw", 41))
    for arguments in (("import", str(image), "--name=web"), ("gc", "--threshold=0"),
                      ("export", kept, "vda", str(site.directory / "out.raw")), ("verify", "--data"),
                      ("serve", kept, "vda", str(site.directory / "out.sock"))):
        site.json(*arguments, "--no-wait")
        site.stop(signal.SIGKILL)
        site.start()
        assert kept in [item["id"] for item in site.json("list")]
    exported = site.directory / "out.raw"  # it may have been complete before the kill
    assert [path for path in site.directory.glob("out.*") if path != exported] == []
    assert not exported.exists() or exported.read_bytes() == (site.directory / "kept.raw").read_bytes()
    assert site.json("verify", "--data")["sound"] is True
    site.json("gc")
