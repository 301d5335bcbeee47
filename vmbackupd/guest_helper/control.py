"""Serves the host's requests: one JSON object a line, one after the other, in one process."""

import json
import os
import platform
import sys
import time
from typing import Any, Callable, Dict, List, Optional, Set

from . import HELPER_VERSION, PROTOCOL, devices, memory, release, thin, watchdog
from .bitmaps import CHUNK
from .capture import LANES, Capture
from .dm import Dm, present
from .exports import Disks, Known
from .failures import HelperError, clip
from .params import Params, boolean, devno, integer, job_id, number, objects, text
from .port import PAUSE, Port, PortClosed, PortGone, hello_in
from .serving import Serving
from .snapshot import Snapshot
from .tracker import Trackers
from .watchdog import Watchdog

MAX_LINE = 4 << 20
ANSWER_DEADLINE = 30.0  # seconds for the host to take an answer


class Control:
    """The helper's state: at most one job, with its snapshots and data servers."""

    def __init__(self, port: Port, lease: float, files: bool = False) -> None:
        """``lease``: seconds of the host's silence after which everything is undone and the helper ends."""
        self._port, self._lease = port, lease
        self._dm: Optional[Dm] = None
        self._snapshot: Optional[Snapshot] = None
        self._guard: Optional[Watchdog] = None
        self._trackers = Trackers()
        self._capture: Optional[Capture] = None
        self._thin: Dict[str, bytearray] = {}
        self._touched: Set[str] = set()
        self._serving = Serving(files)
        self._heard = time.monotonic()
        self._in_session = False
        self._ended = False
        self._methods: Dict[str, Callable[[Params], Dict[str, Any]]] = {
            "identify": self._identify,
            "ping": self._ping,
            "probe": self._probe,
            "prepare": self._prepare,
            "arm": self._arm,
            "snap": self._snap,
            "prepare_capture": self._prepare_capture,
            "capture": self._take_capture,
            "touch_pools": self._touch_pools,
            "compare_pools": self._compare_pools,
            "disarm": self._disarm,
            "status": self._status,
            "serve": self._serve,
            "track": self._trackers.track,
            "collect": self._collect,
            "settle": self._settle,
            "untrack": self._untrack,
            "release": self._release,
            "quit": self._quit,
        }

    def run(self) -> bool:
        """Until ``quit``, or until the host has been silent for the lease; nothing of ours is left then. False when the
        host may still come back: the lease has ended, and the port is there."""
        try:
            while not self._ended and time.monotonic() - self._heard < self._lease:
                try:
                    self._turn()
                except PortGone:
                    self._ended = True  # unplugged: nobody will ask any more
                except PortClosed:
                    self._in_session = False
                    self._port.reset()
                    time.sleep(PAUSE)
        finally:
            self._drop()
        return self._ended

    def _turn(self) -> None:
        """Whatever has come: a hello, and in a session requests."""
        if not self._port.fill(1.0):
            return
        if not self._in_session:
            self._greet(self._port.find_hello())
        while self._in_session and b"\n" in self._port.buffer:
            line, _, rest = self._port.buffer.partition(b"\n")
            self._port.buffer = rest
            again = hello_in(bytes(line))
            if again is not None:
                self._greet(again)
            else:
                self._answer(bytes(line))
        if len(self._port.buffer) > MAX_LINE:
            self._port.buffer.clear()
            self._in_session = False  # the host has to begin anew

    def _greet(self, nonce: Optional[bytes]) -> None:
        if nonce is not None:
            self._port.answer_hello(nonce)
            self._in_session, self._heard = True, time.monotonic()

    def _answer(self, line: bytes) -> None:
        self._heard = time.monotonic()
        ident = None
        try:
            request = json.loads(line.decode())
            ident, method = request["id"], self._methods[request["method"]]
            params = request.get("params") or {}
            if not isinstance(ident, int) or not isinstance(params, dict):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._reply(
                {
                    "id": ident if isinstance(ident, int) else None,
                    "error": {"code": "InvalidRequest", "message": "no such method, or not a request"},
                }
            )
            return
        try:
            self._reply({"id": ident, "result": method(params)})
        except HelperError as error:
            self._reply({"id": ident, "error": {"code": error.code, "message": clip(str(error), 1000)}})
        except PortClosed:
            raise
        except Exception as error:  # the host must get an answer whatever happens
            message = "%s: %s" % (type(error).__name__, error)
            self._reply({"id": ident, "error": {"code": "Internal", "message": clip(message, 1000)}})
        self._heard = time.monotonic()

    def _reply(self, reply: Dict[str, Any]) -> None:
        line = json.dumps(reply, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE:
            error = {"code": "ReplyTooLong", "message": "a reply of over 4 MiB"}
            line = json.dumps({"id": reply["id"], "error": error}).encode() + b"\n"
        self._port.write(line, time.monotonic() + ANSWER_DEADLINE)

    # methods

    def _identify(self, params: Params) -> Dict[str, Any]:
        """Who answers. The host tells its lease: an installed helper was started without knowing it."""
        if "lease_s" in params:
            self._lease = number(params, "lease_s", 0.1, 86400)
        return {
            "version": PROTOCOL,
            "helper": HELPER_VERSION,
            "boot_id": devices.boot_id(),
            "kernel": clip(platform.release(), 128),
            "python": platform.python_version(),
            "pid": os.getpid(),
        }

    def _ping(self, params: Params) -> Dict[str, Any]:
        """Nothing, but the lease begins anew."""
        return {}

    def _probe(self, params: Params) -> Dict[str, Any]:
        try:
            dm: Optional[Dm] = self._device_mapper()
        except HelperError:
            dm = None
        return devices.probe(dm)

    def _prepare(self, params: Params) -> Dict[str, Any]:
        job = job_id(params.get("job"))
        if self._snapshot is not None:
            raise HelperError("WrongState", "job %s has its snapshots prepared already" % self._snapshot.job)
        if self._capture is not None:
            raise HelperError("WrongState", "a capture was prepared without these volumes")
        snapshot = Snapshot(self._device_mapper(), job)
        volumes = snapshot.prepare(params)
        self._snapshot = snapshot
        memory.set_oom_score(-1000)
        return {"volumes": volumes}

    def _arm(self, params: Params) -> Dict[str, Any]:
        seconds = number(params, "deadman_s", 0.1, 3600)
        if self._guard is not None:
            raise HelperError("WrongState", "armed already")
        memory.interruptible()
        volumes: List[int] = []
        if self._snapshot is not None:
            self._snapshot.require_prepared()
            volumes = self._snapshot.numbers()
        self._guard = Watchdog(seconds, self._dm, volumes, True, self._port.close)
        return {}

    def _snap(self, params: Params) -> Dict[str, Any]:
        if self._snapshot is None:
            raise HelperError("WrongState", "no volumes are prepared")
        return dict(self._snapshot.snap(self._guard, self._trackers.flip))

    def _prepare_capture(self, params: Params) -> Dict[str, Any]:
        devices = [self._serving.device(item.get("device")) for item in objects(params, "disks", 1024)]
        limit = integer(params, "limit", CHUNK, 1 << 40)
        if self._capture is not None or (self._snapshot is not None and self._snapshot.taken):
            raise HelperError("WrongState", "a capture is prepared already, or the snapshots are taken")
        for device in devices:
            if self._trackers.changed(device) is None:
                raise HelperError("NotTracked", "nobody tracks the writes to %s: it cannot be captured" % device)
        lanes = [Disks(self._dm, self._snapshot) for _ in range(LANES)]

        def close() -> None:
            for disks in lanes:
                disks.close()

        try:
            images = {device: [disks.image(device) for disks in lanes] for device in devices}
            self._capture = Capture(images, limit, close)
        except BaseException:
            close()
            raise
        memory.set_oom_score(-1000)
        return {"limit": self._capture.limit}

    def _take_capture(self, params: Params) -> Dict[str, Any]:
        deadline = time.monotonic() + number(params, "deadline_s", 0.01, 3600)
        if self._capture is None or (self._snapshot is not None and not self._snapshot.taken):
            raise HelperError("WrongState", "no capture is prepared, or the snapshots are not taken yet")
        watchdog.require(self._guard)
        if self._snapshot is None:
            self._trackers.flip()
        captured = self._capture.take(self._trackers, deadline)
        watchdog.require(self._guard)
        return captured

    def _touch_pools(self, params: Params) -> Dict[str, Any]:
        if self._snapshot is None or self._snapshot.taken:
            raise HelperError("WrongState", "no volumes are prepared, or the snapshots are taken")
        wanted = {devno(item.get("device")) for item in objects(params, "disks", 1024)}
        disks = Disks(self._dm, self._snapshot)
        try:
            return {"pools": thin.touch_all(self._device_mapper(), wanted, disks.below, disks.open, self._touched)}
        finally:
            disks.close()

    def _compare_pools(self, params: Params) -> Dict[str, Any]:
        if self._snapshot is None or not self._snapshot.taken:
            raise HelperError("WrongState", "the snapshots are not taken yet")
        answers, disks = [], Disks(self._dm, self._snapshot)
        try:
            for item in objects(params, "disks", 1024):
                device, since = devno(item.get("device")), text(item, "since", 4096) if item.get("since") else ""
                size = disks.open(device).size
                bitmap, answer = thin.compare(self._device_mapper(), disks.half, self._touched, device, size, since)
                if bitmap is not None:
                    self._thin[device] = bitmap
                answers.append(answer)
        finally:
            disks.close()
        return {"disks": answers}

    def _disarm(self, params: Params) -> Dict[str, Any]:
        guard, self._guard = self._guard, None
        if guard is None:
            raise HelperError("NotArmed", "not armed")
        fired = guard.disarm()
        if self._snapshot is None:
            memory.unlock()
        return {"fired": fired}

    def _status(self, params: Params) -> Dict[str, Any]:
        return {"boot_id": devices.boot_id(), "volumes": self._snapshot.status() if self._snapshot is not None else []}

    def _serve(self, params: Params) -> Dict[str, Any]:
        if self._snapshot is not None and not self._snapshot.taken and not boolean(params, "live"):
            raise HelperError("WrongState", "the snapshots are not taken yet")
        known = Known(self._dm, self._snapshot, self._capture, self._trackers, self._thin)
        self._serving.start(params, known, self._port.close)
        return {}

    def _collect(self, params: Params) -> Dict[str, Any]:
        """What was marked on one disk since it was collected before, up to T1."""
        device = devno(params.get("device"))
        seconds = self._trackers.since(device)
        return {
            "chunks": self._trackers.collect(device),
            "seconds": seconds,
            "reason": clip(self._trackers.reason(device), 1000),
        }

    def _settle(self, params: Params) -> Dict[str, Any]:
        self._trackers.settle(text(params, "generation"))
        return {}

    def _untrack(self, params: Params) -> Dict[str, Any]:
        return {"removed": self._trackers.untrack()}

    def _release(self, params: Params) -> Dict[str, Any]:
        job = job_id(params.get("job"))
        if self._guard is not None:
            self._disarm({})
        self._serving.stop()
        self._drop_capture()
        removed = release.release(self._device_mapper(), job) if present() else []
        if self._snapshot is None or self._snapshot.job == job:
            self._snapshot = None
            memory.unlock()
            memory.set_oom_score(0)
        return {"removed": removed}

    def _quit(self, params: Params) -> Dict[str, Any]:
        self._ended = True
        return {}

    def _device_mapper(self) -> Dm:
        if self._dm is None:
            self._dm = Dm()
        return self._dm

    def _drop(self) -> None:
        """The end, however it came: no watchdog, no servers, no snapshots. Tracking goes on."""
        steps = (self._drop_guard, self._serving.stop, self._drop_capture, self._drop_snapshot, self._trackers.close)
        for step in steps:
            try:
                step()
            except Exception as error:  # the other steps are still to be taken
                print("vmbackupd guest helper: %s: %s" % (type(error).__name__, error), file=sys.stderr)
        self._port.close()

    def _drop_guard(self) -> None:
        if self._guard is not None:
            self._guard.disarm()

    def _drop_capture(self) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            capture.close()
        self._thin, self._touched = {}, set()

    def _drop_snapshot(self) -> None:
        if self._snapshot is not None:
            release.release(self._device_mapper(), self._snapshot.job)
