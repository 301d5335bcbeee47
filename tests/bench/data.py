"""The image that is backed up: made from a seed, so that two runs on one machine measure the same bytes.

Half of it are holes. The rest are real files (this machine's ``/usr``, shuffled, each at a 4 KiB border as in a
filesystem), noise, and copies of what came before: half of them at chunk borders (a cloned disk), half at any 4 KiB
border (a copied file, which fixed chunks do not recognise and content-defined ones do).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

BLOCK = 4096
ALIGN = 65536
SEED = 20240607
WEIGHTS = {"files": 66, "noise": 12, "clone": 11, "copy": 11}
SHORTEST, LONGEST = 64 << 10, 16 << 20


def real_files(rng: random.Random, root: Path = Path("/usr")) -> Iterator[bytes]:
    """Contents of regular files below ``root``, padded to whole blocks, in random order; begins again at the end."""
    paths = []
    for directory, _, names in os.walk(root):
        paths += [os.path.join(directory, name) for name in names]
    paths.sort()
    rng.shuffle(paths)
    while True:
        for name in paths:
            path = Path(name)
            if path.is_symlink() or not path.is_file() or not 0 < path.stat().st_size <= LONGEST:
                continue
            content = path.read_bytes()
            yield content + bytes(-len(content) % BLOCK)


class Image:
    """A sparse file under construction."""

    def __init__(self, descriptor: int, size: int, rng: random.Random) -> None:
        self._descriptor = descriptor
        self._rng = rng
        self._files = real_files(rng)
        self._left = b""
        self._written: list[tuple[int, int]] = []
        self.size = size

    def fill(self) -> int:
        """Alternate data and holes up to the end; the bytes of data."""
        at = data = 0
        holes = 0
        while at < self.size:
            length = self._length(self.size - at)
            if data <= holes:
                kind = self._rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
                content = self._content(kind, length)
                os.pwrite(self._descriptor, content, at)
                self._written.append((at, len(content)))
                data += len(content)
            else:
                holes += length
            at += length + -length % ALIGN
        return data

    def _length(self, room: int) -> int:
        """Bytes of the next part: many are short, most bytes are in long ones."""
        length = int(SHORTEST * (LONGEST / SHORTEST) ** self._rng.random())
        return min(length // BLOCK * BLOCK, room)

    def _content(self, kind: str, length: int) -> bytes:
        if kind == "noise":
            return self._rng.randbytes(length)
        if kind in ("clone", "copy") and self._written:
            return self._copied(length, self._rng.randrange(1, ALIGN // BLOCK) * BLOCK if kind == "copy" else 0)
        return self._real(length)

    def _copied(self, length: int, skip: int) -> bytes:
        """Parts of what is there already, each from ``skip`` bytes after a chunk border on."""
        parts, have = [], 0
        while have < length:
            offset, there = self._rng.choice(self._written)
            parts.append(
                os.pread(self._descriptor, max(min(length - have, there - skip), 0) // ALIGN * ALIGN, offset + skip)
            )
            have += len(parts[-1])
            if length - have < ALIGN or len(parts) == 64:  # the rest is no whole chunk; or what is there is all short
                break
        return b"".join(parts) + self._real(length - have)

    def _real(self, length: int) -> bytes:
        parts = [self._left]
        have = len(self._left)
        while have < length:
            parts.append(next(self._files))
            have += len(parts[-1])
        whole = b"".join(parts)
        self._left = whole[length:]
        return whole[:length]


def make_image(path: Path, size: int, seed: int = SEED) -> int:
    """Write the image of ``size`` bytes to ``path``; the bytes of data in it."""
    with path.open("wb+") as file:
        file.truncate(size)
        return Image(file.fileno(), size, random.Random(seed)).fill()


if __name__ == "__main__":
    print(make_image(Path(sys.argv[1]), int(sys.argv[2])))
