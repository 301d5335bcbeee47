"""Revert: against the reference on random volumes, maps and disks; and on maps and stores that can't be."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from tests.engine.stores import make_store, room_for
from vmbackupd.engine import reference
from vmbackupd.engine.cowstore import CowStore
from vmbackupd.engine.memory import MemorySink, MemorySource
from vmbackupd.engine.progress import Progress
from vmbackupd.engine.readable import ReadableSource
from vmbackupd.engine.revert import RevertedSource, RevertPlan, patch, revert_image
from vmbackupd.errors import Cancelled, StoreCorrupt
from vmbackupd.model import Segment, VolumeMap


class Scene:
    """Some volumes scattered over two disks, with a store each on one scratch disk, all of it random."""

    def __init__(self, rng: random.Random) -> None:
        sector = 64  # nothing depends on 512
        self.disks = {name: rng.randbytes(sector * rng.randrange(200, 500)) for name in ("vdb", "sda")}
        pieces = [
            (name, at, min(sector * 8, len(image) - at))
            for name, image in self.disks.items()
            for at in range(0, len(image), sector * 8)
        ]
        rng.shuffle(pieces)
        self.volumes: list[VolumeMap] = []
        scratch = bytearray(rng.randbytes(sector * rng.randrange(20)))
        for number in range(rng.randrange(1, 4)):
            segments, size = [], 0
            for _ in range(rng.randrange(1, 12)):
                if not pieces:
                    break
                disk, at, length = pieces.pop()
                lead = rng.choice([0, sector])
                part = max(sector, length - lead - rng.choice([0, sector]))
                part = min(part, length - lead)
                if part <= 0:
                    continue
                segments.append(Segment(size, disk, at + lead, part))
                size += part
            if not size:
                continue
            chunk = rng.choice([512, 1024])
            chunks = -(-size // chunk)
            olds = rng.sample(range(chunks), rng.randrange(chunks + 1))
            store, _ = make_store(olds, chunk, room_for(len(olds), chunk) + rng.randrange(2000), rng)
            scratch += rng.randbytes(rng.randrange(3) * sector)
            self.volumes.append(VolumeMap(f"v{number}", size, len(scratch), len(store), tuple(segments)))
            scratch += store
        self.scratch = bytes(scratch)

    def store(self, volume: VolumeMap) -> CowStore:
        base = volume.store_offset
        return CowStore(lambda at, n: self.scratch[base + at : base + at + n], volume.store_length, volume.size)

    def plan(self, disk: str) -> RevertPlan:
        plan = RevertPlan(len(self.disks[disk]))
        for volume in self.volumes:
            plan.add_volume(volume, disk, self.store(volume))
        plan.finish()
        return plan

    def read(self, offset: int, length: int) -> bytes:
        return self.scratch[offset : offset + length]


def test_whole_images_against_the_reference(rng: random.Random) -> None:
    for _ in range(60):
        scene = Scene(rng)
        for disk, image in scene.disks.items():
            expected = reference.revert(image, disk, scene.scratch, scene.volumes)
            plan = scene.plan(disk)
            chunk = rng.choice([64, 512, 4096])
            source = MemorySource.over(image, chunk)
            sink = MemorySink(len(image), chunk)
            store = MemorySource.over(scene.scratch, rng.choice([64, 512, 4096, 65536]))
            count = revert_image(plan, source, store, sink)
            touched = list(plan.chunks(chunk))
            assert touched == sorted(set(touched))
            assert set(sink.chunks) | sink.zeros == set(touched) and count == len(touched)
            result = bytearray(image)
            for index in touched:
                data = sink.chunks.get(index) or bytes(min(chunk, len(image) - index * chunk))
                result[index * chunk : index * chunk + len(data)] = data
            assert bytes(result) == expected


def test_reading_a_reverted_image_against_the_reference(rng: random.Random) -> None:
    for _ in range(60):
        scene = Scene(rng)
        for disk, image in scene.disks.items():
            holes = rng.sample(range(len(image) // 64), len(image) // 80)
            image = b"".join(bytes(64) if at // 64 in holes else image[at : at + 64] for at in range(0, len(image), 64))
            expected = reference.revert(image, disk, scene.scratch, scene.volumes)
            chunk = rng.choice([64, 512, 4096])
            store = MemorySource.over(scene.scratch, rng.choice([64, 512, 4096]))
            plan = scene.plan(disk)
            source = ReadableSource(RevertedSource(plan, MemorySource.over(image, chunk), store))
            assert source.read(0, len(image)) == expected
            touched = set(plan.chunks(chunk))
            data = {at // chunk for at in range(0, len(image), 64) if any(image[at : at + 64])} | touched
            at = 0
            for offset, length, is_data in source.extents(0, len(image)):
                assert offset == at
                assert all((index in data) == is_data for index in range(at // chunk, -(-(at + length) // chunk)))
                at += length
            assert at == len(image)
            start = rng.randrange(len(image))
            length = rng.randrange(len(image) - start)
            assert source.read(start, length) == expected[start : start + length]


def test_buffers_against_the_reference(rng: random.Random) -> None:
    for _ in range(40):
        scene = Scene(rng)
        for disk, image in scene.disks.items():
            expected = reference.revert(image, disk, scene.scratch, scene.volumes)
            plan = scene.plan(disk)
            for _ in range(10):
                start = rng.randrange(len(image))
                end = rng.randrange(start + 1, len(image) + 1)
                buffer = bytearray(image[start:end])
                pieces = patch(plan, start, buffer, scene.read)
                assert buffer == expected[start:end]
                assert pieces == sum(at < end and at + n > start for at, _, n in plan.pieces_list())
                assert patch(plan, start, bytearray(), scene.read) == 0


def test_counts(rng: random.Random) -> None:
    for _ in range(40):
        scene = Scene(rng)
        for disk in scene.disks:
            plan = scene.plan(disk)
            touching = 0
            for volume in scene.volumes:
                store = scene.store(volume)
                for old, _ in store.exceptions():
                    first, last = old * store.chunk_size, min((old + 1) * store.chunk_size, volume.size)
                    touching += any(
                        segment.disk == disk
                        and segment.volume_offset < last
                        and segment.volume_offset + segment.length > first
                        for segment in volume.segments
                    )
            assert plan.count == touching
            assert len(plan) == len(plan.pieces_list()) >= plan.count
            assert plan.piece_bytes == sum(length for _, _, length in plan.pieces_list())


def one_volume(rng: random.Random) -> tuple[VolumeMap, CowStore]:
    data, _ = make_store([0, 2, 5], 512, room_for(3, 512), rng)
    volume = VolumeMap("root", 4096 - 100, 0, len(data), (Segment(0, "vda", 1000, 3000), Segment(3000, "sda", 0, 996)))
    return volume, CowStore(lambda at, n: data[at : at + n], len(data), volume.size)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": 4096}, "the store was read for"),
        ({"store_length": 512}, "the store was read for"),
        ({"store_offset": -1}, "begin at byte -1"),
        ({"segments": (Segment(0, "vda", 1000, 3000),)}, "covers 3000 of 3996"),
        ({"segments": ()}, "covers 0 of 3996"),
        ({"segments": (Segment(1, "vda", 0, 3996),)}, "gap, overlap or nonsense at byte 0"),
        ({"segments": (Segment(0, "vda", 0, 3000), Segment(2999, "vda", 3000, 997))}, "nonsense at byte 3000"),
        ({"segments": (Segment(0, "vda", 0, 0), Segment(0, "vda", 0, 3996))}, "nonsense at byte 0"),
        ({"segments": (Segment(0, "vda", -5, 3996),)}, "nonsense at byte 0"),
        ({"segments": (Segment(0, "vda", 6005, 3996),)}, "reaches to byte 10001 of a disk of 10000"),
        ({"segments": (Segment(0, "vda", 2**64, 3996),)}, "of a disk of 10000"),
    ],
)
def test_maps_that_cannot_be(rng: random.Random, changes: dict[str, object], sentence: str) -> None:
    volume, store = one_volume(rng)
    with pytest.raises(StoreCorrupt, match=sentence):
        RevertPlan(10_000).add_volume(replace(volume, **changes), "vda", store)


def test_two_volumes_that_claim_the_same_bytes(rng: random.Random) -> None:
    volume, store = one_volume(rng)
    plan = RevertPlan(10_000)
    plan.add_volume(volume, "vda", store)
    plan.add_volume(replace(volume, name="home"), "vda", store)
    with pytest.raises(StoreCorrupt, match="both claim byte 1000"):
        plan.finish()


def test_a_plan_is_used_after_it_is_finished_and_not_before(rng: random.Random) -> None:
    volume, store = one_volume(rng)
    plan = RevertPlan(10_000)
    plan.add_volume(volume, "vda", store)
    with pytest.raises(ValueError, match="not finished"):
        patch(plan, 0, bytearray(10), lambda at, n: bytes(n))
    plan.finish()
    plan.finish()
    with pytest.raises(ValueError, match="is finished"):
        plan.add_volume(volume, "vda", store)
    assert plan.count == 3 and plan.piece_bytes == 512 * 2 + (3000 - 2560)


def test_stores_beyond_the_scratch_disk(rng: random.Random) -> None:
    volume, store = one_volume(rng)
    plan = RevertPlan(4000)
    plan.add_volume(volume, "vda", store)
    plan.finish()
    image = MemorySource(4000, 512)
    with pytest.raises(StoreCorrupt, match="scratch disk of 100"):
        revert_image(plan, image, MemorySource(100, 512), MemorySink(4000, 512))
    with pytest.raises(ValueError, match="for a plan of 4000"):
        revert_image(plan, MemorySource(3999, 512), MemorySource(1 << 20, 512), MemorySink(3999, 512))
    with pytest.raises(StoreCorrupt, match="gave 3 bytes"):
        patch(plan, 0, bytearray(4000), lambda at, n: b"abc")


def test_cancel(rng: random.Random) -> None:
    volume, store = one_volume(rng)
    plan = RevertPlan(4000)
    plan.add_volume(volume, "vda", store)
    plan.finish()
    progress = Progress()
    image = MemorySource(4000, 512)
    image.on_get = lambda index: progress.cancel()
    with pytest.raises(Cancelled):
        revert_image(plan, image, MemorySource(1 << 20, 512), MemorySink(4000, 512), progress)


def test_chunks_that_become_zero_are_put_as_zeros() -> None:
    data, _ = make_store([1], 512, 4096, random.Random(1))
    data = data[:1024] + bytes(3072)  # the store says: it was zeros
    volume = VolumeMap("v", 2048, 0, 4096, (Segment(0, "vda", 0, 2048),))
    plan = RevertPlan(2048)
    plan.add_volume(volume, "vda", CowStore(lambda at, n: data[at : at + n], 4096, 2048))
    plan.finish()
    sink = MemorySink(2048, 512)
    assert revert_image(plan, MemorySource.over(b"x" * 2048, 512), MemorySource.over(data, 512), sink) == 1
    assert sink.zeros == {1} and not sink.chunks


def test_readable_source(rng: random.Random) -> None:
    data = rng.randbytes(5000)
    source = ReadableSource(MemorySource.over(data, 64))
    assert source.size == 5000
    for _ in range(500):
        start = rng.randrange(5001)
        length = rng.randrange(5001 - start)
        assert source.read(start, length) == data[start : start + length]
    for offset, length in [(-1, 1), (0, 5001), (5000, 1), (1, -1)]:
        with pytest.raises(ValueError, match="not inside"):
            source.read(offset, length)


def test_readable_source_fills_buffers(rng: random.Random) -> None:
    data = rng.randbytes(5000)
    source = ReadableSource(MemorySource.over(data, 64))
    for _ in range(500):
        start = rng.randrange(5001)
        buffer = bytearray(rng.randrange(5001 - start))
        source.read_buffer(start, buffer)
        assert buffer == data[start : start + len(buffer)]
    for offset, length in [(-1, 1), (0, 5001), (5000, 1)]:
        with pytest.raises(ValueError, match="not inside"):
            source.read_buffer(offset, bytearray(length))


def test_readable_source_tells_data_from_holes(rng: random.Random) -> None:
    for _ in range(50):
        size = rng.randrange(1, 5000)
        chunks = {at: rng.randbytes(min(64, size - at * 64)) for at in range(-(-size // 64)) if rng.random() < 0.4}
        source = ReadableSource(MemorySource(size, 64, chunks))
        start = rng.randrange(size)
        length = rng.randrange(1, size - start + 1)
        expected = [at // 64 in chunks for at in range(start, start + length)]
        found = source.extents(start, length)
        assert [is_data for _, length, is_data in found for _ in range(length)] == expected
        assert all(offset + length == follower[0] for (offset, length, _), follower in pairwise(found))
        assert all(a[2] != b[2] for a, b in pairwise(found))
        some = source.extents(start, length, limit=1)
        flags = [is_data for _, length, is_data in some for _ in range(length)]
        assert 1 <= len(some) <= 2 and some[0][0] == start and flags == expected[: len(flags)]
        assert source.extents(start, 0) == []
    with pytest.raises(ValueError, match="not inside"):
        source.extents(size, 1)
