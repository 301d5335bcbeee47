"""Bringing an object's bytes into a bucket, in one piece or in parts, and looking whether they are there."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from vmbackupd.errors import BackupError, StorageError
from vmbackupd.repository.s3client import Body, Reply, S3Client, Taken

if TYPE_CHECKING:
    from typing_extensions import Buffer

TOKEN = "vmbackupd-put"
"""Metadata of an object: which call of ``put_if_absent`` made it."""
LARGEST_PUT = 5 * 2**30  # bytes that S3 takes in one piece


@dataclass(frozen=True, slots=True)
class Lock:
    """An object lock to put on an object: ``governance`` or ``compliance``, and until when (seconds since 1970)."""

    mode: str
    until: float

    def parameters(self) -> dict[str, Any]:
        """For PutObject and CreateMultipartUpload."""
        return {
            "ObjectLockMode": self.mode.upper(),
            "ObjectLockRetainUntilDate": datetime.fromtimestamp(self.until, UTC),
        }

    def retention(self) -> dict[str, Any]:
        """For PutObjectRetention."""
        return {"Mode": self.mode.upper(), "RetainUntilDate": datetime.fromtimestamp(self.until, UTC)}


@dataclass(frozen=True, slots=True)
class Upload:
    """What was sent. ``etag``: what the store should call it. ``version``: its id, None where there are none."""

    size: int
    etag: str
    version: str | None
    token: str
    attempts: int


def new_token() -> str:
    """A name for one call of ``put_if_absent``."""
    return secrets.token_hex(16)


def upload(
    client: S3Client,
    key: str,
    what: str,
    parts: Iterable[Buffer],
    *,
    token: str,
    lock: Lock | None,
    exclusive: bool,
    in_parts: bool,
) -> Upload:
    """Send an object. ``exclusive``: with If-None-Match; Taken if the store refuses for it. ``in_parts``: large ones
    may be sent in parts. StorageError and its kinds."""
    copied = isinstance(parts, list | tuple)
    buffers = (part if copied else bytes(part) for part in parts)  # a generator may use its buffer again
    threshold = client.options.multipart_threshold if in_parts else LARGEST_PUT
    held, size = list[Any](), 0
    for part in buffers:
        held.append(part)
        size += memoryview(part).nbytes
        if size > threshold:
            if not in_parts:
                raise StorageError(f"{client.place}: {what} has more than {LARGEST_PUT} bytes, the store takes no more")
            blocks = _cut(itertools.chain(held, buffers), client.options.part_size)
            return _upload_parts(client, key, what, blocks, token, lock, exclusive)
    body = Body(held)
    reply = client.put(
        key,
        body,
        what,
        headers=_headers(exclusive),
        Metadata={TOKEN: token},
        **({} if lock is None else lock.parameters()),
    )
    return Upload(body.size, body.md5.hex(), reply.version, token, reply.attempts)


def _headers(exclusive: bool) -> Mapping[str, str]:
    return {"If-None-Match": "*"} if exclusive else {}


def _cut(buffers: Iterator[Any], size: int) -> Iterator[list[memoryview]]:
    """The bytes of ``buffers`` as lists of ``size`` bytes each, the last one of fewer."""
    block, room = list[memoryview](), size
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        while view:
            piece, view = view[:room], view[room:]
            block.append(piece)
            room -= len(piece)
            if not room:
                yield block
                block, room = [], size
    if block:
        yield block


def _upload_parts(
    client: S3Client,
    key: str,
    what: str,
    blocks: Iterator[list[memoryview]],
    token: str,
    lock: Lock | None,
    exclusive: bool,
) -> Upload:
    made = client.call(
        "create_multipart_upload",
        what,
        Key=key,
        Metadata={TOKEN: token},
        **({} if lock is None else lock.parameters()),
    )
    upload_id = made.fields["UploadId"]
    try:
        sent, digests, size = [], hashlib.md5(usedforsecurity=False), 0
        for number, block in enumerate(blocks, 1):
            body = Body(block)
            reply = _upload_part(client, key, what, upload_id, number, body)
            sent.append({"ETag": reply.fields["ETag"], "PartNumber": number})
            digests.update(body.md5)
            size += body.size
        done = _complete(client, key, what, upload_id, sent, token, exclusive)
    except BaseException:
        with contextlib.suppress(BackupError, FileNotFoundError):
            client.call("abort_multipart_upload", what, Key=key, UploadId=upload_id)
        raise
    if lock is not None:
        _lock_parts(client, key, what, done.version, lock)
    return Upload(size, f"{digests.hexdigest()}-{len(sent)}", done.version, token, made.attempts + done.attempts)


def _upload_part(client: S3Client, key: str, what: str, upload_id: str, number: int, body: Body) -> Reply:
    reply = client.call(
        "upload_part",
        what,
        Key=key,
        UploadId=upload_id,
        PartNumber=number,
        Body=body,
        ContentMD5=base64.b64encode(body.md5).decode(),
    )
    client.bytes_written += body.size
    return reply


def _complete(
    client: S3Client, key: str, what: str, upload_id: str, sent: list[dict[str, Any]], token: str, exclusive: bool
) -> Reply:
    """CompleteMultipartUpload: an attempt after one whose answer was lost is told that there is no such upload."""
    try:
        return client.call(
            "complete_multipart_upload",
            what,
            headers=_headers(exclusive),
            Key=key,
            UploadId=upload_id,
            MultipartUpload={"Parts": sent},
        )
    except (StorageError, Taken):
        try:
            found = client.call("head_object", what, Key=key)
        except (BackupError, FileNotFoundError):
            found = None
        if found is None or token_of(found) != token:
            raise
        return found


def _lock_parts(client: S3Client, key: str, what: str, version: str | None, lock: Lock) -> None:
    """Some stores (Ceph 16) forget the lock that an upload in parts was begun with."""
    more: dict[str, Any] = {} if version is None else {"VersionId": version}
    until = locked_until(client.call("head_object", what, Key=key, **more))
    if until is None or until < lock.until - 5:
        client.call("put_object_retention", what, Key=key, Retention=lock.retention(), **more)


def token_of(head: Reply) -> str | None:
    """Which call of ``put_if_absent`` made the object that HeadObject told of."""
    value = head.fields.get("Metadata", {}).get(TOKEN)
    return None if value is None else str(value)


def locked_until(head: Reply) -> float | None:
    """Until when the object that HeadObject told of is locked, in seconds since 1970; None if it is not."""
    if head.fields.get("ObjectLockLegalHoldStatus") == "ON":
        return float("inf")
    until = head.fields.get("ObjectLockRetainUntilDate")
    return None if until is None else float(until.timestamp())
