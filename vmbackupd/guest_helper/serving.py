"""The processes that serve disks on data ports, one for each port."""

import os
import select
import signal
import stat
from typing import Any, Callable, Dict, List, Optional

from . import memory
from .blocks import Blocks
from .dm import Dm, devno_of
from .failures import HelperError, clip
from .image import Device, Image
from .nbd import Server
from .params import Params, devno, objects, text
from .port import Port, open_port
from .snapshot import Snapshot
from .stack import Stack

PORT_WAIT = 15.0  # seconds for a port that was just plugged in
READY_WAIT = 60.0
FILE = "file:"


class Serving:
    """Starts and ends the data servers."""

    def __init__(self, files: bool) -> None:
        """``files``: whether disks may be given as ``file:PATH`` and ports as ``fd:NUMBER``, for tests on any
        machine."""
        self._files = files
        self._children: List[int] = []

    def start(self, params: Params, dm: Optional[Dm], snapshot: Optional[Snapshot], close: Callable[[], None]) -> None:
        """Fork a server for ``params`` (port, disks); returns when it has opened everything. ``close`` runs in the
        child."""
        name, disks = text(params, "port"), objects(params, "disks", 1024)
        wanted = {text(disk, "name", 1024): self._device(disk.get("device")) for disk in disks}
        if len(wanted) != len(disks) or not wanted:
            raise HelperError("InvalidArgument", "disks: none, or two of the same name")
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(receive)
                close()
                self._serve(send, name, wanted, dm, snapshot)
            finally:
                os._exit(1)
        os.close(send)
        self._children.append(child)
        try:
            answer = _await(receive)
        finally:
            os.close(receive)
        if answer != "ready":
            self.stop()
            raise HelperError("ServeFailed", answer or "the data server ended")

    def _device(self, device: Any) -> str:
        if self._files and isinstance(device, str) and device.startswith(FILE):
            return device
        return devno(device)

    def stop(self) -> None:
        """End all of them: what they have open can be removed afterwards."""
        for child in self._children:
            try:
                os.kill(child, signal.SIGKILL)
            except OSError:
                pass
        for child in self._children:
            try:
                os.waitpid(child, 0)
            except ChildProcessError:
                pass
        self._children = []

    def _serve(
        self, ready: int, name: str, wanted: Dict[str, str], dm: Optional[Dm], snapshot: Optional[Snapshot]
    ) -> None:
        memory.set_name(b"vmbk-nbd")
        memory.die_with_parent()
        memory.set_oom_score(0)
        try:
            exports = _exports(wanted, dm, snapshot)
            port = Port(int(name[3:])) if self._files and name.startswith("fd:") else open_port(name, PORT_WAIT)
        except (OSError, HelperError) as error:
            os.write(ready, clip("port %s: %s" % (name, error), 1000).encode("utf-8", "replace"))
            os._exit(1)
        os.write(ready, b"ready")
        os.close(ready)
        Server(port, exports).serve()
        os._exit(0)


def _await(descriptor: int) -> str:
    if not select.select([descriptor], [], [], READY_WAIT)[0]:
        return "the data server did not start in time"
    return os.read(descriptor, 4096).decode("utf-8", "replace")


def _exports(wanted: Dict[str, str], dm: Optional[Dm], snapshot: Optional[Snapshot]) -> Dict[str, Blocks]:
    """Each disk put together from itself and the snapshots of the volumes that lie on it."""
    volumes = snapshot.volumes if snapshot is not None else []
    stack = Stack(dm, {volume.devno: volume.wanted.rows for volume in volumes})
    overlays = [(Device(node(devno_of(volume.snap))), stack.pieces(volume.devno)) for volume in volumes]
    exports = {}
    for name, device in wanted.items():
        if device.startswith(FILE):
            exports[name] = Blocks(Image(Device(device[len(FILE) :])))
        else:
            exports[name] = Blocks(Image(Device(node(device)), overlays, device))
    return exports


def node(number: str) -> str:
    """The kernel's own node of a device. Raises ``HelperError`` when it is another device's."""
    path = "/dev/" + os.path.basename(os.path.realpath("/sys/dev/block/" + number)).replace("!", "/")
    try:
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode) and "%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev)) == number:
            return path
    except OSError:
        pass
    raise HelperError("NoDevice", "there is no device %s" % number)
