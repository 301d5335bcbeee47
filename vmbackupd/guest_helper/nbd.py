"""An NBD server for disks as of T1, read-only, on a line without end of file.

Fixed newstyle, structured replies, ``base:allocation`` by zero detection (github.com/NetworkBlockDevice/nbd,
doc/proto.md). Requests are answered in their order; a client may have many on the way. A failing read is an error of
that request and never ends the session. After a disconnect the next hello is awaited.
"""

import errno
import queue
import struct
import threading
from typing import Dict, List, Optional

from .blocks import BLOCK, Block, Export
from .failures import HelperError, clip
from .image import PIECE
from .port import Port, PortClosed, PortGone, Resync

MAX_REQUEST = 32 << 20

_MAGIC, _IHAVEOPT, _REPLY = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_EXPORT_NAME, _ABORT, _LIST, _INFO, _GO, _STRUCTURED, _LIST_META, _SET_META = 1, 2, 3, 6, 7, 8, 9, 10
_ACK, _SERVER, _REP_INFO, _REP_META = 1, 2, 3, 4
_ERR_UNSUP, _ERR_INVALID, _ERR_PLATFORM, _ERR_UNKNOWN = 2**31 + 1, 2**31 + 3, 2**31 + 4, 2**31 + 6
_TFLAGS = 1 | 2 | 128  # flags, read-only, DF; not multi-conn, though it would be true: a port carries one connection
_REQUEST, _SIMPLE, _CHUNK = 0x25609513, 0x67446698, 0x668E33EF
_READ, _WRITE, _DISC, _FLUSH, _STATUS = 0, 1, 2, 3, 7
_FLAG_DF, _FLAG_ONE = 4, 8
_DONE = 1
_NONE, _DATA, _HOLE, _EXTENTS, _ERROR, _ERROR_OFFSET = 0, 1, 2, 5, 32769, 32770
_CONTEXT, _CONTEXT_ID = b"base:allocation", 1
_MAX_OPTION = 65536


class _Over(Exception):
    """The client has ended its session."""


class _Sender:
    """Writes in a thread of its own, so that the disk is read while the line is written."""

    def __init__(self, port: Port) -> None:
        self._port, self._failed = port, False
        self._queue: queue.Queue[Optional[bytes]] = queue.Queue(64)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def put(self, data: bytes) -> None:
        """Send after all that was put before. Raises ``PortClosed``."""
        while not self._failed:
            try:
                self._queue.put(data, timeout=0.5)
                return
            except queue.Full:
                continue
        raise PortClosed

    def end(self) -> None:
        """Send what was put, unless the line is lost, and end."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            data = self._queue.get()
            if data is None:
                return
            if not self._failed:
                try:
                    self._port.write(data)
                except PortClosed:
                    self._failed = True


class Server:
    """Serves ``exports`` on ``port``, one session after the other."""

    def __init__(self, port: Port, exports: Dict[str, Export]) -> None:
        self._port, self._exports = port, exports

    def serve(self) -> None:
        """Until the port is gone for good."""
        while True:
            try:
                self._port.await_hello()
                self._session()
            except PortGone:
                return
            except PortClosed:
                self._port.reset()
            except (Resync, _Over):
                pass

    def _session(self) -> None:
        sender = _Sender(self._port)
        try:
            session = _Session(self._port, sender, self._exports)
            session.negotiate()
            session.transmit()
        finally:
            sender.end()


class _Session:
    def __init__(self, port: Port, sender: _Sender, exports: Dict[str, Export]) -> None:
        self._port, self._put, self._exports = port, sender.put, exports
        self._structured = False
        self._context: Optional[bytes] = None  # the export whose block status was asked for
        self._blocks = next(iter(exports.values()), None)

    def negotiate(self) -> None:
        """Until an export is chosen."""
        self._put(struct.pack(">QQH", _MAGIC, _IHAVEOPT, 3))
        flags = struct.unpack(">I", self._take(4))[0]
        while True:
            magic, option, length = struct.unpack(">QII", self._take(16))
            if magic != _IHAVEOPT or length > _MAX_OPTION:
                raise Resync
            data = self._port.take(length)
            if option == _EXPORT_NAME:
                self._old_go(data, not flags & 2)
                return
            if option in (_INFO, _GO):
                if self._go(option, data):
                    return
            else:
                self._other(option, data)

    def transmit(self) -> None:
        """Requests until the client disconnects."""
        while True:
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQI", self._take(28))
            if magic != _REQUEST:
                raise Resync
            if kind == _DISC:
                raise _Over
            if kind == _WRITE:
                self._swallow(length)
            self._request(kind, flags, cookie, offset, length)

    def _take(self, count: int) -> bytes:
        """What a message begins with."""
        if self._port.begins_with_hello():
            raise Resync
        return self._port.take(count)

    def _swallow(self, length: int) -> None:
        if length > MAX_REQUEST:
            raise Resync
        while length:
            length -= len(self._port.take(min(length, PIECE)))

    # options

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._put(struct.pack(">QIII", _REPLY, option, kind, len(data)) + data)

    def _choose(self, name: bytes) -> bool:
        """Raises ``OSError`` or ``HelperError`` where there is such an export, but not now."""
        blocks = self._exports.get(name.decode("utf-8", "replace"))
        if blocks is not None:
            blocks.open()
            self._blocks = blocks
        return blocks is not None

    def _old_go(self, name: bytes, zeroes: bool) -> None:
        try:
            chosen = self._choose(name)
        except (OSError, HelperError):
            chosen = False
        if not chosen or self._blocks is None:
            raise Resync  # this option knows no error but the end of the connection
        self._put(struct.pack(">QH", self._blocks.size, _TFLAGS) + (bytes(124) if zeroes else b""))

    def _go(self, option: int, data: bytes) -> bool:
        length = struct.unpack_from(">I", data)[0] if len(data) >= 6 else len(data)
        name = data[4 : 4 + length]
        if len(data) < 6 + length:
            self._reply(option, _ERR_INVALID)
            return False
        try:
            chosen = self._choose(name)
        except (OSError, HelperError) as error:
            self._reply(option, _ERR_PLATFORM, clip(str(error), 1000).encode("utf-8", "replace"))
            return False
        if not chosen or self._blocks is None:
            self._reply(option, _ERR_UNKNOWN)
        else:
            self._reply(option, _REP_INFO, struct.pack(">HQH", 0, self._blocks.size, _TFLAGS))
            self._reply(option, _REP_INFO, struct.pack(">HIII", 3, 1, 65536, MAX_REQUEST))
            self._reply(option, _ACK)
            if self._context != name:
                self._context = None
            return option == _GO
        return False

    def _other(self, option: int, data: bytes) -> None:
        if option == _ABORT:
            self._reply(option, _ACK)
            raise _Over
        if option == _STRUCTURED:
            self._structured = not data
            self._reply(option, _ERR_INVALID if data else _ACK)
        elif option == _LIST:
            for name in [] if data else sorted(self._exports):
                encoded = name.encode()
                self._reply(option, _SERVER, struct.pack(">I", len(encoded)) + encoded)
            self._reply(option, _ERR_INVALID if data else _ACK)
        elif option in (_LIST_META, _SET_META):
            self._meta(option, data)
        else:
            self._reply(option, _ERR_UNSUP)

    def _meta(self, option: int, data: bytes) -> None:
        try:
            name, queries = _queries(data)
        except (struct.error, ValueError):
            self._reply(option, _ERR_INVALID)
            return
        if option == _SET_META:
            self._context = None
        if not self._structured:
            self._reply(option, _ERR_INVALID)
        elif name.decode("utf-8", "replace") not in self._exports:
            self._reply(option, _ERR_UNKNOWN)
        else:
            if _CONTEXT in queries or (option == _LIST_META and (not queries or b"base:" in queries)):
                number = _CONTEXT_ID if option == _SET_META else 0
                self._reply(option, _REP_META, struct.pack(">I", number) + _CONTEXT)
                if option == _SET_META:
                    self._context = name
            self._reply(option, _ACK)

    # requests

    def _request(self, kind: int, flags: int, cookie: int, offset: int, length: int) -> None:
        assert self._blocks is not None
        if kind == _FLUSH:
            self._fail(cookie, 0)
        elif kind not in (_READ, _STATUS):
            self._fail(cookie, errno.EPERM if kind in (_WRITE, 4, 6) else errno.EINVAL)
        elif not length or offset + length > self._blocks.size:
            self._fail(cookie, errno.EINVAL)
        elif kind == _STATUS:
            self._status(cookie, offset, length, bool(flags & _FLAG_ONE))
        elif length > MAX_REQUEST:
            self._fail(cookie, errno.EINVAL)
        elif not self._structured:
            self._read_simple(cookie, offset, length)
        elif flags & _FLAG_DF:
            self._read_whole(cookie, offset, length)
        else:
            self._read(cookie, offset, length)

    def _chunk(self, cookie: int, kind: int, length: int, data: bytes = b"", flags: int = 0) -> None:
        """The beginning of a structured chunk of ``length`` bytes, of which ``data`` are sent here."""
        self._put(struct.pack(">IHHQI", _CHUNK, flags, kind, cookie, length) + data)

    def _fail(self, cookie: int, error: int, offset: Optional[int] = None) -> None:
        """End a request with ``error`` (0: none), which happened at byte ``offset``."""
        if not self._structured:
            self._put(struct.pack(">IIQ", _SIMPLE, error, cookie))
        elif error == 0:
            self._chunk(cookie, _NONE, 0, flags=_DONE)
        elif offset is None:
            self._chunk(cookie, _ERROR, 6, struct.pack(">IH", error, 0), _DONE)
        else:
            self._chunk(cookie, _ERROR_OFFSET, 14, struct.pack(">IHQ", error, 0, offset), _DONE)

    def _read(self, cookie: int, offset: int, length: int) -> None:
        """Data in chunks of at most a MiB, and holes."""
        assert self._blocks is not None
        run: List[Block] = []
        hole, at = 0, offset
        try:
            for block in self._blocks.read(offset, length):
                at = block.offset + block.length
                if block.data is None:
                    self._send_run(cookie, run)
                    hole += block.length
                    continue
                if hole:
                    self._send_hole(cookie, block.offset - hole, hole)
                    hole = 0
                run.append(block)
                if len(run) >= PIECE // BLOCK:
                    self._send_run(cookie, run)
        except OSError:
            self._send_run(cookie, run)
            self._send_hole(cookie, at - hole, hole)
            self._fail(cookie, errno.EIO, at)
            return
        self._send_run(cookie, run)
        self._send_hole(cookie, at - hole, hole)
        self._fail(cookie, 0)

    def _send_run(self, cookie: int, run: List[Block]) -> None:
        if run:
            self._chunk(cookie, _DATA, 8 + sum(block.length for block in run), struct.pack(">Q", run[0].offset))
            for block in run:
                self._put(block.data or b"")
            del run[:]

    def _send_hole(self, cookie: int, offset: int, length: int) -> None:
        if length:
            self._chunk(cookie, _HOLE, 12, struct.pack(">QI", offset, length))

    def _read_whole(self, cookie: int, offset: int, length: int) -> None:
        """One chunk, as the client asked. After an error the chunk is padded: its length is sent already."""
        assert self._blocks is not None
        self._chunk(cookie, _DATA, 8 + length, struct.pack(">Q", offset))
        at, failed = offset, False
        try:
            for block in self._blocks.read(offset, length):
                self._put(bytes(block.length) if block.data is None else block.data)
                at = block.offset + block.length
        except OSError:
            failed = True
            for start in range(at, offset + length, BLOCK):
                self._put(bytes(min(BLOCK, offset + length - start)))
        self._fail(cookie, errno.EIO if failed else 0, at if failed else None)

    def _read_simple(self, cookie: int, offset: int, length: int) -> None:
        """All of it before the first byte is sent: a simple reply cannot fail half way."""
        assert self._blocks is not None
        try:
            blocks = list(self._blocks.read(offset, length))
        except OSError:
            self._fail(cookie, errno.EIO)
            return
        self._fail(cookie, 0)
        for block in blocks:
            self._put(bytes(block.length) if block.data is None else block.data)

    def _status(self, cookie: int, offset: int, length: int, one: bool) -> None:
        assert self._blocks is not None
        if self._context is None or not self._structured:
            self._fail(cookie, errno.EINVAL)
            return
        try:
            extents = self._blocks.extents(offset, length)
        except OSError:
            self._fail(cookie, errno.EIO)
            return
        if one:
            extents = extents[:1]
        data = struct.pack(">I", _CONTEXT_ID) + b"".join(
            struct.pack(">II", size, 3 if zero else 0) for size, zero in extents
        )
        self._chunk(cookie, _EXTENTS, len(data), data, _DONE)


def _queries(data: bytes) -> "tuple[bytes, list[bytes]]":
    """Export name and queries of a meta context option. Raises ``struct.error`` or ``ValueError``."""
    length = struct.unpack_from(">I", data)[0]
    name, at = data[4 : 4 + length], 4 + length
    count = struct.unpack_from(">I", data, at)[0]
    at += 4
    queries = []
    for _ in range(count):
        size = struct.unpack_from(">I", data, at)[0]
        queries.append(data[at + 4 : at + 4 + size])
        at += 4 + size
    if at != len(data):
        raise ValueError("lengths do not add up")
    return name, queries
