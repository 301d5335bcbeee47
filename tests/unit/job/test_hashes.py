"""What differs from an earlier image by hashes: exactly the chunks that do."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.engine.servers import nbdkit
from tests.unit.repository.repository_support import make
from vmbackupd.engine.nbd import NbdConnection
from vmbackupd.engine.progress import Progress
from vmbackupd.errors import Cancelled, GuestProtocolError
from vmbackupd.job.hashes import CHUNK, DIGEST, differing, digest

KEY = bytes(range(32))
SIZE = 300 * CHUNK + 1000


def digests(image: bytes) -> bytes:
    return b"".join(digest(image[at : at + CHUNK], KEY) for at in range(0, len(image), CHUNK))


def changed(image: bytearray, chance: random.Random) -> set[int]:
    """Change some chunks: one byte, to zeros, from zeros, the short one at the end."""
    numbers = set(chance.sample(range(301), 20)) | {300}
    for number in numbers:
        start, end = number * CHUNK, min((number + 1) * CHUNK, len(image))
        if chance.random() < 0.3 and any(image[start:end]):
            image[start:end] = bytes(end - start)
        else:
            image[chance.randrange(start, end)] ^= 0x55
    return numbers


@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_chunks_that_differ_are_found(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    image = bytearray(SIZE)
    for number in chance.sample(range(301), 200):
        image[number * CHUNK : number * CHUNK + 100] = chance.randbytes(100)
    image = image[:SIZE]
    repository = make(tmp_path / "repository")
    with repository.writer("one") as writer:
        sink = writer.image(SIZE)
        sink.write(0, image)
        source = writer.source(sink.finish())
        numbers = changed(image, chance)
        hashes = tmp_path / "hashes"
        hashes.write_bytes(digests(image))
        with nbdkit(tmp_path, "file", str(hashes)) as socket, NbdConnection(unix=socket) as connection:
            found = differing(connection, source, KEY, Progress())
    assert {first + at for first, count in found.runs() for at in range(count)} == numbers


def test_an_export_of_another_length_is_refused_and_a_cancellation_heard(tmp_path: Path) -> None:
    repository = make(tmp_path / "repository")
    hashes = tmp_path / "hashes"
    hashes.write_bytes(bytes(7 * DIGEST))
    with repository.writer("one") as writer:
        source = writer.source(writer.image(SIZE).finish())
        seven = writer.source(writer.image(7 * CHUNK).finish())
        with nbdkit(tmp_path, "file", str(hashes)) as socket, NbdConnection(unix=socket) as connection:
            with pytest.raises(GuestProtocolError, match="hashes"):
                differing(connection, source, KEY, Progress())
            stopped = Progress()
            stopped.cancel()
            with pytest.raises(Cancelled):
                differing(connection, seven, KEY, stopped)
            assert not differing(connection, seven, KEY, Progress()).count()
