"""Memory does not grow with an image: 1 TiB with scattered data, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 256 * 2**20

PROGRAM = """
import random, sys
from pathlib import Path
from tests.unit.repository.repository_support import *
path, mode = Path(sys.argv[1]), sys.argv[2]
C = 65536
repository = make(path, chunk_size=C, fanout=256, settings=Settings(workers=2))
rng = random.Random(1)
count = 2**40 // C
unit = rng.randbytes(48)
def content(index):
    return (index.to_bytes(8, "little") + unit) * 1170

def chunk(index):
    return content(index).ljust(C, b".")
indexes = sorted({rng.randrange(count) for _ in range(20000)})
order = list(indexes)
if mode == "scattered":
    rng.shuffle(order)
with repository.writer("one") as writer:
    sink = writer.image(2**40)
    last = 0
    for index in order:
        if mode == "ascending":
            sink.zero(last, index - last)
            last = index + 1
        sink.write(index * C, chunk(index))
    if mode == "ascending":
        sink.zero(last, count - last)
    tree = sink.finish()
    stored = writer.bytes_stored
    update = writer.update(tree)
    for index in order[:100]:
        update.write(index * C, b"changed" + chunk(index)[7:])
    changed = update.finish()
    writer.publish(manifest("one", volume("vda", tree, 2**40), volume("vdb", changed, 2**40)))
source = reopen(path).image(tree)
assert [start // C + n for start, length in source.extents() for n in range(length // C)] == indexes
for index in order[:500]:
    assert source.read(index * C, C) == chunk(index)
assert reopen(path).image(changed).read(order[0] * C, 7) == b"changed"
# not getrusage: its maximum is inherited from the process that started this one
print(next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("mode", ["ascending", "scattered"])
def test_sparse_terabyte(tmp_path: Path, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), mode], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= LIMIT
