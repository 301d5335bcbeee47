"""The processes that serve disks on data ports, one for each port."""

import os
import select
import signal
from typing import Any, Callable, Dict, Iterable

from . import memory
from .blocks import Export
from .exports import FILE, Known, exports
from .failures import HelperError, clip
from .nbd import Server
from .params import Params, boolean, devno, hexadecimal, objects, text
from .port import Port, open_port

PORT_WAIT = 15.0  # seconds for a port that was just plugged in
READY_WAIT = 60.0


class Serving:
    """Starts and ends the data servers."""

    def __init__(self, files: bool) -> None:
        """``files``: whether disks may be given as ``file:PATH`` and ports as ``fd:NUMBER``, for tests on any
        machine."""
        self._files = files
        self._children: Dict[str, int] = {}

    def start(self, params: Params, known: Known, close: Callable[[], None]) -> None:
        """Fork a server for ``params`` (port, disks, live, hash_key); returns when it has opened everything. One that
        served the port before is ended first. ``close`` runs in the child."""
        name, disks = text(params, "port"), objects(params, "disks", 1024)
        wanted = {text(disk, "name", 1024): self.device(disk.get("device")) for disk in disks}
        if len(wanted) != len(disks) or not wanted:
            raise HelperError("InvalidArgument", "disks: none, or two of the same name")
        live, key = boolean(params, "live"), hexadecimal(params, "hash_key", 16, 64)
        self._end([name])
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(receive)
                close()
                self._serve(send, name, lambda: exports(wanted, known, live, key))
            finally:
                os._exit(1)
        os.close(send)
        self._children[name] = child
        try:
            answer = _await(receive)
        finally:
            os.close(receive)
        if answer != "ready":
            self._end([name])
            raise HelperError("ServeFailed", answer or "the data server ended")

    def device(self, device: Any) -> str:
        """A request's device, checked."""
        if self._files and isinstance(device, str) and device.startswith(FILE):
            return device
        return devno(device)

    def stop(self) -> None:
        """End all of them: what they have open can be removed afterwards."""
        self._end(list(self._children))

    def _end(self, ports: Iterable[str]) -> None:
        children = [self._children.pop(port) for port in ports if port in self._children]
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except OSError:
                pass
        for child in children:
            try:
                os.waitpid(child, 0)
            except ChildProcessError:
                pass

    def _serve(self, ready: int, name: str, offered: Callable[[], Dict[str, Export]]) -> None:
        memory.set_name(b"vmbk-nbd")
        memory.die_with_parent()
        memory.set_oom_score(0)
        try:
            offers = offered()
            port = Port(int(name[3:])) if self._files and name.startswith("fd:") else open_port(name, PORT_WAIT)
        except (OSError, HelperError) as error:
            os.write(ready, clip("port %s: %s" % (name, error), 1000).encode("utf-8", "replace"))
            os._exit(1)
        os.write(ready, b"ready")
        os.close(ready)
        Server(port, offers).serve()
        os._exit(0)


def _await(descriptor: int) -> str:
    if not select.select([descriptor], [], [], READY_WAIT)[0]:
        return "the data server did not start in time"
    return os.read(descriptor, 4096).decode("utf-8", "replace")
