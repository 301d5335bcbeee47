"""What of a disk differs from an earlier image, by hashes that the guest computed: only these travel.

The guest helper serves, beside each disk, an export of 16 bytes for each 64 KiB chunk: BLAKE2b (RFC 7693) keyed with a
key of this job, zeros for a chunk of zeros. The host computes the same of the image that it has.
"""

from __future__ import annotations

import hashlib

from vmbackupd.engine.bitmap import Bitmap
from vmbackupd.engine.image import ImageSource
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.progress import Progress
from vmbackupd.engine.zero import all_zero
from vmbackupd.errors import Cancelled, GuestProtocolError
from vmbackupd.units import MiB

CHUNK = 65536
DIGEST = 16
GROUP = 256  # chunks asked for at once: 16 MiB of the disk, which the guest reads before it answers
_ZEROS = bytes(DIGEST)


def differing(hashes: NbdConnection, image: ImageSource, key: bytes, progress: Progress) -> Bitmap:
    """The chunks of a disk whose hash is not that of the same chunk of ``image``. Blocking.

    Raises ``SourceError``, ``GuestProtocolError`` when the export does not fit, ``RepositoryCorrupt``, ``Cancelled``.
    """
    chunks = -(-image.size // CHUNK)
    if hashes.size != chunks * DIGEST:
        raise GuestProtocolError(f"{hashes.export}: {hashes.size} bytes of hashes, expected {chunks * DIGEST}")
    differs = Bitmap(chunks)
    for first in range(0, chunks, GROUP):
        if progress.cancelled:
            raise Cancelled("cancelled while hashes were compared")
        count = min(GROUP, chunks - first)
        theirs = hashes.pread(first * DIGEST, count * DIGEST)
        for number, ours in enumerate(_digests(image, key, first, count)):
            if theirs[number * DIGEST : (number + 1) * DIGEST] != ours:
                differs.set(first + number)
    return differs


def _digests(image: ImageSource, key: bytes, first: int, count: int) -> list[bytes]:
    found = []
    for start in range(first * CHUNK, min((first + count) * CHUNK, image.size), MiB):
        data = memoryview(image.read(start, min(MiB, (first + count) * CHUNK - start, image.size - start)))
        found += [digest(data[at : at + CHUNK], key) for at in range(0, len(data), CHUNK)]
    return found


def digest(chunk: memoryview | bytes, key: bytes) -> bytes:
    """The hash of one chunk, as the guest helper computes it."""
    if all_zero(chunk):
        return _ZEROS
    return hashlib.blake2b(chunk, digest_size=DIGEST, key=key).digest()
