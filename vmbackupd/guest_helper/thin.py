"""What changed on a disk below a dm-thin pool, told from the pool's own metadata, with nothing left behind in it.

A pool writes in place only to blocks that a device has mapped since its latest snapshot; a write to an older one goes
to a new block, whether the snapshot is still there or not (process_cell() in drivers/md/dm-thin.c goes by time). So
before a backup a snapshot of every device is taken and deleted at once (``touch``). From then on a block of the data
device that is mapped since before the *floor*, the time of the oldest of these snapshots, is never written again. The
next backup finds the blocks that are still mapped since before that floor: they have not changed. Everything else of
the disk, unmapped blocks and the metadata too, counts as changed.

What this costs the guest: the first write to a block after each backup is a copy to a new one, so the pool needs free
blocks even for guests that only overwrite, and its layout scatters. That is why it is only done where it is asked for.
It survives reboots. It does not survive that the data device is moved, or that the disk is set back to an older state,
by a restore or in the storage. So each backup leaves a *mark* in the pool: a device without a single block, under a
random id that LVM never comes to. A pool in which the mark of a backup is missing is not the one that was backed up.
A block whose discard the pool had not committed yet at T1 may be backed up with its content from before the discard.
"""

import hashlib
import random
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from . import memory
from .bitmaps import CHUNK, chunks_of, clear, length, runs
from .dm import MESSAGE, SUSPEND, Dm, Info, message_request, resume_request, suspend_request
from .failures import HelperError, clip
from .image import Device
from .stack import Piece
from .thinmeta import Details, Metadata
from .watchdog import Watchdog

SPARE = 8  # a pool is left alone if less than one block in so many is free
DEADMAN = 30.0  # seconds a device may stay suspended here, should this process be stopped
MARKS = 8  # as many are kept: a backup that fails leaves one, and the one before must still be found
_FIRST, _OURS = 1 << 23, (1 << 24) - 1  # ids of marks, up to that of a snapshot that is there for a moment


class Pool(NamedTuple):
    """A live pool: its device, the device numbers of what it lies on, and its live devices (dm number by thin id)."""

    info: Info
    metadata: str
    data: str
    thins: Dict[int, int]


class Half(NamedTuple):
    """A volume below a pool, with a snapshot: its bytes, its pieces on disks, and the snapshot, open."""

    size: int
    pieces: List[Piece]
    snap: Device


class Moment(NamedTuple):
    """What a later backup has to know of a pool at a T1. ``identity`` tells pools apart, and a pool that was moved;
    ``mark`` is the id of the newest mark."""

    identity: str
    floor: int
    mark: int

    @property
    def text(self) -> str:
        return "%s.%d.%d" % self


def pools(dm: Dm) -> List[Pool]:
    """Every live pool of the guest."""
    found: Dict[str, Pool] = {}
    thins = []
    for info in dm.devices():
        try:
            rows = dm.table(info.number)
        except (HelperError, OSError):
            continue  # removed meanwhile, or no such table
        words = rows[0].params.split() if len(rows) == 1 else []
        if words and rows[0].kind == "thin-pool":
            found[info.devno] = Pool(info, words[0], words[1], {})
        elif words and rows[0].kind == "thin":
            thins.append((words[0], int(words[1]), info.number))
    for pool, ident, number in thins:
        if pool in found:
            found[pool].thins[ident] = number
    return list(found.values())


def touch(dm: Dm, pool: Pool, metadata: Device) -> None:
    """Have every device of the pool write to new blocks from now on; ``metadata`` is the pool's, live.

    Raises ``HelperError`` where that would leave the guest short of blocks, ``OSError``.
    """
    _require_room(dm, pool)
    for number in pool.thins.values():
        info = dm.info(number)
        if info.suspended or info.inactive:  # a resume would put the waiting table in
            raise HelperError("PoolBusy", "%s is suspended, or another program is changing its table" % info.name)
    devices = _devices(dm, pool, metadata)
    memory.lock()
    memory.interruptible()
    guard = Watchdog(DEADMAN, dm, list(pool.thins.values()), thaw=False)
    try:
        if _OURS in devices:  # from a process that was killed
            dm.call(MESSAGE, message_request(pool.info.number, "delete %d" % _OURS))
        for ident in devices:
            if ident < _FIRST:
                _touch_one(dm, pool, ident)
    finally:
        guard.disarm()
    _mark(dm, pool, {ident: item.created for ident, item in devices.items() if ident >= _FIRST})


def touch_all(
    dm: Dm, wanted: Set[str], below: Callable[[str], Set[str]], opened: Callable[[str], Device], touched: Set[str]
) -> List[Dict[str, Any]]:
    """Touch the pools with data on the disks ``wanted``, and add them to ``touched``; what became of each. ``below``
    tells the disks of a volume, none for one that is not snapshotted."""
    answers = []
    for pool in pools(dm):
        if below(pool.metadata) and below(pool.data) & wanted:
            reason = ""
            try:
                touch(dm, pool, opened(pool.metadata))
                touched.add(pool.info.devno)
            except (HelperError, OSError) as error:
                reason = str(error)
            answers.append({"name": clip(pool.info.name, 128), "touched": not reason, "reason": clip(reason, 1000)})
    return answers


def compare(
    dm: Dm, half: Callable[[str], Optional[Half]], touched: Set[str], disk: str, size: int, since: str
) -> Tuple[Optional[bytearray], Dict[str, Any]]:
    """The bitmap of a disk's changed chunks since an earlier T1, None when nothing is known; and the answer to the
    host: ``moment`` is what to say ``since`` at the next one, of the pools that were ``touched``; ``reason`` why a
    pool's blocks all count as changed.
    """
    known = {item.identity: item for item in map(parse, since.split(",")) if item is not None}
    moments, reasons, same, here = [], [], [], 0
    for pool in pools(dm):
        data, metadata = half(pool.data), half(pool.metadata)
        if data is None or metadata is None or all(piece.disk != disk for piece in data.pieces):
            continue
        here += 1
        try:
            state = Metadata(metadata.snap)
            now = moment(pool, data, state)
            if pool.info.devno in touched:
                moments.append(now.text)
            before = known.get(now.identity)
            if before is None:
                reasons.append("no earlier backup noted the thin pool %s, or it lay elsewhere" % pool.info.name)
            elif before.mark not in state.devices():
                reasons.append("the thin pool %s has lost the mark of that backup: was it set back?" % pool.info.name)
            else:
                same += unchanged(data, state, before.floor)
        except (HelperError, OSError) as error:
            reasons.append("%s: %s" % (pool.info.name, error))
    if not here:
        reasons.append("no thin pool lies on it")
    bitmap = changed_chunks(disk, size, same) if same else None
    return bitmap, {
        "device": disk,
        "moment": ",".join(moments),
        "known": bool(same),
        "reason": clip("; ".join(reasons), 1000),
    }


def moment(pool: Pool, data: Half, state: Metadata) -> Moment:
    """The pool as of T1. What a device has mapped since before the floor is not written in place any more."""
    text = repr((pool.info.uuid, state.superblock.block, [tuple(piece) for piece in data.pieces]))
    devices = state.devices()
    floor = min([item.snapped for ident, item in devices.items() if ident < _FIRST] + [state.superblock.time])
    marks = [(item.created, ident) for ident, item in devices.items() if _FIRST <= ident < _OURS]
    return Moment(hashlib.sha256(text.encode()).hexdigest()[:16], floor, max(marks)[1] if marks else 0)


def unchanged(data: Half, state: Metadata, floor: int) -> List[Piece]:
    """What of the pool's data device is mapped since before the floor, in its place on the disks."""
    size = state.superblock.block
    count = data.size // size
    found: List[Piece] = []
    at = 0
    for first, end in runs(state.older(floor, count), count):
        start, over = first * size, end * size
        while start < over:
            piece = data.pieces[at]
            within = start - piece.offset
            if within >= piece.length:
                at += 1
                continue
            part = min(over - start, piece.length - within)
            found.append(Piece(start, piece.disk, piece.disk_offset + within, part))
            start += part
    return found


def changed_chunks(disk: str, size: int, same: Sequence[Piece]) -> bytearray:
    """The bitmap of a disk's chunks that are not unchanged as a whole."""
    chunks = chunks_of(size)
    bitmap = bytearray(b"\xff" * length(chunks))
    clear(bitmap, chunks, len(bitmap) * 8)
    spans = sorted((piece.disk_offset, piece.disk_offset + piece.length) for piece in same if piece.disk == disk)
    at = over = 0
    for start, end in spans + [(size + CHUNK, size + CHUNK)]:
        if start != over:
            clear(bitmap, chunks_of(at), chunks if over == size else over // CHUNK)
            at = start
        over = end
    return bitmap


def parse(text: str) -> Optional[Moment]:
    """None for what ``Moment.text`` is not."""
    words = text.split(".")
    if len(words) != 3 or not words[1].isdigit() or not words[2].isdigit() or max(map(len, words)) > 16:
        return None
    return Moment(words[0], int(words[1]), int(words[2]))


def _require_room(dm: Dm, pool: Pool) -> None:
    """Status of a pool: transaction, used/total metadata blocks, used/total data blocks, held root, mode, ..."""
    words = dm.status(pool.info.number)[0].params.split()
    try:
        used, total = (int(number) for number in words[2].split("/"))
        mode = words[4]
    except (IndexError, ValueError):
        raise HelperError("PoolBusy", "the thin pool %s is in no state to be touched: %s" % (pool.info.name, words))
    if mode != "rw" or (total - used) * SPARE < total:
        raise HelperError(
            "PoolFull", "the thin pool %s (%s) has %d of %d blocks in use" % (pool.info.name, mode, used, total)
        )


def _devices(dm: Dm, pool: Pool, metadata: Device) -> Dict[int, Details]:
    """All devices of the pool, live or not, as of now."""
    dm.call(MESSAGE, message_request(pool.info.number, "reserve_metadata_snap"))
    try:
        return Metadata(metadata, held=True).devices()
    finally:
        dm.call(MESSAGE, message_request(pool.info.number, "release_metadata_snap"))


def _touch_one(dm: Dm, pool: Pool, ident: int) -> None:
    """Snapshot a device and delete the snapshot. A live device is suspended meanwhile: it may be the one this program
    came from, so there is nothing but ioctls in between."""
    number, pool_number = pool.thins.get(ident), pool.info.number
    delete = message_request(pool_number, "delete %d" % _OURS)
    create = message_request(pool_number, "create_snap %d %d" % (_OURS, ident))
    suspend, resume = (suspend_request(number), resume_request(number)) if number is not None else (None, None)
    failure: Optional[OSError] = None
    with memory.Still():
        try:
            if suspend is not None:
                dm.call(SUSPEND, suspend)
            dm.call(MESSAGE, create)
            dm.call(MESSAGE, delete)
        except OSError as error:
            failure = error
        if resume is not None:
            dm.call(SUSPEND, resume)
    if failure is not None:
        raise failure


def _mark(dm: Dm, pool: Pool, marks: Dict[int, int]) -> None:
    """Leave a new mark, remove those that are too many. ``marks``: those that are there, with their times."""
    newest = sorted((ident for ident in marks if ident != _OURS), key=lambda ident: marks[ident])
    for ident in newest[: -(MARKS - 1)]:
        dm.call(MESSAGE, message_request(pool.info.number, "delete %d" % ident))
    mark = _OURS
    while mark == _OURS or mark in marks:
        mark = random.SystemRandom().randrange(_FIRST, _OURS)
    dm.call(MESSAGE, message_request(pool.info.number, "create_thin %d" % mark))
