"""The guest helper as the host's other parts see it: started, asked, released.

The helper undoes everything by itself when the host falls silent for the lease; a task here keeps it alive as long as
this process runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Mapping, Sequence

from vmbackupd.errors import (
    BackupError,
    GuestAgentRefused,
    GuestHelperUnavailable,
    GuestProtocolError,
)
from vmbackupd.guest import deploy, hello
from vmbackupd.guest.channel import Channel
from vmbackupd.guest.deploy import AgentCall
from vmbackupd.guest.replies import (
    CaptureResult,
    Collected,
    HelperStatus,
    PreparedVolume,
    SnapResult,
    ThinState,
    TouchedPool,
    TrackedDisk,
    VolumeStatus,
    parse_capture,
    parse_collected,
    parse_compared,
    parse_identity,
    parse_prepared,
    parse_snap,
    parse_status,
    parse_touched,
    parse_tracked,
)
from vmbackupd.guest.report import GuestReport, parse_report
from vmbackupd.typed import get_bool, get_int, get_strs

GUEST_PACKAGE = "vmbackupd-guest"
"""The package that brings the helper into guests whose agent runs no programs for us."""

CHANGED = "#changed"
"""Appended to a disk's export name: a bitmap (least significant bit first) of what changed since its generation."""
FRESH = "#fresh"
"""Such a bitmap of what the latest ``collect`` found."""
THIN = "#thin"
"""Such a bitmap of what :meth:`GuestHelper.compare_pools` could not tell to be unchanged."""
HASHES = "#hashes"
"""Sixteen bytes for each chunk: BLAKE2b with the key given, or zero for a chunk of zeros."""
EXCEPTIONS = "#exceptions"
"""The chunks that were overwritten since T1, as a bitmap of the moment at which the export is opened."""
CAPTURED = "#captured"
"""The disk with what the capture took of it."""
REST = "#rest"
"""The chunks that the capture found marked, as a bitmap: those to be read from the captured disk."""

START_TIMEOUT = 60.0  # an emulated guest takes ten seconds to start a Python
INSTALLED_TIMEOUT = 20.0  # for udev and systemd in the guest to start an installed helper
RECONNECT_TIMEOUT = 6.0
RELEASE_TIMEOUT = 120.0
NBD_GREETING = b"NBDMAGICIHAVEOPT"
_SHORT, _LONG = 20.0, 120.0  # what only looks; what waits for devices in the guest

__all__ = [
    "CAPTURED",
    "CHANGED",
    "EXCEPTIONS",
    "FRESH",
    "HASHES",
    "REST",
    "THIN",
    "AgentCall",
    "CaptureResult",
    "Collected",
    "GuestHelper",
    "HelperStatus",
    "PreparedVolume",
    "SnapResult",
    "ThinState",
    "TouchedPool",
    "TrackedDisk",
    "VolumeStatus",
    "open_data_channel",
    "remove_leftovers",
]


class GuestHelper:
    """A session with the helper. Every method raises ``GuestHelperError`` when the helper says that it failed (the
    session goes on), ``GuestHelperUnavailable`` or ``GuestProtocolError`` when the session is lost."""

    def __init__(self, channel: Channel, *, vm: str, job: str, boot_id: str, lease: float) -> None:
        self.vm = vm
        self.job = job
        self.boot_id = boot_id
        self._channel = channel
        self._keeper = asyncio.create_task(self._keep_alive(lease / 4), name=f"guest helper of {job}")

    @classmethod
    async def start(
        cls, agent: AgentCall, socket_path: str, *, vm: str, job: str, channel: str, lease: float = 300.0
    ) -> GuestHelper:
        """Push and start the helper on the port ``channel``, or wait for an installed one, and say hello.

        Raises ``GuestAgentUnavailable``, ``GuestAgentRefused`` (nothing installed, and the agent starts nothing),
        ``GuestHelperUnavailable``.
        """
        refused: BaseException | None = None
        try:
            may = await deploy.may_execute(agent)
            if may:
                await deploy.start(agent, vm=vm, job=job, channel=channel, lease=lease)
        except GuestAgentRefused as error:
            may, refused = False, error
        try:
            return await cls._connect(
                socket_path, vm=vm, job=job, lease=lease, timeout=START_TIMEOUT if may else INSTALLED_TIMEOUT
            )
        except GuestHelperUnavailable as error:
            if may:
                raise
            raise GuestAgentRefused(
                f"VM {vm}: its guest agent does not allow guest-exec, and no installed helper answers ({error}). "
                f"Install the package {GUEST_PACKAGE} in the guest, or allow guest-exec in its agent's configuration"
            ) from refused or error

    @classmethod
    async def reconnect(
        cls, socket_path: str, *, vm: str, job: str, lease: float = 300.0, timeout: float = RECONNECT_TIMEOUT
    ) -> GuestHelper:
        """A session with a helper that runs already. Raises ``GuestHelperUnavailable`` when none answers in a few
        seconds."""
        return await cls._connect(socket_path, vm=vm, job=job, lease=lease, timeout=timeout)

    @classmethod
    async def _connect(cls, path: str, *, vm: str, job: str, lease: float, timeout: float) -> GuestHelper:
        channel = await Channel.open(path, vm=vm, timeout=timeout)
        try:
            identity = parse_identity(await channel.request("identify", {"lease_s": lease}, _SHORT))
        except BaseException:
            await channel.close()
            raise
        return cls(channel, vm=vm, job=job, boot_id=identity.boot_id, lease=lease)

    async def probe(self) -> GuestReport:
        """All block devices of the guest."""
        return parse_report(await self._call("probe", {}, _LONG))

    async def prepare(
        self, *, scratch_serial: str, volumes: Mapping[str, int], chunk_sectors: int = 128
    ) -> list[PreparedVolume]:
        """Make everything for the snapshots of ``volumes`` (device → bytes of its store) but the last step; in their
        order. After a failure nothing of it is left."""
        asked = [{"device": device, "store_bytes": length} for device, length in volumes.items()]
        params = {"job": self.job, "scratch_serial": scratch_serial, "chunk_sectors": chunk_sectors, "volumes": asked}
        return parse_prepared(await self._call("prepare", params, _LONG), volumes)

    async def arm(self, deadman: float) -> None:
        """Have the guest thaw by itself unless :meth:`disarm` comes within ``deadman`` seconds. Right before the
        freeze."""
        await self._call("arm", {"deadman_s": deadman}, _SHORT)

    async def snap(self) -> SnapResult:
        """T1 of the prepared volumes; the filesystems are to be frozen."""
        return parse_snap(await self._call("snap", {}, _LONG))

    async def prepare_capture(self, devices: Sequence[str], *, limit: int) -> int:
        """Make everything for :meth:`capture` of ``devices``: memory of up to ``limit`` bytes above all. After
        :meth:`prepare`, before the freeze. Returns the bytes that the guest can spare, at most ``limit``."""
        params = {"disks": [{"device": device} for device in devices], "limit": limit}
        granted = await self._call("prepare_capture", params, _LONG)
        return get_int(granted, "limit", maximum=limit, error=GuestProtocolError)

    async def capture(self, devices: Sequence[str], *, deadline: float) -> CaptureResult:
        """Take the last changes of the ``devices`` that were prepared. The filesystems are to be frozen, and
        :meth:`snap` done if there are volumes. What was taken is kept until :meth:`release`, and served with
        :data:`CAPTURED` and :data:`REST`.

        ``GuestHelperError.reason`` is ``TooMuch`` when the memory does not suffice, ``NotStill`` when the disks did
        not come to rest within ``deadline`` seconds.
        """
        reply = await self._call("capture", {"deadline_s": deadline}, deadline + _SHORT)
        return parse_capture(reply, devices)

    async def touch_pools(self, devices: Sequence[str]) -> list[TouchedPool]:
        """Have the thin pools with data on these disks write to new blocks from now on: the next backup can tell from
        their metadata what did not change. After :meth:`prepare`, before the freeze. It costs the guest free blocks and
        copying: only where it is wanted."""
        params = {"disks": [{"device": device} for device in devices]}
        return parse_touched(await self._call("touch_pools", params, _LONG))

    async def compare_pools(self, since: Mapping[str, str]) -> list[ThinState]:
        """After T1: what changed on disks below thin pools (device → the ``moment`` of an earlier backup, or nothing).
        Where that is known a data server started later has :data:`THIN`."""
        items = [{"device": device, "since": moment} for device, moment in since.items()]
        return parse_compared(await self._call("compare_pools", {"disks": items}, _LONG), since)

    async def disarm(self) -> bool:
        """True when the guest had thawed by itself, so that the freeze did not hold."""
        return get_bool(await self._call("disarm", {}, _SHORT), "fired", error=GuestProtocolError)

    async def status(self) -> HelperStatus:
        """Whether the snapshots still hold."""
        return parse_status(await self._call("status", {}, _SHORT))

    async def serve(
        self, channel: str, disks: Mapping[str, str], *, live: bool = False, hash_key: bytes | None = None
    ) -> None:
        """Serve ``disks`` (export name → device) over NBD on the port ``channel``: as of T1, or as they are now if
        ``live``. Whatever served the port before ends.

        Beside each disk stands what is known of it: :data:`CHANGED` and so on, appended to its name. ``hash_key``
        (16 to 64 bytes) adds :data:`HASHES`.
        """
        items = [{"name": name, "device": device} for name, device in disks.items()]
        params: dict[str, object] = {"port": channel, "disks": items, "live": live}
        if hash_key is not None:
            params["hash_key"] = hash_key.hex()
        await self._call("serve", params, _LONG)

    async def track(self, consumer: str, disks: Mapping[str, str], *, limit: int | None = None) -> list[TrackedDisk]:
        """Track the changes of ``disks`` (device → what identifies it to us) from now on, or go on; in their order.

        ``consumer``: for whom, at most 255 characters (an identity: 1024); what was tracked for another is not known
        to this one.
        ``limit``: bytes of kernel memory for all of them (64 MiB if not given: disks of 1.8 TiB).
        """
        params: dict[str, object] = {
            "consumer": consumer,
            "disks": [{"device": device, "identity": identity} for device, identity in disks.items()],
        }
        if limit is not None:
            params["limit"] = limit
        return parse_tracked(await self._call("track", params, _LONG), disks)

    async def collect(self, device: str) -> Collected:
        """What changed on a tracked disk since this was called before: up to now, or up to T1 once that was taken.

        :data:`FRESH` has those chunks. :data:`CHANGED` has all since the disk's generation, also those that a backup
        before found which was not published.
        """
        return parse_collected(await self._call("collect", {"device": device}, _LONG))

    async def settle(self, generation: str) -> None:
        """This backup is published under ``generation``: changes of all tracked disks count from its T1 on."""
        await self._call("settle", {"generation": generation}, _LONG)

    async def untrack(self) -> list[str]:
        """End all tracking in the guest; the devices that were tracked."""
        removed = await self._call("untrack", {}, _LONG)
        return get_strs(removed, "removed", max_length=4096, max_item_length=32, error=GuestProtocolError)

    async def release(self) -> list[str]:
        """Remove everything of the job from the guest's device-mapper; returns the names of what was there."""
        removed = await self._call("release", {"job": self.job}, RELEASE_TIMEOUT)
        return get_strs(removed, "removed", max_length=4096, max_item_length=128, error=GuestProtocolError)

    async def quit(self) -> None:
        """End the helper; it removes its file."""
        await self._call("quit", {}, _SHORT)

    async def close(self) -> None:
        """End the session; the helper goes on until its lease ends."""
        self._keeper.cancel()
        await asyncio.wait({self._keeper})
        await self._channel.close()

    async def _call(self, method: str, params: Mapping[str, object], timeout: float) -> dict[str, object]:
        return await self._channel.request(method, params, timeout)

    async def _keep_alive(self, interval: float) -> None:
        """Say something before the lease ends. A failure shows at the next request of somebody who can do something."""
        while not self._channel.closed:
            await asyncio.sleep(interval)
            with contextlib.suppress(BackupError):
                await self._channel.request("ping", {}, _SHORT)


async def open_data_channel(socket_path: str, *, timeout: float) -> socket.socket:
    """A connection to a helper's data port, past the hello: blocking, and the NBD greeting is the next to be read.

    Raises ``GuestHelperUnavailable`` when nobody answers within ``timeout`` seconds, ``GuestProtocolError``.
    """
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        sock = await hello.connect(socket_path, deadline)
        try:
            await hello.greet(sock, deadline, NBD_GREETING)
            sock.setblocking(True)
        except BaseException:
            sock.close()
            raise
    except OSError as error:  # TimeoutError is one
        raise GuestHelperUnavailable(
            f"the guest helper does not answer on its data port {socket_path}: {error or 'silence'}"
        ) from error
    return sock


async def remove_leftovers(agent: AgentCall, *, vm: str, job: str) -> None:
    """Where no helper answers: end what there may be of one, and run another once to remove everything of ``job``.

    Raises ``GuestAgentUnavailable``, ``GuestAgentRefused`` (the guest has its own means, then: the service manager
    cleans up after an installed helper and starts it anew), ``GuestHelperUnavailable`` (with what it said).
    """
    if not await deploy.may_execute(agent):
        raise GuestAgentRefused(
            f"VM {vm}: its guest agent does not allow guest-exec; an installed helper removes the snapshots of {job} "
            "by itself when its lease ends or its port is unplugged"
        )
    await deploy.release(agent, vm=vm, job=job, timeout=RELEASE_TIMEOUT)
