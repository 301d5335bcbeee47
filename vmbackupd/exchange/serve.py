"""A volume of a backup over NBD on a unix socket: read-only, lazily, for as long as its owner wants.

The server is nbdkit with its Python plugin, in a process of its own: it has parallel requests, block status and years
of other people's clients behind it. It serves out of the repository, so nothing is copied and the first byte does not
wait for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import grp
import logging
import os
import pickle
import secrets
import socket
import stat
import sys
import sysconfig
from urllib.parse import quote

from vmbackupd.errors import InvalidArgument, ServeFailed, TargetRefused
from vmbackupd.exchange import nbdkit_plugin
from vmbackupd.exchange.observer import Observer
from vmbackupd.exchange.served import ServeRequest
from vmbackupd.exchange.volumes import find_volume
from vmbackupd.host.newfile import OnEffect, Withdraw
from vmbackupd.host.process import Child, CommandFailed
from vmbackupd.repository import Manifest, Repository

START = 60.0  # seconds; a large repository's indexes are opened meanwhile
LAST_WORDS = 5.0  # seconds that a server which is ending may take
ANSWER = 64 * 1024  # bytes of what a server has to say when it cannot start
THREADS = 16  # requests of one connection at once
SOCKET_PATH_LIMIT = 107  # sun_path without its NUL

log = logging.getLogger("exchange.serve")


class VolumeServer:
    """``async with VolumeServer(...) as server``: when the block is entered, clients can connect to ``server.uri``.

    The kernel ends the server process when this one dies, and it ends by itself when the socket it has from us closes,
    so nothing is left whatever dies; the socket file of a killed owner is, until the journal's undo or the next server
    removes it.
    """

    def __init__(
        self,
        repository: Repository,
        manifest: Manifest,
        volume: str,
        path: str,
        *,
        on_effect: OnEffect,
        group: str | None = None,
    ) -> None:
        """``path``: the socket, absolute; its owner may connect, and ``group`` where one is named.

        The manifest's trees must stay in the repository meanwhile. Raises ``InvalidArgument``, ``NotFound``.
        """
        if not path.startswith("/") or path.endswith("/") or "\0" in path:
            raise InvalidArgument(f"{path!r} is not the absolute path of a socket")
        find_volume(manifest, volume)
        self._gid = _group(group)
        self._request = ServeRequest(repository.storage, repository.header, repository.settings, manifest, volume)
        self.path = path
        # The server makes its socket where nobody else gets in; it comes to its place with the right permissions.
        self._directory = os.path.join(os.path.dirname(path), f".vmb-{secrets.token_hex(4)}")
        self._inner = os.path.join(self._directory, "s")
        if len(os.fsencode(max(self._inner, path, key=len))) > SOCKET_PATH_LIMIT:
            raise InvalidArgument(f"{path}: this path is too long for a unix socket, choose a shorter one")
        self._on_effect = on_effect
        self._withdraws: list[Withdraw] = []
        self._child: Child | None = None
        self._line: socket.socket | None = None

    async def __aenter__(self) -> VolumeServer:
        try:
            await self._open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def uri(self) -> str:
        """What NBD clients connect to."""
        return f"nbd+unix:///?socket={quote(self.path)}"

    @property
    def pid(self) -> int:
        """The server's process."""
        assert self._child is not None
        return self._child.pid

    async def ended(self) -> None:
        """Wait until the server is gone, which it should not be: raises ``ServeFailed`` then."""
        assert self._child is not None
        while True:
            try:
                status = await self._child.wait(3600)
            except TimeoutError:
                continue
            raise ServeFailed(f"the server of {self.path} ended (status {status}): {self._child.stderr or 'no word'}")

    async def close(self) -> None:
        """End the server and remove the socket. Clients are cut off. Can be called again."""
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._child is not None:
            await self._child.stop("kill", 0)
        while self._withdraws:
            self._withdraws.pop()()

    # ---- the start

    async def _open(self) -> None:
        _make_room(self.path)
        self._effect("rmdir", self._directory)
        os.mkdir(self._directory, 0o700)
        self._effect("unlink", self._inner)
        self._line, theirs = socket.socketpair()
        with theirs:
            try:
                self._child = await Child.spawn(
                    [
                        "nbdkit",
                        "--foreground",
                        "--readonly",
                        "--newstyle",
                        f"--threads={THREADS}",
                        "--log=stderr",
                        "--unix",
                        self._inner,
                        "python",
                        nbdkit_plugin.__file__,
                        f"fd={theirs.fileno()}",
                    ],
                    pass_fds=[theirs.fileno()],
                )
            except CommandFailed as error:
                raise ServeFailed(f"{error}; install nbdkit and its Python plugin") from error
        self._line.setblocking(False)
        await self._hand_over()
        self._publish()

    async def _hand_over(self) -> None:
        """Tell the server what to serve, wait until it does."""
        assert self._line is not None and self._child is not None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(START):
                await loop.sock_sendall(self._line, hand_over(self._request))
                answer = await loop.sock_recv(self._line, ANSWER)
        except TimeoutError:
            answer = f"no answer within {START:g} s".encode()
        except OSError:
            answer = b""  # it is gone
        if answer == nbdkit_plugin.READY:
            return
        reason = answer.decode(errors="replace") or await self._last_words()
        raise ServeFailed(f"the server of {self.path} did not start: {reason}")

    async def _last_words(self) -> str:
        assert self._child is not None
        with contextlib.suppress(TimeoutError):
            await self._child.wait(LAST_WORDS)
        return self._child.stderr or "it ended without a word"

    def _publish(self) -> None:
        """Give the socket its permissions, then its name: never replacing what has come up there meanwhile."""
        if self._gid is not None:
            os.chown(self._inner, -1, self._gid)
        os.chmod(self._inner, 0o600 if self._gid is None else 0o660)
        withdraw = self._effect("unlink", self.path)
        try:
            os.link(self._inner, self.path)
        except OSError as error:
            self._withdraws.pop()
            withdraw()
            raise TargetRefused(f"{self.path} cannot be made: {error.strerror}") from error

    def _effect(self, undo: str, path: str) -> Withdraw:
        """Tell of what will be made; what was made is removed, and the word taken back, at the end."""
        withdraw = self._on_effect(undo, path)

        def take_back() -> None:
            try:
                os.rmdir(path) if undo == "rmdir" else os.unlink(path)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.error("%s could not be removed: %s", path, error)
                return
            withdraw()

        self._withdraws.append(take_back)
        return withdraw


async def serve_volume(
    repository: Repository,
    manifest: Manifest,
    volume: str,
    path: str,
    *,
    observer: Observer,
    on_effect: OnEffect,
    group: str | None = None,
) -> None:
    """Serve until cancelled. Raises as ``VolumeServer`` does, and ``ServeFailed`` when the server ends by itself."""
    observer.step("start-server")
    async with VolumeServer(repository, manifest, volume, path, on_effect=on_effect, group=group) as server:
        observer.step("serve")
        await server.ended()


def hand_over(request: ServeRequest) -> bytes:
    """What a server is sent: this Python and where it imports from (but for the standard library), then the request."""
    paths = sysconfig.get_paths()
    standard = {paths["stdlib"], paths["platstdlib"], os.path.join(paths["platstdlib"], "lib-dynload")}
    path = [os.path.abspath(path) for path in sys.path if path not in standard and not path.endswith(".zip")]
    return pickle.dumps({"python": sys.version_info[:2], "path": path}) + pickle.dumps(request)


def _group(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise InvalidArgument(f"there is no group {name!r} on this host") from None


def _make_room(path: str) -> None:
    """Refuse a path that is taken; remove the socket of a server that is gone."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise TargetRefused(f"directory {directory} does not exist: make it, or name another socket")
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_ISSOCK(found.st_mode) and not _listening(path):
        os.unlink(path)
        return
    raise TargetRefused(f"{path} exists already: remove it, or name another socket")


def _listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(5)
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno != errno.ECONNREFUSED
    return True
