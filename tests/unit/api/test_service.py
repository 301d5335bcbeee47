"""The D-Bus API, seen by a foreign client on a real bus."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from dbus_fast import Message, MessageType, Variant

from tests.unit.api.support import DEADLINE, ROOT_DIRECTORY, BusDaemon, Peer, peer, served
from vmbackupd import __version__
from vmbackupd.api import secret as secret_module
from vmbackupd.api.bus import BusUnavailable, connect
from vmbackupd.api.names import BUS_NAME, JOB, MANAGER, ROOT
from vmbackupd.api.service import Service
from vmbackupd.job import manager as manager_module
from vmbackupd.job.manager import JobManager
from vmbackupd.job.options import (
    BackupOptions,
    ExportOptions,
    GcOptions,
    ImportOptions,
    PruneOptions,
    RestoreOptions,
    VerifyOptions,
)
from vmbackupd.model import RevertMode

PROPERTIES = "org.freedesktop.DBus.Properties"
OBJECT_MANAGER = "org.freedesktop.DBus.ObjectManager"
ERROR = "org.vmbackupd1.Error."


async def properties(client: Peer, path: str) -> dict[str, Any]:
    values = await client.call(path, PROPERTIES, "GetAll", "s", JOB)
    return {name: value.value for name, value in values.items()}


async def finished(client: Peer, path: str) -> str:
    signal = await client.signal(lambda message: message.path == path and message.member == "Finished")
    return str(signal.body[0])


def test_a_backup_from_call_to_finished(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), peer(address) as client:
            await client.listen()
            path = await client.manager("Backup", "s", "web", revert=Variant("s", "both"),
                                        allow_uncovered=Variant("as", ["sdb"]), freeze_budget=Variant("d", 2.5))
            assert path.startswith("/org/vmbackupd1/job/j")
            assert await finished(client, path) == "succeeded"
            assert runner.calls == [("backup", "web", BackupOptions(RevertMode.BOTH, ("sdb",), 2.5))]
            values = await properties(client, path)
            assert values["Id"] == path.rpartition("/")[2]
            assert [values[name] for name in ("Kind", "VM", "State", "Step")] == ["backup", "web", "succeeded", "seal"]
            assert list(values["Progress"]) == [1000, 1000]
            assert json.loads(values["Result"])["backup"] == "web-1"
            assert values["ErrorName"] == values["ErrorMessage"] == ""
            assert 0 < values["Created"] <= values["Ended"]

    asyncio.run(main())


def test_changes_are_announced_before_finished(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _), peer(address) as client:
            await client.listen()
            path = await client.manager("Backup", "s", "gaps")
            await finished(client, path)
            steps, last = [], {}
            for message in client.signals:
                if message.path == path and message.member == "PropertiesChanged":
                    assert message.body[0] == JOB
                    last = {name: value.value for name, value in message.body[1].items()}
                    steps += [last["Step"]] if "Step" in last else []
            assert steps == ["inspect", "passthrough-copy", "seal"]
            assert last["State"] == "succeeded"
            assert json.loads(last["Result"])["uncovered"] == ["serial:sdb"]
            assert client.signals[-1].member == "Finished"

    asyncio.run(main())


def test_the_object_manager_announces_and_lists_jobs_at_the_root(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager_module, "HISTORY", 1)

    async def main() -> None:
        async with served(address) as (_, _, _), peer(address) as client:
            await client.listen()
            first = await client.manager("Backup", "s", "web")
            await finished(client, first)
            second = await client.manager("Backup", "s", "web")
            await finished(client, second)
            added = [message for message in client.signals if message.member == "InterfacesAdded"]
            assert [(message.path, message.body[0]) for message in added] == [(ROOT, first), (ROOT, second)]
            assert added[0].body[1][JOB]["Kind"].value == "backup"
            removed = await client.signal(lambda message: message.member == "InterfacesRemoved")
            assert (removed.path, removed.body) == (ROOT, [first, [JOB]])
            objects = await client.call(ROOT, OBJECT_MANAGER, "GetManagedObjects")
            assert list(objects) == [second]
            assert objects[second][JOB]["State"].value == "succeeded"

    asyncio.run(main())


def test_cancel_undoes_before_it_finishes(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), peer(address) as client:
            await client.listen()
            runner.undone.clear()
            path = await client.manager("Backup", "s", "slow")
            await asyncio.wait_for(runner.running.wait(), DEADLINE)
            await client.call(path, JOB, "Cancel", "a{sv}", {})
            await asyncio.wait_for(runner.undoing.wait(), DEADLINE)
            await client.call(path, JOB, "Cancel", "a{sv}", {})
            assert (await properties(client, path))["State"] == "cancelling"
            runner.undone.set()
            assert await finished(client, path) == "cancelled"
            assert (await properties(client, path))["ErrorName"] == f"{ERROR}Cancelled"
            name, text = await client.error(path, JOB, "Cancel", "a{sv}", {})
            assert (name, "has already cancelled" in text) == (f"{ERROR}InvalidArgument", True)

    asyncio.run(main())


@pytest.mark.parametrize(("vm", "code", "text"), [
    ("none", "NotFound", "there is no VM none"),
    ("lun", "UncoveredVolume", "sdb is passed through"),
    ("cold", "FreezeBudgetExceeded", "7.1 s"),
    ("bug", "Failed", "ZeroDivisionError: a bug"),
])
def test_a_failed_job_tells_its_error(address: str, vm: str, code: str, text: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _), peer(address) as client:
            await client.listen()
            path = await client.manager("Backup", "s", vm)
            assert await finished(client, path) == "failed"
            values = await properties(client, path)
            assert values["ErrorName"] == ERROR + code
            assert text in values["ErrorMessage"]

    asyncio.run(main())


@pytest.mark.parametrize(("member", "arguments", "options", "words"), [
    ("Backup", ("web",), {"revrt": Variant("s", "backup")},
     ["'revrt'", "allow_uncovered, freeze_budget, full, revert, t2"]),
    ("Backup", ("web",), {"revert": Variant("b", True)}, ["revert", "'b'", "'s'"]),
    ("Backup", ("web",), {"revert": Variant("s", "never")}, ["'never'", "backup, restore, both"]),
    ("Backup", ("web",), {"freeze_budget": Variant("d", -1.0)}, ["freeze_budget", "above zero"]),
    ("Backup", ("web",), {"freeze_budget": Variant("d", float("nan"))}, ["freeze_budget"]),
    ("Backup", ("",), {}, ["no name"]),
    ("Inspect", ("web",), {"deep": Variant("b", True)}, ["'deep'", "no options"]),
    ("Restore", ("web-1",), {"directory": Variant("s", "here")}, ["absolute", "'here'"]),
    ("Restore", ("web-1",), {"volumes": Variant("a{ss}", {"wwn:1": "disk"})}, ["'wwn:1'", "'disk'"]),
    ("Restore", ("web-1",), {"volumes": Variant("as", ["wwn:1=disk"])}, ["volumes", "'a{ss}'"]),
    ("Restore", ("web-1",), {"revert": Variant("s", "both")}, ["not both"]),
    ("ListBackups", ("",), {"after": Variant("s", "gone")}, ["'gone'"]),
    ("ListBackups", ("",), {"limit": Variant("s", "1")}, ["limit"]),
    ("Prune", ("web",), {"keep_first": Variant("u", 1)}, ["'keep_first'", "keep_last"]),
    ("Prune", ("web",), {"keep_last": Variant("i", -1)}, ["keep_last", "'i'"]),
    ("AddKey", ("password",), {}, ["'password'", "keyfile, credential, passphrase, recovery"]),
    ("AddKey", ("passphrase",), {"secret": Variant("s", "secret")}, ["secret", "'h'"]),
    ("AddKey", ("keyfile",), {"path": Variant("s", "key")}, ["absolute", "'key'"]),
    ("AddKey", ("keyfile",), {"name": Variant("s", "key")}, ["keyfile", "needs path"]),
])
def test_wrong_arguments_are_refused_by_name(address: str, member: str, arguments: tuple[str, ...],
                                             options: dict[str, Variant], words: list[str]) -> None:
    async def main() -> None:
        async with served(address) as (manager, _, _), peer(address) as client:
            name, text = await client.manager_error(member, "s", *arguments, **options)
            assert name == f"{ERROR}InvalidArgument"
            assert [word for word in words if word not in text] == []
            assert not manager.jobs

    asyncio.run(main())


@pytest.mark.parametrize(("member", "signature", "arguments", "options", "words"), [
    ("Forget", "as", ([],), {}, ["no name"]),
    ("Forget", "as", (["web-1", ""],), {}, ["no name"]),
    ("CollectGarbage", "", (), {"threshold": Variant("d", 30.0)}, ["0 to 1", "30.0"]),
    ("Verify", "as", ([],), {"rate": Variant("u", 5)}, ["data as well"]),
    ("Export", "sss", ("web-1", "vda", "out"), {}, ["absolute", "'out'"]),
    ("Export", "sss", ("web-1", "vda", "/out"), {"format": Variant("s", "vmdk")}, ["'vmdk'", "raw, qcow2"]),
    ("Export", "sss", ("web-1", " ", "/out"), {}, ["the volume has no name"]),
    ("Import", "ss", ("/disk", ""), {}, ["no name"]),
    ("Serve", "ss", ("web-1", "vda"), {"socket": Variant("s", "s.sock")}, ["absolute"]),
    ("Serve", "ss", ("web-1", "vda"), {"group": Variant("s", "kvm")}, ["needs a socket"]),
])
def test_wrong_arguments_of_repository_care_are_refused_by_name(
        address: str, member: str, signature: str, arguments: tuple[Any, ...], options: dict[str, Variant],
        words: list[str]) -> None:
    async def main() -> None:
        async with served(address) as (manager, _, _), peer(address) as client:
            name, text = await client.manager_error(member, signature, *arguments, **options)
            assert name == f"{ERROR}InvalidArgument"
            assert [word for word in words if word not in text] == []
            assert not manager.jobs

    asyncio.run(main())


def test_care_of_the_repository_over_the_bus(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), peer(address) as client:
            await client.listen()
            for member, signature, arguments, options in (
                ("Forget", "as", (["web-1"],), {"dry_run": Variant("b", True)}),
                ("Prune", "s", ("web",), {"keep_last": Variant("u", 3)}),
                ("CollectGarbage", "", (), {"threshold": Variant("d", 0.25)}),
                ("Verify", "as", (["web-1"],), {"data": Variant("b", True), "rate": Variant("t", 1 << 40)}),
                ("Export", "sss", ("web-1", "vda", "/out"), {"format": Variant("s", "qcow2")}),
                ("Import", "ss", ("/disk", "old"), {}),
            ):
                path = await client.manager(member, signature, *arguments, **options)
                assert await finished(client, path) == "succeeded"
            assert runner.calls == [
                ("forget", ("web-1",), True), ("prune", "web", PruneOptions({"keep_last": 3})),
                ("gc", GcOptions(threshold=0.25)), ("verify", VerifyOptions(("web-1",), True, 1 << 40)),
                ("export", "web-1", "vda", "/out", ExportOptions("qcow2")), ("import", "/disk", "old", ImportOptions())]
            path = await client.manager("Serve", "ss", "web-1", "vda", socket=Variant("s", "/s.sock"))
            assert (await properties(client, path))["Step"] == "serving /s.sock"
            await client.call(path, JOB, "Cancel", "a{sv}", {})
            assert await finished(client, path) == "cancelled"
            assert json.loads(await client.manager("Protect", "sb", "web-1", True)) == {
                "backup": "web-1", "protected": True}
            assert json.loads(await client.manager("ListKeys"))[0]["kind"] == "keyfile"
            assert json.loads(await client.manager("RevokeKey", "s", "00ff")) == {"revoked": "00ff"}

    asyncio.run(main())


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_secrets_travel_in_descriptors_which_are_closed_whatever_happens(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), peer(address) as client:
            before = descriptors()

            async def add_key(kind: str, secret: bytes, **options: Variant) -> Message:
                reading, writing = os.pipe()
                os.write(writing, secret)
                os.close(writing)
                try:
                    return await client.raw(ROOT, MANAGER, "AddKey", "sa{sv}", kind, {
                        "secret": Variant("h", 0), **options}, descriptors=[reading])
                finally:
                    os.close(reading)

            assert json.loads((await add_key("passphrase", b"horse")).body[0])["kind"] == "passphrase"
            assert runner.calls[-1][2] == b"horse"
            for reply, words in (
                (await add_key("passphrase", b""), "is empty"),
                (await add_key("keyfile", b"horse"), "keyfile needs path"),
                (await add_key("passphrase", b"horse", explode=Variant("b", True)), "unknown option 'explode'"),
                (await client.raw(ROOT, MANAGER, "ListMachines", "a{sv}", {"x": Variant("h", 0)}, descriptors=[0]),
                 "no options"),
                (await client.raw(ROOT, MANAGER, "Explode", "h", 0, descriptors=[0]), "Explode"),
            ):
                assert reply.message_type is MessageType.ERROR and words in reply.body[0]
                assert "horse" not in reply.body[0]
            assert descriptors() == before

    asyncio.run(main())


def test_a_secret_that_never_ends_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_module, "TIMEOUT", 0.2)

    async def main() -> None:
        async with served(address) as (_, runner, _), peer(address) as client:
            reading, writing = os.pipe()
            try:
                reply = await client.raw(ROOT, MANAGER, "AddKey", "sa{sv}", "passphrase", {"secret": Variant("h", 0)},
                                         descriptors=[reading])
            finally:
                os.close(reading)
                os.close(writing)
            assert (reply.error_name, "is not ready" in reply.body[0]) == (f"{ERROR}InvalidArgument", True)
            assert runner.calls == []

    asyncio.run(main())


def test_one_job_for_each_vm(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), peer(address) as client:
            await client.listen()
            path = await client.manager("Backup", "s", "slow")
            name, text = await client.manager_error("Backup", "s", "slow")
            assert (name, path.rpartition("/")[2] in text) == (f"{ERROR}Busy", True)
            await asyncio.wait_for(runner.running.wait(), DEADLINE)
            other = await client.manager("Backup", "s", "slow-alias")  # the same VM under its other name
            assert await finished(client, other) == "failed"
            assert (await properties(client, other))["ErrorName"] == f"{ERROR}Busy"
            runner.go.set()
            assert await finished(client, path) == "succeeded"

    asyncio.run(main())


def test_restore_inspect_recover_and_listings(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), peer(address) as client:
            await client.listen()
            yes = Variant("b", True)
            path = await client.manager("Restore", "s", "web-1", name=Variant("s", "new"), directory=Variant("s", "/d"),
                                        volumes=Variant("a{ss}", {"wwn:1": "iscsi://h/i/1"}), dry_run=yes, force=yes,
                                        revert=Variant("s", "restore"))
            assert await finished(client, path) == "succeeded"
            assert runner.calls[-1] == ("restore", "web-1", RestoreOptions(
                "new", "/d", {"wwn:1": "iscsi://h/i/1"}, dry_run=True, force=True, revert=RevertMode.RESTORE))
            path = await client.manager("Inspect", "s", "web")
            assert await finished(client, path) == "succeeded"
            assert json.loads((await properties(client, path))["Result"])["coverage"][0]["device"] == "vda"
            path = await client.manager("Recover")
            assert await finished(client, path) == "succeeded"
            assert runner.calls[-1] == ("recover", frozenset())
            assert json.loads(await client.manager("ListMachines"))[0]["name"] == "web"
            assert json.loads(await client.manager("ShowBackup", "s", "web-1"))["freeze_ms"] == 12.5
            assert (await client.manager_error("ShowBackup", "s", "x"))[0] == f"{ERROR}NotFound"
            assert json.loads(await client.manager("InitRepository"))["id"] == "r1"
            assert (await client.manager_error("RepositoryInfo"))[0] == f"{ERROR}RepositoryMissing"
            assert (await client.call(ROOT, PROPERTIES, "Get", "ss", MANAGER, "Version")).value == __version__

    asyncio.run(main())


def test_pages_of_a_listing(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _), peer(address) as client:
            runner.backups = [{"id": f"b{n}", "vm": "web" if n % 2 else "db"} for n in range(10)]

            async def ids(vm: str, **options: Variant) -> list[str]:
                return [item["id"] for item in json.loads(await client.manager("ListBackups", "s", vm, **options))]

            assert len(await ids("")) == 10
            assert await ids("", limit=Variant("u", 2)) == ["b0", "b1"]
            assert await ids("", limit=Variant("u", 2), after=Variant("s", "b1")) == ["b2", "b3"]
            assert await ids("", after=Variant("s", "b9")) == []
            assert await ids("web", limit=Variant("u", 2)) == ["b1", "b3"]

    asyncio.run(main())


def test_a_large_reply_and_many_signals_do_not_cost_the_connection(address: str) -> None:
    """dbus-fast alone drops off the bus when it sends while the socket is full."""
    async def main() -> None:
        async with served(address) as (manager, runner, bus), peer(address) as client:
            await client.listen()
            runner.backups = [{"id": f"b{n}", "vm": "x" * 1000} for n in range(4000)]
            path = await client.manager("Backup", "s", "slow")
            await asyncio.wait_for(runner.running.wait(), DEADLINE)
            job = manager.jobs[path.rpartition("/")[2]]
            listing = asyncio.ensure_future(client.manager("ListBackups", "s", ""))
            for n in range(3000):
                job.observer.step(f"step {n}")
                if n % 500 == 0:
                    await asyncio.sleep(0)
            assert len(json.loads(await asyncio.wait_for(listing, DEADLINE))) == 4000
            runner.go.set()
            assert await finished(client, path) == "succeeded"
            assert bus.connected
            steps = [message.body[1]["Step"].value for message in client.signals
                     if message.path == path and message.member == "PropertiesChanged" and "Step" in message.body[1]]
            assert [step for step in steps if step.startswith("step ")] == [f"step {n}" for n in range(3000)]

    asyncio.run(main())


def test_texts_from_a_guest_do_not_break_a_reply(address: str) -> None:
    async def main() -> None:
        async with served(address) as (manager, runner, _), peer(address) as client:
            await client.listen()
            path = await client.manager("Backup", "s", "slow")
            await asyncio.wait_for(runner.running.wait(), DEADLINE)
            manager.jobs[path.rpartition("/")[2]].observer.warning("name \udcff with \0 in it")
            runner.go.set()
            await finished(client, path)
            assert (await properties(client, path))["Warnings"] == ["name \\udcff with \\0 in it"]

    asyncio.run(main())


def test_introspection_is_what_is_checked_in(address: str) -> None:
    def shape(interface: ElementTree.Element) -> dict[str, Any]:
        return {
            "methods": {method.get("name"): [
                (arg.get("type"), arg.get("direction"), arg.get("name") if arg.get("direction") == "in" else None)
                for arg in method.iter("arg")] for method in interface.iter("method")},
            "signals": {signal.get("name"): [arg.get("type") for arg in signal.iter("arg")]
                        for signal in interface.iter("signal")},
            "properties": {prop.get("name"): (prop.get("type"), prop.get("access"))
                           for prop in interface.iter("property")},
        }

    async def main() -> None:
        async with served(address) as (_, _, _), peer(address) as client:
            await client.listen()
            path = await client.manager("Inspect", "s", "web")
            await finished(client, path)
            checked_in = ElementTree.parse(ROOT_DIRECTORY / "packaging/dbus/org.vmbackupd1.xml").getroot()
            expected = {node.get("name"): shape(node) for node in checked_in.iter("interface")}
            assert set(expected) == {MANAGER, JOB}
            for object_path, interface in ((ROOT, MANAGER), (path, JOB)):
                live = ElementTree.fromstring(await client.call(
                    object_path, "org.freedesktop.DBus.Introspectable", "Introspect"))
                found = {node.get("name"): shape(node) for node in live.iter("interface")}
                assert found[interface] == expected[interface]
                assert OBJECT_MANAGER in found

    asyncio.run(main())


async def run(*command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output, _ = await asyncio.wait_for(process.communicate(), DEADLINE)
    assert process.returncode is not None
    return process.returncode, output.decode()


def test_busctl_finds_its_way(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _):
            status, output = await run("busctl", f"--address={address}", "call", BUS_NAME, ROOT, MANAGER, "Backup",
                                       "sa{sv}", "web", "1", "revert", "s", "restore")
            assert status == 0 and "/org/vmbackupd1/job/j" in output
            status, output = await run("busctl", f"--address={address}", "tree", BUS_NAME)
            assert status == 0 and "/org/vmbackupd1/job/j" in output
            status, output = await run("busctl", f"--address={address}", "introspect", BUS_NAME, ROOT)
            assert status == 0 and ".ListBackups" in output

    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_user_is_refused(address: str) -> None:
    async def main() -> None:
        async with served(address) as (manager, _, _):
            for member, arguments in (("Backup", ("sa{sv}", "web", "0")), ("ListMachines", ("a{sv}", "0"))):
                status, output = await run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "busctl",
                                           f"--address={address}", "call", BUS_NAME, ROOT, MANAGER, member, *arguments)
                assert status != 0 and "only root may" in output
            assert not manager.jobs

    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_the_bus_policy_lets_only_root_in() -> None:
    policy = (ROOT_DIRECTORY / "packaging/dbus/org.vmbackupd1.conf").read_text()
    extra = policy[policy.index("<busconfig>") + len("<busconfig>"):policy.index("</busconfig>")]

    async def main(address: str) -> None:
        async with served(address) as (_, _, _):
            call = ("busctl", f"--address={address}", "call", BUS_NAME, ROOT, MANAGER, "ListMachines", "a{sv}", "0")
            assert (await run(*call))[0] == 0
            status, output = await run("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *call)
            assert status != 0 and "denied" in output.lower()

    with BusDaemon(extra) as bus:
        asyncio.run(main(bus.address))


def test_a_second_service_does_not_get_the_name(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, runner, _):
            bus = await connect(address)
            try:
                with pytest.raises(BusUnavailable, match="another vmbackupd"):
                    await Service(bus, JobManager(runner)).start()
            finally:
                await bus.close()

    asyncio.run(main())


def test_no_bus_is_an_error_that_names_it(tmp_path: Path) -> None:
    async def main() -> None:
        for wrong in (f"unix:path={tmp_path}/bus", "nonsense", "unix:abstract="):
            with pytest.raises(BusUnavailable, match=wrong.partition("=")[0]):
                await connect(wrong)

    asyncio.run(main())


def test_jobs_go_on_when_the_bus_dies() -> None:
    async def main(bus_daemon: BusDaemon) -> None:
        async with served(bus_daemon.address) as (manager, runner, bus), peer(bus_daemon.address) as client:
            path = await client.manager("Backup", "s", "slow")
            await asyncio.wait_for(runner.running.wait(), DEADLINE)
            bus_daemon.kill()
            await asyncio.wait_for(bus.gone(), DEADLINE)
            runner.go.set()
            job = manager.jobs[path.rpartition("/")[2]]
            await asyncio.wait_for(job.wait(), DEADLINE)
            assert job.state == "succeeded"

    with BusDaemon() as bus_daemon:
        asyncio.run(main(bus_daemon))


def test_an_unknown_method_is_no_internal_error(address: str) -> None:
    async def main() -> None:
        async with served(address) as (_, _, _), peer(address) as client:
            reply = await client.raw(ROOT, MANAGER, "Explode")
            assert reply.message_type is MessageType.ERROR
            assert reply.error_name == "org.freedesktop.DBus.Error.UnknownMethod"

    asyncio.run(main())


