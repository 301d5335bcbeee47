"""Requests to an S3 store: the only module that knows boto3.

Every request is bounded in time, tried again when that can help, counted, and answered with plain Python values or with
one of our errors. boto3's own retries are off: a conditional put must know whether an earlier attempt may have arrived.
"""

from __future__ import annotations

import base64
import collections
import email.utils
import hashlib
import logging
import random
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from vmbackupd.errors import InvalidArgument, RepositoryFull, StorageDenied, StorageError, StorageUnanswered
from vmbackupd.repository.s3options import S3Options

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

FULL = {"QuotaExceeded", "InsufficientStorage", "StorageFull", "XMinioStorageFull", "InsufficientCapacity"}
# Answers below 500 after which the same request may succeed. BadDigest: bytes were damaged on the way.
AGAIN = {"SlowDown", "RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody", "Throttling"}
# Answers from 500 on that will not change.
NEVER = {"NotImplemented", "HTTPVersionNotSupported"}
ADVICE = {
    "NoSuchBucket": "there is no such bucket: make it, vmbackupd does not",
    "AccessStorageDenied": "access denied: the credentials lack a permission (docs/storage.md lists them)",
    "InvalidAccessKeyId": "the access key is unknown to the store",
    "SignatureDoesNotMatch": "the secret key does not match the access key",
    "RequestTimeTooSkewed": "this host's clock differs too much from the store's: set it",
}
# Requests that make an object, and so never find it missing. Ceph 16 says so when the name is removed meanwhile.
MAKERS = {"put_object", "complete_multipart_upload"}
PAUSE, LONGEST_PAUSE = 0.2, 10.0
SLOWEST = 64 * 1024  # bytes a second below which a transfer is given up
BLOCK = 2**20


class Taken(Exception):
    """The store refused a conditional request (412): the name is taken."""


class BeyondEnd(Exception):
    """The range begins behind the object's end (416)."""


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an object, or a delete marker, as the store lists it. ``modified``: seconds since 1970 by the
    store's clock."""

    key: str
    id: str
    marker: bool
    size: int
    etag: str
    modified: float


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: boto3's fields, and how many attempts it took."""

    fields: Mapping[str, Any]
    attempts: int

    @property
    def etag(self) -> str:
        """The entity tag without its quotes; empty if there was none."""
        return str(self.fields.get("ETag", "")).strip('"')

    @property
    def version(self) -> str | None:
        """The id of the version this is about, None where there are no versions."""
        value = self.fields.get("VersionId")
        return None if value in (None, "", "null") else str(value)


class Body:
    """Buffers as a file that is read once or again, without joining them. Reading fails after the deadline: a store
    that takes a byte now and then does not hold a job for ever."""

    def __init__(self, parts: Sequence[Buffer]) -> None:
        self.views = [memoryview(part).cast("B") for part in parts]
        self.size = sum(map(len, self.views))
        digest = hashlib.md5(usedforsecurity=False)
        for view in self.views:
            digest.update(view)
        self.md5 = digest.digest()
        self.deadline = float("inf")
        self._part = self._at = self._position = 0

    def __len__(self) -> int:
        return self.size

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        """File positioning as boto3 does it: anywhere in the object, or to its end."""
        self._position = min(max(offset + (0, self._position, self.size)[whence], 0), self.size)
        self._part, self._at = 0, self._position
        while self._part < len(self.views) and self._at >= len(self.views[self._part]):
            self._at -= len(self.views[self._part])
            self._part += 1
        return self._position

    def read(self, amount: int | None = -1) -> bytes:
        """Up to ``amount`` bytes, to the end if that is negative."""
        if time.monotonic() > self.deadline:
            raise TimeoutError("the store takes the data too slowly")
        wanted = self.size - self._position
        if amount is not None and 0 <= amount < wanted:
            wanted = amount
        found = []
        while wanted > 0:
            view = self.views[self._part]
            piece = view[self._at : self._at + wanted]
            found.append(piece)
            self._at += len(piece)
            self._position += len(piece)
            wanted -= len(piece)
            if self._at == len(view):
                self._part, self._at = self._part + 1, 0
        return b"".join(found)


class S3Client:
    """Requests about one bucket. Any number of threads at once. Keys are whole: the prefix is the caller's."""

    def __init__(self, bucket: str, options: S3Options, place: str) -> None:
        """Nothing is sent yet. InvalidArgument without boto3 or with options that it refuses."""
        self.bucket = bucket
        self.options = options
        self.place = place
        self.requests: collections.Counter[str] = collections.Counter()
        self.bytes_read = self.bytes_written = 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._clock: tuple[float, float] | None = None
        self._random = random.Random()
        try:
            self._client = _make_client(options)
        except ImportError as reason:
            raise InvalidArgument(
                f"{place}: boto3 is missing: install python3-boto3, or vmbackupd with the extra [s3]"
            ) from reason
        except Exception as reason:  # boto3 has a dozen kinds for a wrong profile, endpoint or file
            raise InvalidArgument(f"{place}: {reason}") from reason
        events = self._client.meta.events
        events.register("before-call.s3", self._add_headers)
        events.register("after-call.s3.ListObjectVersions", self._keep_answer)

    def close(self) -> None:
        """Give up connections. Safe to call twice."""
        self._client.close()

    # ---- one request

    def call(
        self,
        operation: str,
        what: str,
        *,
        headers: Mapping[str, str] | None = None,
        finish: Callable[[dict[str, Any]], None] | None = None,
        bucket: bool = True,
        **parameters: Any,
    ) -> Reply:
        """Send a request until it is answered; ``what`` names the object in messages.

        ``headers`` are added; ``finish`` gets the answer's fields to read its body. FileNotFoundError, Taken,
        BeyondEnd, StorageDenied, RepositoryFull, StorageUnanswered, StorageError.
        """
        if bucket:
            parameters["Bucket"] = self.bucket
        body = parameters.get("Body")
        attempt = 1
        while True:
            with self._lock:
                self.requests[operation] += 1
            if isinstance(body, Body):
                body.seek(0)
                body.deadline = self.deadline(body.size)
            self._local.headers = headers or {}
            try:
                fields = getattr(self._client, operation)(**parameters)
                self._note_time(fields.get("ResponseMetadata", {}).get("HTTPHeaders", {}))
                if finish is not None:
                    finish(fields)
                return Reply(fields, attempt)
            except Exception as reason:
                error = self._judge(reason, operation, what)
                if not isinstance(error, StorageUnanswered):
                    raise error from reason
                if attempt >= self.options.attempts:
                    raise StorageUnanswered(f"{error}, {attempt} times") from reason
                log.debug("%s, attempt %d of %d", error, attempt, self.options.attempts)
            finally:
                self._local.headers = {}
            time.sleep(self._random.uniform(0.5, 1.0) * min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE))
            attempt += 1

    def deadline(self, size: int) -> float:
        """When, on the monotonic clock, a request that moves so many bytes is given up."""
        return time.monotonic() + 2 * self.options.timeout + size / SLOWEST

    def server_time(self) -> float:
        """Seconds since 1970 by the store's clock, as the last answer told it; our own before the first."""
        clock = self._clock
        return time.time() if clock is None else clock[0] + time.monotonic() - clock[1]

    def _judge(self, reason: Exception, operation: str, what: str) -> Exception:
        """The error to raise for what boto3 or the network raised; StorageUnanswered if another attempt may help."""
        from botocore import exceptions
        from botocore.parsers import ResponseParserError
        from urllib3.exceptions import HTTPError

        at = f"{self.place}: {what}"
        if isinstance(reason, exceptions.ClientError):
            return self._judge_answer(reason.response, operation, at)
        if isinstance(reason, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
            return StorageError(f"{at}: no credentials: set credentials_file or profile in [repository.s3]")
        if isinstance(reason, exceptions.SSLError):
            return StorageError(f"{at}: {reason}")
        network = (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.IncompleteReadError,
            ResponseParserError,  # something between us and the store answered instead of it
            HTTPError,
            HTTPException,
            OSError,
        )
        if isinstance(reason, network):
            return StorageUnanswered(f"{at}: {reason}")
        if isinstance(reason, exceptions.BotoCoreError):
            return StorageError(f"{at}: {reason}")
        return reason

    def _judge_answer(self, answer: Mapping[str, Any], operation: str, at: str) -> Exception:
        error, metadata = answer.get("Error", {}), answer.get("ResponseMetadata", {})
        code, status = str(error.get("Code", "")), int(metadata.get("HTTPStatusCode", 0))
        self._note_time(metadata.get("HTTPHeaders", {}))
        if code in FULL or status == 507:
            return RepositoryFull(f"{at}: the store is full or its quota is used up ({code or status})")
        if status == 412:
            return Taken(at)
        if status == 416:
            return BeyondEnd(at)
        if status == 404 and code not in ("NoSuchBucket", "NoSuchUpload"):
            if operation in MAKERS:
                return StorageUnanswered(f"{at}: the store answers a put with 'no such object'")
            return FileNotFoundError(at)
        message = f"{at}: {ADVICE.get(code) or error.get('Message') or 'refused'} ({code or 'no code'}, HTTP {status})"
        if code in AGAIN or status in (409, 429) or (status >= 500 and code not in NEVER):
            return StorageUnanswered(message)
        if status == 403:
            return StorageDenied(message)
        return StorageError(message)

    def _note_time(self, headers: Mapping[str, str]) -> None:
        try:
            told = email.utils.parsedate_to_datetime(headers["date"]).timestamp()
        except (KeyError, TypeError, ValueError):
            return
        self._clock = (told, time.monotonic())

    def _add_headers(self, model: Any, params: dict[str, Any], **_: object) -> None:
        """boto3 before 1.35 has no parameter for If-None-Match, so headers are added behind its back. From 1.36 on it
        leaves out Content-MD5, which older stores demand where S3 once did."""
        params["headers"].update(getattr(self._local, "headers", {}))
        if model.name in ("DeleteObjects", "PutObjectRetention") and isinstance(params.get("body"), bytes):
            digest = hashlib.md5(params["body"], usedforsecurity=False).digest()
            params["headers"]["Content-MD5"] = base64.b64encode(digest).decode()

    def _keep_answer(self, http_response: Any, **_: object) -> None:
        """boto3 sorts versions and delete markers into two lists: their common order is in the XML only."""
        self._local.answer = http_response.content

    # ---- what takes more than one call

    def put(self, key: str, body: Body, what: str, *, headers: Mapping[str, str] | None = None, **more: Any) -> Reply:
        """PutObject with a checksum that the store has to check."""
        digest = base64.b64encode(body.md5).decode()
        reply = self.call("put_object", what, headers=headers, Key=key, Body=body, ContentMD5=digest, **more)
        with self._lock:
            self.bytes_written += body.size
        return reply

    def get(self, key: str, what: str, *, offset: int, length: int | None, version: str | None) -> bytes:
        """A range of an object, ``length`` None to its end. FileNotFoundError, BeyondEnd."""
        more: dict[str, Any] = {} if version is None else {"VersionId": version}
        if offset or length is not None:
            more["Range"] = f"bytes={offset}-{'' if length is None else offset + length - 1}"
        received: list[bytes] = []

        def read(fields: dict[str, Any]) -> None:
            received.clear()
            stream, size = fields["Body"], int(fields["ContentLength"])
            if "Range" in more and not str(fields.get("ContentRange", "")).startswith(f"bytes {offset}-"):
                raise StorageError(f"{self.place}: {what}: the store ignores ranges")
            try:
                _receive(stream, received, self.deadline(size))
            finally:
                stream.close()
            if sum(map(len, received)) != size:
                raise TimeoutError(f"the connection ended after {sum(map(len, received))} of {size} bytes")

        self.call("get_object", what, finish=read, Key=key, **more)
        data = b"".join(received)
        with self._lock:
            self.bytes_read += len(data)
        return data

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Key and size of every object whose key begins with ``prefix``."""
        more: dict[str, Any] = {}
        while True:
            fields = self.call("list_objects_v2", prefix, Prefix=prefix, **more).fields
            for entry in fields.get("Contents", ()):
                yield entry["Key"], int(entry["Size"])
            if not fields.get("IsTruncated"):
                return
            more = {"ContinuationToken": fields["NextContinuationToken"]}

    def versions(self, prefix: str) -> Iterator[Version]:
        """Every version and delete marker of the keys that begin with ``prefix``: by key, the newest first."""
        more: dict[str, Any] = {}
        while True:
            fields = self.call("list_object_versions", prefix, Prefix=prefix, **more).fields
            yield from _parse_versions(self._local.answer, f"{self.place}: {prefix}")
            if not fields.get("IsTruncated"):
                return
            more = {"KeyMarker": fields["NextKeyMarker"], "VersionIdMarker": fields.get("NextVersionIdMarker", "")}


def _receive(stream: Any, received: list[bytes], deadline: float) -> None:
    """Read an answer's body as it comes in. ``read`` of boto3 waits until all it was asked for is there, so that a
    store that sends a byte now and then would hold it for ever; ``read1`` of the connection below does not."""
    raw = getattr(stream, "_raw_stream", None)
    below = getattr(raw, "_fp", None)
    read = getattr(below, "read1", None) or stream.read
    while block := read(BLOCK):
        received.append(block)
        if time.monotonic() > deadline:
            raise TimeoutError("the store sends the data too slowly")
    if raw is not None and below is not None:
        raw.read()  # nothing is left: the connection goes back to the others


def _make_client(options: S3Options) -> Any:
    import boto3
    import botocore.session
    from botocore.config import Config

    settings: dict[str, Any] = {
        "connect_timeout": min(options.timeout, 20.0),
        "read_timeout": options.timeout,
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": options.connections,
        "signature_version": "s3v4",
        "s3": {"addressing_style": options.addressing},
        "user_agent_extra": "vmbackupd",
    }
    try:  # from 1.36 on boto3 adds checksums that many stores do not know; ours is Content-MD5
        config = Config(
            request_checksum_calculation="when_required", response_checksum_validation="when_required", **settings
        )
    except TypeError:
        config = Config(**settings)
    core = botocore.session.Session(profile=options.profile)
    if options.credentials_file is not None:
        core.set_config_variable("credentials_file", str(options.credentials_file))
    session = boto3.session.Session(botocore_session=core, region_name=options.region)
    return session.client(
        "s3",
        endpoint_url=options.endpoint,
        config=config,
        verify=None if options.ca_bundle is None else str(options.ca_bundle),
        # a store of one's own has no regions, but a signature contains one
        region_name=options.region or session.region_name or "us-east-1",
    )


def _parse_versions(answer: bytes, what: str) -> list[Version]:
    """ListVersionsResult of the S3 API, in document order."""
    try:
        root = ElementTree.fromstring(answer)
        encoded = any(_tag(node) == "EncodingType" and node.text == "url" for node in root)
        found = []
        for node in root:
            if _tag(node) in ("Version", "DeleteMarker"):
                texts = {_tag(child): child.text or "" for child in node}
                key = urllib.parse.unquote_plus(texts["Key"]) if encoded else texts["Key"]
                modified = _timestamp(texts["LastModified"])
                marker = _tag(node) == "DeleteMarker"
                size = 0 if marker else int(texts["Size"])
                etag = texts.get("ETag", "").strip('"')
                found.append(Version(key, texts["VersionId"], marker, size, etag, modified))
        return found
    except (ElementTree.ParseError, KeyError, ValueError) as reason:
        raise StorageError(f"{what}: the store's list of versions makes no sense: {reason}") from reason


def _tag(node: ElementTree.Element) -> str:
    return node.tag.rpartition("}")[2]


def _timestamp(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
