"""A proxy between us and an object store that loses, shortens and changes what passes, hangs, and drops answers.

The store behind it is honest, so what it holds can be looked at past the proxy.
"""

from __future__ import annotations

import hashlib
import http.client
import http.server
import re
import threading
import types
import urllib.parse
from collections.abc import Callable
from typing import Any

from tests.lab.ceph import Ceph

HONEST, LOSE, SHORTEN, CHANGE, HANG, DROP_ANSWER, TRICKLE, BUSY, MISSING, DISOWN = (
    "honest", "lose", "shorten", "change", "hang", "drop answer", "trickle", "busy", "missing", "disown"
)  # fmt: skip
NO_SUCH_KEY = b"<Error><Code>NoSuchKey</Code></Error>"


class LyingProxy:
    """``with LyingProxy(ceph) as proxy``: ``proxy.endpoint`` is where clients go. ``tell(action, method, pattern)``
    makes requests whose method and path match suffer from then on, or only the next ``times`` of them; ``seen``
    counts them."""

    def __init__(self, ceph: Ceph) -> None:
        self.ceph = ceph
        self.seen = 0
        self._rules: list[tuple[str, str, re.Pattern[str], int | None]] = []
        self._lock = threading.Lock()
        self._over = threading.Event()

    def __enter__(self) -> LyingProxy:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def tell(self, action: str, method: str = ".*", pattern: str = "", times: int | None = None) -> None:
        with self._lock:
            self._rules.append((action, method, re.compile(pattern), times))

    def be_honest(self) -> None:
        with self._lock:
            self._rules.clear()

    def action(self, method: str, path: str) -> str:
        with self._lock:
            for at, (action, methods, pattern, times) in enumerate(self._rules):
                if re.fullmatch(methods, method) and pattern.search(path):
                    self.seen += 1
                    if times is not None:
                        self._rules[at : at + 1] = [(action, methods, pattern, times - 1)] if times > 1 else []
                    return action
        return HONEST

    def wait(self) -> None:
        """Until the proxy is closed."""
        self._over.wait()

    def is_over(self, seconds: float) -> bool:
        return self._over.wait(seconds)

    def store(self, path: str, data: bytes) -> None:
        """Put an object past the client."""
        bucket, _, key = urllib.parse.unquote(path.partition("?")[0]).lstrip("/").partition("/")
        client = self.ceph.client()
        client.put_object(Bucket=bucket, Key=key, Body=data)
        client.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: LyingProxy

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        action = self.owner.action(self.command, self.path)
        if action == HANG:
            self.close_connection = True
            self.owner.wait()
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        lies: dict[str, Callable[[bytes], bytes | None]] = {
            LOSE: lambda data: None,
            SHORTEN: lambda data: data[: len(data) // 2],
            CHANGE: lambda data: bytes([data[0] ^ 1]) + data[1:],
        }
        if action in lies:
            stored = lies[action](body)
            if stored is not None:
                self.owner.store(self.path, stored)
            self._answer(200, [("ETag", f'"{hashlib.md5(body).hexdigest()}"')], b"")
            return
        if action == BUSY:
            self._answer(503, [], b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
            return
        if action == MISSING:
            self._answer(404, [], NO_SUCH_KEY)
            return
        status, headers, answer = self._forward(body)
        if action == DISOWN:
            self._answer(404, [], NO_SUCH_KEY)
            return
        if action == DROP_ANSWER:
            self.close_connection = True
            return
        if action == TRICKLE:
            self._trickle(status, headers, answer)
            return
        self._answer(status, headers, answer)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.owner.ceph.endpoint.removeprefix("http://"), timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _trickle(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        """A byte every now and then: never silent for long, never done."""
        self.close_connection = True
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        for at in range(len(body)):
            if self.owner.is_over(0.1):
                return
            try:
                self.wfile.write(body[at : at + 1])
                self.wfile.flush()
            except OSError:
                return
