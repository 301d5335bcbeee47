"""Served volumes: standard clients read them, at once whatever their size, and no server outlives its owner."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pickle
import random
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import require
from tests.unit.exchange.exchange_support import (
    CHUNK,
    Effects,
    Watcher,
    disk_image,
    run,
    sparse_file,
    stored,
    stored_at_t2,
    tool,
)
from tests.unit.repository.repository_support import make, manifest, reopen, volume
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.nbdimage import NbdSource
from vmbackupd.engine.readable import ReadableSource
from vmbackupd.errors import InvalidArgument, NotFound, ServeFailed, SourceError, TargetRefused
from vmbackupd.exchange import nbdkit_plugin
from vmbackupd.exchange.serve import VolumeServer, hand_over, serve_volume
from vmbackupd.exchange.served import ServeRequest
from vmbackupd.repository import LocalStorage, Manifest, Repository

SIZE = 24 << 20


@pytest.fixture(autouse=True)
def nbdkit_is_here() -> None:
    for program in ("nbdkit", "nbdinfo", "nbdcopy", "qemu-img", "qemu-io"):
        require(program, shutil.which(program) is not None)
    done = subprocess.run(["nbdkit", "--dump-plugin", "python"], capture_output=True, check=False)
    require("nbdkit-plugin-python", done.returncode == 0)


Work = Callable[[VolumeServer], Awaitable[None]]
Serve = Callable[[Repository, Manifest, Work], Effects]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serve ``vda`` while some work is done; afterwards nothing of the server is left."""
    directory = tmp_path / "sockets"
    directory.mkdir()

    def server(repository: Repository, manifest: Manifest, work: Work) -> Effects:
        effects = Effects()

        async def main() -> None:
            path = str(directory / "vda.sock")
            async with VolumeServer(repository, manifest, "vda", path, on_effect=effects) as opened:
                await work(opened)

        run(main())
        assert os.listdir(directory) == [] and effects.pending == []
        return effects

    yield server
    assert os.listdir(directory) == []


async def in_thread(*argv: object) -> str:
    return await asyncio.to_thread(tool, *argv)


@pytest.mark.parametrize("chunk", [4096, CHUNK, 1 << 20])
def test_standard_clients_read_what_was_stored(tmp_path: Path, serve: Serve, chunk: int) -> None:
    image = disk_image(random.Random(chunk), SIZE + 512)
    original = sparse_file(tmp_path / "original.raw", image)
    repository, manifest = stored(tmp_path, image, chunk=chunk)

    async def work(server: VolumeServer) -> None:
        info = json.loads(await in_thread("nbdinfo", "--json", server.uri))["exports"][0]
        assert info["export-size"] == SIZE + 512
        assert info["is_read_only"] and info["can_multi_conn"] and not info["can_trim"] and not info["can_zero"]
        assert info["block_size_preferred"] == chunk
        await in_thread("qemu-img", "compare", "-f", "raw", "-F", "raw", original, server.uri)
        copy = tmp_path / "copy.raw"
        await in_thread("nbdcopy", "--connections=4", server.uri, copy)
        assert copy.read_bytes() == image and copy.stat().st_blocks * 512 < SIZE * 3 // 4 or chunk > CHUNK
        await in_thread("qemu-img", "convert", "-f", "raw", "-O", "qcow2", server.uri, tmp_path / "x.qcow2")
        await in_thread("qemu-img", "compare", "-f", "raw", "-F", "qcow2", original, tmp_path / "x.qcow2")
        told = await in_thread("qemu-io", "-r", "-f", "raw", "-c", "read -v 1 100", server.uri)
        assert "read 100/100 bytes at offset 1" in told

    with repository:
        serve(repository, manifest, work)


def test_block_status_tells_holes_as_the_tree_has_them(tmp_path: Path, serve: Serve) -> None:
    image = disk_image(random.Random(1), SIZE)
    repository, manifest = stored(tmp_path, image)
    chunks = [image[at : at + CHUNK] for at in range(0, SIZE, CHUNK)]

    async def work(server: VolumeServer) -> None:
        extents = json.loads(await in_thread("nbdinfo", "--map", "--json", server.uri))
        found = [bool(extent["type"]) for extent in extents for _ in range(extent["length"] // CHUNK)]
        assert found == [chunk.count(0) == len(chunk) for chunk in chunks]
        assert {extent["type"] for extent in extents} == {0, 3}  # data; hole, zero

    with repository:
        serve(repository, manifest, work)


def test_a_volume_that_is_reverted_at_restore_time_is_served_as_of_t1(tmp_path: Path, serve: Serve) -> None:
    repository, manifest, expected = stored_at_t2(tmp_path, random.Random(2), 8 << 20)
    original = sparse_file(tmp_path / "t1.raw", expected)

    async def work(server: VolumeServer) -> None:
        await in_thread("qemu-img", "compare", "-f", "raw", "-F", "raw", original, server.uri)
        await in_thread("nbdcopy", server.uri, tmp_path / "copy.raw")
        assert (tmp_path / "copy.raw").read_bytes() == expected

    with repository:
        serve(repository, manifest, work)


def big(tmp_path: Path, size: int) -> tuple[Repository, Manifest]:
    """A sparse image with a little data at its beginning, middle and end."""
    repository = make(tmp_path / "repository", chunk_size=CHUNK, fanout=256)
    with repository.writer("big-1") as writer:
        sink = writer.image(size)
        for at in (0, size // 2, size - CHUNK):
            sink.write(at, random.Random(at).randbytes(CHUNK))
        published = manifest("big-1", volume("vda", sink.finish(), size))
        writer.publish(published)
    return repository, repository.manifest("big-1")


def test_the_first_byte_of_a_tebibyte_comes_at_once(tmp_path: Path, serve: Serve) -> None:
    repository, manifest = big(tmp_path, 1 << 40)
    times = []

    async def work(server: VolumeServer) -> None:
        read = f"read -P {random.Random(1 << 39).randbytes(CHUNK)[0]} {1 << 39} 1"
        await in_thread("qemu-io", "-r", "-f", "raw", "-c", read, server.uri)
        times.append(time.monotonic() - began)
        extents = json.loads(await in_thread("nbdinfo", "--map", "--json", server.uri))
        assert sum(extent["length"] for extent in extents) == 1 << 40
        assert sum(extent["length"] for extent in extents if extent["type"] == 0) == 3 * CHUNK
        await in_thread("nbdcopy", server.uri, "null:")

    with repository:
        for _ in range(3):  # the machine may be busy with something else
            began = time.monotonic()
            serve(repository, manifest, work)
        assert min(times) < 1.0, f"{times} seconds from nothing to the first byte"


def first_bytes(path: str, offset: int) -> bytes:
    """16 bytes from ``offset`` over a connection of their own."""
    with closing(NbdConnection(unix=path)) as connection:
        return ReadableSource(NbdSource(connection)).read(offset, 16)


async def asleep_in(pid: int, where: str) -> None:
    """Wait until a thread of a process sleeps in this function of the kernel."""
    while not any(where in wchan.read_text() for wchan in Path(f"/proc/{pid}/task").glob("*/wchan")):
        await asyncio.sleep(0.01)


def test_requests_are_served_in_parallel(tmp_path: Path, serve: Serve) -> None:
    """While one request waits for its pack, another of the same connection is answered."""
    image = random.Random(3).randbytes(1 << 20)
    repository, manifest = stored(tmp_path, image)
    packs = list((tmp_path / "repository").glob("packs/*/*"))
    first, other = (next(pack for pack in packs if image[at:][:32] in pack.read_bytes()) for at in (0, len(image) // 2))
    assert first != other
    slow = first.rename(tmp_path / "slow")
    os.mkfifo(first)  # opening it waits

    async def work(server: VolumeServer) -> None:
        waiting = asyncio.create_task(asyncio.to_thread(first_bytes, server.path, 0))
        await asleep_in(server.pid, "wait_for_partner")
        assert await asyncio.to_thread(first_bytes, server.path, len(image) // 2) == image[len(image) // 2 :][:16]
        assert not waiting.done()
        await server.close()
        with pytest.raises(SourceError):
            await waiting

    with repository:
        serve(repository, manifest, work)
    slow.rename(first)


# ---- the socket


def test_only_the_owner_may_connect(tmp_path: Path, serve: Serve) -> None:
    repository, manifest = stored(tmp_path, bytes(CHUNK) + b"x" * CHUNK)

    async def work(server: VolumeServer) -> None:
        found = os.stat(server.path)
        assert stat.S_ISSOCK(found.st_mode) and found.st_mode & 0o777 == 0o600
        assert os.listdir(os.path.dirname(server.path)) and found.st_uid == os.geteuid()

    with repository:
        effects = serve(repository, manifest, work)
    assert ("unlink", str(tmp_path / "sockets" / "vda.sock")) in effects.seen


def test_a_group_may_be_let_in(tmp_path: Path) -> None:
    repository, manifest = stored(tmp_path, b"x" * CHUNK)
    group = grp.getgrgid(1)

    async def main() -> None:
        path = str(tmp_path / "s.sock")
        async with VolumeServer(repository, manifest, "vda", path, on_effect=Effects(), group=group.gr_name):
            found = os.stat(path)
            assert (found.st_mode & 0o777, found.st_gid) == (0o660, 1)

    with repository:
        run(main())
        with pytest.raises(InvalidArgument, match="no group"):
            VolumeServer(repository, manifest, "vda", "/tmp/x", on_effect=Effects(), group="no such group")


def test_a_path_that_is_taken_is_refused_and_a_dead_socket_replaced(tmp_path: Path, serve: Serve) -> None:
    repository, manifest = stored(tmp_path, b"x" * CHUNK)
    path = tmp_path / "sockets" / "vda.sock"

    async def nothing(server: VolumeServer) -> None:
        await in_thread("nbdinfo", server.uri)

    with repository:
        path.write_bytes(b"precious")
        with pytest.raises(TargetRefused, match="vda.sock exists already"):
            run(serve_volume(repository, manifest, "vda", str(path), observer=Watcher(), on_effect=Effects()))
        assert path.read_bytes() == b"precious" and len(os.listdir(path.parent)) == 1
        path.unlink()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            with pytest.raises(TargetRefused, match="vda.sock exists already"):
                run(serve_volume(repository, manifest, "vda", str(path), observer=Watcher(), on_effect=Effects()))
        serve(repository, manifest, nothing)  # nobody listens any more
        for wrong, error in (("relative", InvalidArgument), ("/" + "x" * 120, InvalidArgument)):
            with pytest.raises(error):
                VolumeServer(repository, manifest, "vda", wrong, on_effect=Effects())
        with pytest.raises(TargetRefused, match="does not exist"):
            run(serve_volume(repository, manifest, "vda", "/none/x", observer=Watcher(), on_effect=Effects()))
        with pytest.raises(NotFound, match="no volume 'vdb'"):
            VolumeServer(repository, manifest, "vdb", str(path), on_effect=Effects())


# ---- failures


def test_damage_is_an_error_of_those_bytes_only(tmp_path: Path, serve: Serve) -> None:
    noise = random.Random(4).randbytes(4 << 20)
    repository, manifest = stored(tmp_path, noise)
    packs = (tmp_path / "repository").glob("packs/*/*")
    pack = next(pack for pack in packs if noise[CHUNK : CHUNK + 32] in pack.read_bytes())
    pack.chmod(0o600)
    data = bytearray(pack.read_bytes())
    at = data.find(noise[CHUNK : CHUNK + 32])
    data[at : at + 4] = b"ruin"
    pack.write_bytes(data)

    async def work(server: VolumeServer) -> None:
        with pytest.raises(AssertionError, match="Input/output error"):
            await in_thread("qemu-io", "-r", "-f", "raw", "-c", f"read {CHUNK} 512", server.uri)
        await in_thread("qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", "-c", "read 2M 1M", server.uri)

    with repository:
        serve(repository, manifest, work)


def test_a_server_that_dies_is_told(tmp_path: Path) -> None:
    repository, manifest = stored(tmp_path, b"x" * CHUNK)

    async def main() -> None:
        async with VolumeServer(repository, manifest, "vda", str(tmp_path / "s"), on_effect=Effects()) as server:
            os.kill(server.pid, signal.SIGKILL)
            await server.ended()

    with repository, pytest.raises(ServeFailed, match="ended .status -9"):
        run(main())
    assert os.listdir(tmp_path) == ["repository"]


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    repository, manifest = stored(tmp_path, b"x" * CHUNK)
    with repository:
        shutil.move(tmp_path / "repository", tmp_path / "moved")
        with pytest.raises(ServeFailed, match="did not start: RepositoryMissing: .*mount it"):
            run(serve_volume(repository, manifest, "vda", str(tmp_path / "s"), observer=Watcher(), on_effect=Effects()))
    assert os.listdir(tmp_path) == ["moved"]


def test_an_nbdkit_that_does_not_even_take_its_orders_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, manifest = stored(tmp_path, b"x" * CHUNK)
    monkeypatch.setattr(nbdkit_plugin, "__file__", str(tmp_path / "no such plugin.py"))
    with repository, pytest.raises(ServeFailed, match="did not start: .*nbdkit.*no such plugin.py"):
        run(serve_volume(repository, manifest, "vda", str(tmp_path / "s"), observer=Watcher(), on_effect=Effects()))
    assert os.listdir(tmp_path) == ["repository"]


def test_serving_ends_when_it_is_cancelled(tmp_path: Path) -> None:
    repository, manifest = stored(tmp_path, b"x" * CHUNK)
    effects = Effects()

    async def main() -> None:
        watcher, ready = Watcher(), asyncio.Event()
        watcher.step = lambda name: ready.set() if name == "serve" else None  # type: ignore[method-assign]
        task = asyncio.create_task(
            serve_volume(repository, manifest, "vda", str(tmp_path / "s"), observer=watcher, on_effect=effects)
        )
        await ready.wait()
        await in_thread("nbdinfo", f"nbd+unix:///?socket={tmp_path}/s")
        task.cancel()
        await task

    with repository, pytest.raises(asyncio.CancelledError):
        run(main())
    assert os.listdir(tmp_path) == ["repository"] and effects.pending == []


def owner(directory: str) -> None:
    """A process that serves, tells the server's process id, and waits to be killed."""
    tmp_path = Path(directory)

    async def main() -> None:
        with reopen(tmp_path / "repository") as repository:
            found = repository.manifest("web1-1")
            async with VolumeServer(repository, found, "vda", str(tmp_path / "s"), on_effect=Effects()) as server:
                print(server.pid, flush=True)
                await asyncio.Event().wait()

    asyncio.run(main())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_server_outlives_its_owner(tmp_path: Path, how: signal.Signals) -> None:
    repository, _ = stored(tmp_path, b"x" * CHUNK)
    repository.close()
    code = f"from {__name__} import owner; owner({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            server = os.pidfd_open(int(process.stdout.readline()))
            with socket.socket(socket.AF_UNIX) as client:  # a client that stays does not keep it alive
                client.connect(str(tmp_path / "s"))
                process.send_signal(how)
                assert select.select([server], [], [], 20)[0], "the server is still there"
            os.close(server)
        finally:
            process.kill()


def test_a_server_ends_with_its_socket_where_the_kernel_does_not_end_it(tmp_path: Path) -> None:
    """Its owner may be another thread than the kernel thinks, or die before the server could ask to die with it."""
    repository, manifest = stored(tmp_path, b"x" * CHUNK)
    ours, theirs = socket.socketpair()
    argv = ["nbdkit", "-f", "-r", "-U", str(tmp_path / "s"), "python", nbdkit_plugin.__file__, f"fd={theirs.fileno()}"]
    with repository, subprocess.Popen(argv, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        with ours:
            request = ServeRequest(repository.storage, repository.header, repository.settings, manifest, "vda")
            ours.sendall(hand_over(request))
            assert ours.recv(1) == nbdkit_plugin.READY
        assert process.wait(20) == 0


def test_an_encrypted_repository_is_served_and_its_key_is_in_no_command_line_or_environment(
    tmp_path: Path, serve: Serve
) -> None:
    image = disk_image(random.Random(5), 4 << 20)
    original = sparse_file(tmp_path / "original.raw", image)
    repository, manifest = stored(tmp_path, image, encrypted=True)
    assert repository.header.master is not None and repository.header.hash_key is not None
    secrets = [repository.header.master, repository.header.hash_key, b"web1"]

    async def work(server: VolumeServer) -> None:
        await in_thread("qemu-img", "compare", "-f", "raw", "-F", "raw", original, server.uri)
        for what in ("cmdline", "environ"):
            data = Path(f"/proc/{server.pid}/{what}").read_bytes()
            assert not [secret for secret in secrets if secret in data or secret.hex().encode() in data]

    with repository:
        serve(repository, manifest, work)


def test_a_storage_is_handed_over_by_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = LocalStorage("here")
    assert pickle.loads(pickle.dumps(storage)).place == str(tmp_path / "here")
