"""What a bucket can do, found out by trying; StorageUnsuitable for one that cannot keep a repository safe."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import threading
from collections.abc import Callable
from typing import Any

from vmbackupd.errors import StorageDenied, StorageError, StorageUnsuitable
from vmbackupd.repository.s3capabilities import CONDITIONAL, VERSIONS, Capabilities
from vmbackupd.repository.s3client import Body, S3Client, Taken
from vmbackupd.repository.s3objects import PlainObjects, VersionedObjects, objects_of

RACERS = 8
ROUNDS = 3
YEAR = 365.0


def versioning(client: S3Client) -> str:
    """``""``, ``Enabled`` or ``Suspended``. StorageError."""
    fields = client.call("get_bucket_versioning", "bucket").fields
    return str(fields.get("Status", ""))


def mode_of(client: S3Client) -> str:
    """How puts are made exclusive in this bucket now. StorageUnsuitable where they cannot be."""
    status = versioning(client)
    if status == "Suspended":
        raise StorageUnsuitable(
            f"{client.place}: versioning of the bucket is suspended: switch it on, or take a bucket that never had it"
        )
    return VERSIONS if status == "Enabled" else CONDITIONAL


def probe(client: S3Client, prefix: str) -> Capabilities:
    """Try everything the repository needs, in objects below ``probe/`` that are removed again; about 60 requests.

    StorageUnsuitable, StorageError."""
    try:
        client.call("head_bucket", "bucket")
    except FileNotFoundError:
        raise StorageError(f"{client.place}: there is no bucket {client.bucket}: make it, vmbackupd does not") from None
    mode = mode_of(client)
    retention, days, lock_mode = _lock(client)
    capabilities = Capabilities(
        mode=mode,
        conditional_put=True,
        conditional_parts=False,
        etag_is_md5=False,
        lock_days=0.0,
        lock_mode=lock_mode,
        bucket_retention=retention,
        lease_seconds=client.options.lease_seconds,
    )
    capabilities = _conditional(client, prefix, capabilities)
    objects = objects_of(client, prefix, capabilities)
    _objects(objects)
    _race(objects)
    return dataclasses.replace(capabilities, lock_days=days)


def _lock(client: S3Client) -> tuple[bool, float, str]:
    """Does the bucket lock what is put into it by itself; for how many days shall we; how."""
    options = client.options
    try:
        fields = client.call("get_object_lock_configuration", "bucket").fields
    except (FileNotFoundError, StorageDenied, StorageError):
        fields = {}  # stores without object lock answer in many ways
    configuration: dict[str, Any] = fields.get("ObjectLockConfiguration", {})
    if configuration.get("ObjectLockEnabled") != "Enabled":
        if options.lock_days:
            raise StorageUnsuitable(
                f"{client.place}: lock_days is set, and the bucket has no object lock: "
                "it can only be had when a bucket is made"
            )
        return False, 0.0, options.lock_mode
    default: dict[str, Any] = configuration.get("Rule", {}).get("DefaultRetention", {})
    bucket_days = float(default.get("Days", 0) or 0) + YEAR * float(default.get("Years", 0) or 0)
    if options.lock_days:
        return bool(bucket_days), float(options.lock_days), options.lock_mode
    return bool(bucket_days), bucket_days, str(default.get("Mode", options.lock_mode)).lower()


def _name() -> str:
    return f"probe/{secrets.token_hex(12)}"


def _conditional(client: S3Client, prefix: str, capabilities: Capabilities) -> Capabilities:
    """Is If-None-Match heeded by PutObject and CompleteMultipartUpload? Is an entity tag the MD5 sum?"""
    objects = objects_of(client, prefix, capabilities)
    name = _name()
    key, body, none = prefix + name, Body([b"one"]), {"If-None-Match": "*"}

    def put() -> Any:
        lock = objects.lock_of(name)
        return client.put(key, body, name, headers=none, **({} if lock is None else lock.parameters()))

    try:
        first = put()
        conditional = _refused(put)
        if not conditional and capabilities.mode == CONDITIONAL:
            raise StorageUnsuitable(
                f"{client.place}: the store ignores If-None-Match, so two hosts could publish the same name: "
                "switch the bucket's versioning on (it is used instead), or take another store"
            )
        made = client.call("create_multipart_upload", name, Key=key)
        upload_id = made.fields["UploadId"]
        sent = client.call("upload_part", name, Key=key, UploadId=upload_id, PartNumber=1, Body=Body([b"two"]))
        parts = {"Parts": [{"ETag": sent.fields["ETag"], "PartNumber": 1}]}
        in_parts = _refused(
            lambda: client.call(
                "complete_multipart_upload", name, headers=none, Key=key, UploadId=upload_id, MultipartUpload=parts
            )
        )
        if in_parts:
            with contextlib.suppress(StorageError, FileNotFoundError):
                client.call("abort_multipart_upload", name, Key=key, UploadId=upload_id)
    finally:
        with contextlib.suppress(StorageError):
            objects.delete(name)
    return dataclasses.replace(
        capabilities,
        conditional_put=conditional,
        conditional_parts=in_parts,
        etag_is_md5=first.etag == body.md5.hex(),
    )


def _refused(put: Callable[[], Any]) -> bool:
    """Whether a conditional put on a name that is taken is refused, as it must be."""
    try:
        put()
    except Taken:
        return True
    except StorageError as reason:
        if "NotImplemented" not in str(reason):
            raise
    return False


def _objects(objects: PlainObjects | VersionedObjects) -> None:
    """One object's life, each step seen at once."""
    name, data = _name(), secrets.token_bytes(1000)
    client = objects.client

    def demand(right: bool, what: str) -> None:
        if not right:
            raise StorageUnsuitable(f"{client.place}: {what}: a repository cannot be kept there")

    try:
        demand(objects.put(name, [data]), "the store refuses a new object")
        demand(not objects.put(name, [b"other"]), "an object could be replaced")
        demand(objects.get(name, 0, None) == data, "an object is not read as it was written")
        demand(objects.get(name, 10, 20) == data[10:30], "a range of an object is not what was asked for")
        demand(objects.get(name, 5000, 20) == b"", "a range behind an object's end is not empty")
        demand([info.size for info in objects.list(name)] == [1000], "an object is not listed once it is written")
        demand(objects.delete(name), "an object cannot be removed")
        demand(not list(objects.list(name)), "a removed object is still listed")
        demand(objects.stat(name) is None, "a removed object is still there")
    finally:
        with contextlib.suppress(StorageError):
            objects.delete(name)


def _race(objects: PlainObjects | VersionedObjects) -> None:
    """Of several that put the same name at the same time exactly one may win."""
    for _ in range(ROUNDS):
        name, won, failed = _name(), list[int](), list[Exception]()
        start = threading.Barrier(RACERS)

        def put(racer: int, name: str, start: threading.Barrier, won: list[int], failed: list[Exception]) -> None:
            start.wait()
            try:
                if objects.put(name, [b"%d" % racer]):
                    won.append(racer)
            except Exception as reason:
                failed.append(reason)

        threads = [threading.Thread(target=put, args=(i, name, start, won, failed)) for i in range(RACERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]
        try:
            if len(won) != 1 or objects.get(name, 0, None) != b"%d" % won[0]:
                raise StorageUnsuitable(
                    f"{objects.client.place}: of {RACERS} that put one name at the same time {len(won)} were told "
                    "that they had won: publishing would not be safe there"
                )
        finally:
            with contextlib.suppress(StorageError):
                objects.delete(name)
