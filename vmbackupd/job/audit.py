"""The audit of what is said to be unchanged: a random sample of it is read all the same and compared.

Each unchanged chunk is in the sample with probability ``share``, so that of ``n`` chunks which changed unseen at least
one is found with probability ``1 - (1 - share) ** n``.
"""

from __future__ import annotations

import random

from vmbackupd.engine.bitmap import Bitmap


def sample(changed: Bitmap, share: float, source: random.Random | None = None) -> Bitmap:
    """Chunks that are clear in ``changed``, each taken with probability ``share`` (0 to 1), at least one if there are
    any and ``share`` is not 0. ``source``: of chance, the system's if None."""
    chance = source or random.SystemRandom()
    taken = Bitmap(changed.length)
    if not share:
        return taken
    for index in chance.sample(range(changed.length), max(1, round(share * changed.length)) if changed.length else 0):
        if not changed[index]:
            taken.set(index)
    if not taken.count():
        clear = whole(changed.length)
        clear.subtract(changed)
        for first, _ in clear.runs():
            taken.set(first)
            break
    return taken


def whole(length: int) -> Bitmap:
    """All of ``length`` chunks."""
    every = Bitmap(length)
    if length:
        every.set(0, length)
    return every
