"""forget, prune, gc, verify, keys, export, import, serve as ``vmbackupctl`` processes on a real bus."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.unit.api.support import DEADLINE, RECOVERY_KEY, cli_command, cli_environment, served
from tests.unit.cli.test_commands import ctl, end, only_job, start
from vmbackupd.job.options import (
    ExportOptions,
    GcOptions,
    ImportOptions,
    PruneOptions,
    RestoreOptions,
    ServeOptions,
    VerifyOptions,
)


def test_forget_tells_what_it_removed_and_why(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "forget", "web-1", "web-2")
            assert (done.status, done.err) == (0, "")
            assert done.out.splitlines() == [
                "BACKUP  WHAT     WHY", "web-1   removed  named", "web-2   removed  named", "",
                "0 kept, 2 removed; `vmbackupctl gc` gives their room back",
                "waiting for: reader session 00ff of host-b"]
            done = await ctl(address, "forget", "web-1", "--dry-run")
            assert done.out.splitlines()[-2] == "0 kept, 1 would be removed"
            assert runner.calls == [("forget", ("web-1", "web-2"), False), ("forget", ("web-1",), True)]
            done = await ctl(address, "forget", "none")
            assert (done.status, done.err) == (1, "vmbackupctl: there is no backup none\n")

    asyncio.run(main())


def test_what_the_store_has_locked_is_told(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _):
            done = await ctl(address, "forget", "locked-1", "web-1")
            assert done.status == 0
            assert done.out.splitlines()[-1] == (
                "locked by the store until 2023-11-14 22:13:20Z; a gc after that gives its room back")

    asyncio.run(main())


def test_prune_passes_the_rules_on_and_prints_the_reasons(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "prune", "web", "--keep-last", "1", "--keep-weekly", "0", "--keep-yearly=3",
                             "--dry-run")
            assert done.status == 0, done.err
            assert done.out.splitlines() == [
                "BACKUP  WHAT              WHY", "web-2   kept              keep-last 1",
                "web-1   would be removed  no rule keeps it", "", "1 kept, 1 would be removed"]
            assert runner.calls == [("prune", "web", PruneOptions(
                {"keep_last": 1, "keep_weekly": 0, "keep_yearly": 3}, dry_run=True))]
            done = await ctl(address, "prune", "--json")
            assert runner.calls[-1] == ("prune", None, PruneOptions())
            assert [row["keep"] for row in done.document["decisions"]] == [True, False]

    asyncio.run(main())


def test_protect_and_unprotect(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            assert (await ctl(address, "protect", "web-1")).out == "backup web-1 is protected\n"
            assert (await ctl(address, "unprotect", "web-1")).out == "backup web-1 is not protected any more\n"
            assert (await ctl(address, "protect", "web-1", "--json")).document == {"backup": "web-1", "protected": True}
            assert [call[2] for call in runner.calls] == [True, False, True]

    asyncio.run(main())


def test_gc_tells_what_it_gave_back_and_what_waits(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "gc", "--threshold", "30%")
            assert done.status == 0, done.err
            for words in ("packs removed:    3", "room given back:  5.0 MiB", "packed anew:      4.0 KiB",
                          "waiting for:      reader session 00ff of host-b", "why: mostly waste: 1 packs"):
                assert words in done.out
            assert done.err.splitlines()[-1] == "gc: mark"
            done = await ctl(address, "gc", "--dry-run")
            assert "dry run: nothing was removed" in done.out
            assert runner.calls == [("gc", GcOptions(threshold=0.3)), ("gc", GcOptions(dry_run=True))]

    asyncio.run(main())


def test_gc_is_alone_but_beside_backups_and_says_what_a_cancel_leaves(address: str) -> None:
    async def main() -> None:
        async with served(address, parallel=1) as (manager, runner, _):
            await ctl(address, "backup", "slow", "--no-wait")
            done = await ctl(address, "gc", "--threshold=1", "--no-wait", "--json")
            job = done.document["job"]
            assert [item.state.value for item in manager.jobs.values()] == ["running", "running"]
            done = await ctl(address, "gc")
            assert done.status == 1 and f"job {job} (gc, running) works on it" in done.err
            done = await ctl(address, "cancel", job)
            assert (done.status, done.out) == (0, f"job {job} is cancelled; what it had completed stays\n")

    asyncio.run(main())


def test_verify_sound_and_damaged(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "verify", "--data", "--rate", "50MiB", "--restart")
            assert (done.status, done.out.split()[-2:]) == (0, ["result:", "sound"]), done.err
            assert runner.calls == [("verify", VerifyOptions((), True, 50 << 20, True))]
            done = await ctl(address, "verify", "bad-1")
            assert done.status == 1
            assert "bad-1   vda      65536  64.0 KiB  pack 00ff is damaged" in done.out
            assert done.err.splitlines()[-1] == "vmbackupctl: the repository is damaged"
            done = await ctl(address, "verify", "bad-1", "--json")
            assert (done.status, done.document["damage"][0]["offset"]) == (1, 65536)

    asyncio.run(main())


def test_restore_in_place(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "restore", "web-1", "--in-place")
            assert done.status == 0
            (head,) = [line for line in done.out.splitlines() if line.startswith("VOLUME")]
            assert head.split("  ")[-1].strip() == "WRITTEN" and "HELD BEFORE" in head and "1.0 KiB" in done.out
            assert runner.calls == [("restore", "web-1", RestoreOptions(in_place=True))]

    asyncio.run(main())


def test_export_and_import_with_absolute_paths(address: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "export", "web-1", "vda", "out.qcow2", "--format=qcow2", "--compress", "--force",
                             cwd=tmp_path)
            assert done.status == 0, done.err
            assert "size:   1.0 GiB" in done.out and "format: qcow2" in done.out
            assert runner.calls == [("export", "web-1", "vda", str(tmp_path / "out.qcow2"),
                                     ExportOptions("qcow2", True, True))]
            done = await ctl(address, "export", "web-1", "vda", "out", "--compress", cwd=tmp_path)
            assert done.status == 1 and "only qcow2 can be compressed" in done.err
            done = await ctl(address, "import", "disk.raw", "--name", "old", "--format", "raw", "--volume=sda",
                             "--allow-backing", cwd=tmp_path)
            assert done.status == 0 and "backup:" in done.out and "old-1" in done.out
            assert runner.calls[-1] == ("import", str(tmp_path / "disk.raw"), "old", ImportOptions("raw", "sda", True))

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_announces_the_socket_and_ends_with_the_command(address: str, number: int) -> None:
    async def main() -> None:
        async with served(address) as (manager, runner, _):
            process = await start(address, "serve", "web-1", "vda", "/run/a b.sock", "--group", "kvm")
            assert process.stdout is not None
            uri = await asyncio.wait_for(process.stdout.readline(), DEADLINE)
            assert uri == b"nbd+unix:///?socket=/run/a%20b.sock\n"
            assert (await asyncio.wait_for(process.stdout.readline(), DEADLINE)).endswith(b"Ctrl-C ends it\n")
            job = only_job(manager)
            process.send_signal(number)
            done = await end(process)
            assert (done.status, done.err, job.state) == (0, "", "cancelled")
            assert runner.calls == [("serve", "web-1", "vda", ServeOptions("/run/a b.sock", "kvm"))]

    asyncio.run(main())


def test_serve_in_the_background_and_its_errors(address: str) -> None:
    async def main() -> None:
        async with served(address) as (manager, _, _):
            done = await ctl(address, "serve", "web-1", "vda", "--no-wait", "--json")
            job = only_job(manager)
            assert (done.status, done.document) == (0, {
                "job": job.id, "socket": "/run/own.sock", "uri": "nbd+unix:///?socket=/run/own.sock"})
            assert job.state == "running"
            done = await ctl(address, "serve", "web-1", "vda", "/s", "--no-wait")
            assert f"`vmbackupctl cancel {list(manager.jobs)[-1]}` ends it" in done.out
            done = await ctl(address, "serve", "web-1", "vdb", "/s")
            assert (done.status, "works on it" in done.err) == (1, True)
            done = await ctl(address, "serve", "none", "vda")
            assert (done.status, done.out, done.err) == (1, "", "vmbackupctl: there is no backup none\n")

    asyncio.run(main())


def test_an_encrypted_repository_and_its_recovery_key_once(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "repository", "init", "--encrypt")
            assert done.status == 0, done.err
            assert f"recovery key: {RECOVERY_KEY}" in done.out and "not shown again" in done.out
            assert "keys:      0011223344556677 (keyfile)" in done.out
            done = await ctl(address, "repository", "init", "--encrypt", "--no-recovery-key", "--json")
            assert "recovery_key" not in done.document
            assert runner.calls == [("init", True, True), ("init", True, False)]
            done = await ctl(address, "repository", "recovery-key", "--label", "the safe", "--json")
            assert done.document["recovery_key"] == RECOVERY_KEY
            assert (done.document["kind"], done.document["label"]) == ("recovery", "the safe")

    asyncio.run(main())


def test_keys_are_listed_added_and_revoked(address: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "repository", "keys", "list")
            assert done.out.splitlines()[1].split() == [
                "0011223344556677", "keyfile", "2023-11-14", "22:13:20Z", "the", "vault"]
            secret = tmp_path / "passphrase"
            secret.write_bytes(b"correct horse\n")
            done = await ctl(address, "repository", "keys", "add", "--passphrase-file", str(secret), "--json")
            assert (done.status, done.document["kind"]) == (0, "passphrase")
            _, options, passphrase, unlock = runner.calls[-1]
            assert (options.kind, passphrase, unlock) == ("passphrase", b"correct horse", b"")
            assert "horse" not in repr(options)
            done = await ctl(address, "repository", "keys", "add", "--key-file", "k", "--unlock", str(secret),
                             cwd=tmp_path)
            _, options, _, unlock = runner.calls[-1]
            assert (options.kind, options.path, unlock) == ("keyfile", str(tmp_path / "k"), b"correct horse")
            done = await ctl(address, "repository", "keys", "add", "--credential", "key")
            assert runner.calls[-1][1].name == "key"
            done = await ctl(address, "repository", "keys", "revoke", "0011223344556677")
            assert done.out == "key 0011223344556677 does not open the repository any more\n"

    asyncio.run(main())


def test_a_passphrase_is_asked_for_twice_on_the_terminal_and_never_shown(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            done = await ctl(address, "repository", "keys", "add", "--passphrase")
            assert (done.status, "no terminal to ask for the passphrase" in done.err) == (1, True)
            seen, status = await asyncio.to_thread(on_terminal, address, ["secret", "secret"])
            assert status == 0, seen
            assert "secret" not in seen and "passphrase again:" in seen
            assert runner.calls[-1][2] == b"secret"
            seen, status = await asyncio.to_thread(on_terminal, address, ["secret", "sekret"])
            assert (status, "was not the same twice" in seen) == (1, True)

    asyncio.run(main())


def on_terminal(address: str, answers: list[str]) -> tuple[str, int]:
    """``keys add --passphrase`` on a terminal of its own, typed ``answers`` to its questions."""
    main, terminal = os.openpty()
    # A session of its own: getpass opens the controlling terminal, which would be ours.
    process = subprocess.Popen(["setsid", "--ctty", *cli_command("repository", "keys", "add", "--passphrase")],
                               env=cli_environment(address), stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = ""
    try:
        while True:
            try:
                part = os.read(main, 4096).decode()
            except OSError:  # nobody has the terminal open any more
                break
            seen += part
            if part.endswith(": ") and answers:
                os.write(main, answers.pop(0).encode() + b"\n")
    finally:
        os.close(main)
    return seen, process.wait(DEADLINE)


KEYS_ADD = ("repository", "keys", "add")


@pytest.mark.parametrize("arguments", [
    ("forget",), ("prune", "--keep-last", "-1"), ("prune", "--keep-daily=x"), ("verify", "--rate", "50MiB"),
    ("verify", "--data", "--rate", "0"), ("verify", "--data", "--rate", "fast"), ("gc", "--threshold", "2"),
    ("import", "f"), ("export", "b", "v", "f", "--format", "vmdk"), ("protect",), KEYS_ADD,
    (*KEYS_ADD, "--passphrase", "--key-file", "f"), (*KEYS_ADD, "--passphrase=secret"),
])
def test_wrong_usage_is_exit_2(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(cli_command(*arguments), env=cli_environment("unix:path=/nowhere"), capture_output=True,
                          check=False)
    assert done.returncode == 2
    assert b"usage: vmbackupctl" in done.stderr
