"""Which tool stands in which row, in the order in which they take turns; what the rows shall show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from tests.bench import peers, works
from tests.bench.measure import Sample
from tests.bench.works import LIMIT, OURS, Bench

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One tool's part in one work."""

    work: str
    tool: str
    measure: Callable[[Bench], Sample]


GROUPS: list[list[Entry]] = [
    [
        Entry("full-backup", OURS, works.full_backup),
        Entry("limit-compress", LIMIT, lambda bench: bench.limit("compress")),
        Entry("full-backup-encrypted", OURS, works.full_backup_encrypted),
        Entry("full-backup", "qemu-img", peers.qemu_img_backup),
        Entry("full-backup", "borg", peers.borg_backup),
        Entry("full-backup", "restic", peers.restic_backup),
        Entry("full-backup", "virtnbdbackup", peers.virtnbdbackup_backup),
        Entry("full-backup", "zstd", peers.zstd_backup),
        Entry("full-backup", "nbdcopy", peers.nbdcopy_backup),
        Entry("parallel-16", OURS, works.parallel_16),
    ],
    [
        Entry("second-backup-scan", OURS, works.second_backup_scan),
        Entry("limit-read-hash", LIMIT, lambda bench: bench.limit("read-hash")),
        Entry("second-backup-scan", "borg", peers.borg_scan),
        Entry("second-backup-scan", "restic", peers.restic_scan),
    ],
    [Entry("second-backup-tracked", OURS, works.second_backup_tracked)],
    [
        Entry("one-percent-tracked", OURS, works.one_percent),
        Entry("one-percent-tracked", LIMIT, works.one_percent_limit),
    ],
    [
        Entry("restore", OURS, works.restore),
        Entry("restore", "qemu-img", peers.qemu_img_restore),
        Entry("restore", "borg", peers.borg_restore),
        Entry("restore", "restic", peers.restic_restore),
        Entry("restore", "zstd", peers.zstd_restore),
    ],
    [
        Entry("verify", OURS, works.verify),
        Entry("limit-verify", LIMIT, lambda bench: bench.limit("verify")),
        Entry("verify", "borg", peers.borg_verify),
        Entry("verify", "restic", peers.restic_verify),
    ],
]

WORKS = list(dict.fromkeys(entry.work for group in GROUPS for entry in group))
COMPANIONS = {
    "full-backup": {"limit-compress"},
    "full-backup-encrypted": {"full-backup"},
    "parallel-16": {"limit-compress"},
    "second-backup-scan": {"limit-read-hash"},
    "verify": {"limit-verify"},
}
"""Works that are measured along with a work: its limit, or what it is compared with."""


@dataclass
class Row:
    """All samples of a tool at a work."""

    work: str
    tool: str
    samples: list[Sample]

    @property
    def seconds(self) -> float:
        return median(sample.seconds for sample in self.samples)

    @property
    def peak_rss(self) -> int:
        return max(sample.peak_rss for sample in self.samples)

    @property
    def bytes_in(self) -> int:
        return self.samples[-1].bytes_in

    @property
    def bytes_stored(self) -> int:
        return int(median(sample.bytes_stored for sample in self.samples))

    @property
    def figures(self) -> dict[str, float]:
        """The median of each figure."""
        return {name: median(sample.figures[name] for sample in self.samples) for name in self.samples[-1].figures}

    def to_json(self) -> dict[str, object]:
        told: dict[str, object] = {
            "work": self.work,
            "tool": self.tool,
            "seconds": [round(sample.seconds, 4) for sample in self.samples],
            "bytes_in": self.bytes_in,
            "bytes_stored": self.bytes_stored,
            "peak_rss": self.peak_rss,
        }
        if self.figures:
            told["figures"] = {name: [sample.figures[name] for sample in self.samples] for name in self.figures}
        return told


Rows = Mapping[tuple[str, str], Row]


@dataclass(frozen=True, slots=True)
class Target:
    """A promise: what is compared, the figure (None while a row is missing), and where it has to be."""

    text: str
    figure: Callable[[Rows], float | None]
    bound: float
    at_least: bool = True
    unit: str = "x"

    def holds(self, figure: float) -> bool:
        return figure >= self.bound if self.at_least else figure <= self.bound


def faster(work: str, peer: str, peer_work: str = "", ours: str = OURS) -> Callable[[Rows], float | None]:
    """How many times the time of ours the peer (or the limit) needs."""

    def figure(rows: Rows) -> float | None:
        own, other = rows.get((work, ours)), rows.get((peer_work or work, peer))
        return other.seconds / own.seconds if own and other else None

    return figure


def _overhead(rows: Rows) -> float | None:
    ours, least = rows.get(("one-percent-tracked", OURS)), rows.get(("one-percent-tracked", LIMIT))
    return ours.bytes_stored / least.bytes_stored if ours and least else None


def _tracked(rows: Rows) -> float | None:
    row = rows.get(("second-backup-tracked", OURS))
    return row.seconds if row else None


def _memory(rows: Rows) -> float | None:
    peaks = [row.peak_rss for (_, tool), row in rows.items() if tool == OURS]
    return max(peaks) / MiB if peaks else None


def _encryption(rows: Rows) -> float | None:
    plain, sealed = rows.get(("full-backup", OURS)), rows.get(("full-backup-encrypted", OURS))
    return sealed.seconds / plain.seconds if plain and sealed else None


TARGETS = [
    Target("full backup, against qemu-img convert -c (zstd)", faster("full-backup", "qemu-img"), 2.0),
    Target("full backup, against borg", faster("full-backup", "borg"), 3.0),
    Target("full backup, against restic", faster("full-backup", "restic"), 5.0),
    Target("full backup, of zstd-1 in memory on all cores", faster("full-backup", LIMIT, "limit-compress"), 0.75),
    Target("second backup, all read, against borg", faster("second-backup-scan", "borg"), 4.0),
    Target("second backup, all read, against restic --force", faster("second-backup-scan", "restic"), 8.0),
    Target(
        "second backup, all read, of read + BLAKE3 on all cores",
        faster("second-backup-scan", LIMIT, "limit-read-hash"),
        0.7,
    ),
    Target("second backup, tracked, 1 TiB image", _tracked, 1.0, at_least=False, unit=" s"),
    Target("1 % changed, tracked: bytes stored, of the chunks' own", _overhead, 1.25, at_least=False),
    Target("restore, against qemu-img convert", faster("restore", "qemu-img"), 1.5),
    Target("restore, against borg extract", faster("restore", "borg"), 3.0),
    Target("restore, against restic restore", faster("restore", "restic"), 3.0),
    Target("verify, of decompress + BLAKE3 on all cores", faster("verify", LIMIT, "limit-verify"), 0.8),
    Target("peak memory, any of these", _memory, 256, at_least=False, unit=" MiB"),
    Target("encryption on: time, of encryption off", _encryption, 1.15, at_least=False),
    Target("16 NBD sources, of zstd-1 in memory on all cores", faster("parallel-16", LIMIT, "limit-compress"), 0.5),
]
