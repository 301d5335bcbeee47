"""All targets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz import guests, indexes, objects, packs, trees


@dataclass(frozen=True, slots=True)
class Target:
    """``run`` gets the fuzzer's bytes; ``seeds`` makes inputs to begin with; ``longest`` bounds inputs, in bytes."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    longest: int = 8192


TARGETS = {
    "pack": Target(packs.run_pack, packs.seeds_pack),
    "record": Target(packs.run_record, packs.seeds_record),
    "index": Target(indexes.run_index, indexes.seeds_index, 3 * 4096),
    "tree": Target(trees.run_tree, trees.seeds_tree),
    "manifest": Target(objects.run_manifest, objects.seeds_manifest),
    "envelope": Target(objects.run_envelope, objects.seeds_envelope, 1024),
    "header": Target(objects.run_header, objects.seeds_header, 2048),
    "slot": Target(objects.run_slot, objects.seeds_slot, 2048),
    "cowstore": Target(guests.run_cowstore, guests.seeds_cowstore, 65536),
    "helper": Target(guests.run_helper, guests.seeds_helper),
    "nbd": Target(guests.run_nbd, guests.seeds_nbd, 32768),
}
