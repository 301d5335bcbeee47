"""The undo journal: what is written is there after a crash, and only what is not undone."""

from __future__ import annotations

import random
from contextlib import closing
from pathlib import Path

import pytest

from vmbackupd.job.journal import Header, Journal, JournalCorrupt

HEADER = Header("j00000001", "backup", "web1", "6f1f7a0e-0000-4000-8000-000000000001")


def test_pending_undos_come_back_newest_first(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, HEADER)
    first = journal.record("unlink", path="/a")
    journal.record("detach_channel", name="c")
    journal.record("thaw")
    journal.done(first)
    again = Journal.load(journal.path)
    assert [entry.undo for entry in again.pending] == ["thaw", "detach_channel"]
    assert again.header == HEADER
    again.close()
    journal.close()


def test_a_journal_with_nothing_to_undo_is_removed(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, HEADER)
    journal.done(journal.record("thaw"))
    journal.close()
    assert not list(tmp_path.iterdir())


def test_a_loaded_journal_goes_on_where_it_was(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, HEADER)
    journal.record("thaw")
    again = Journal.load(journal.path)
    entry = again.record("unlink", path="/b")
    assert entry.seq == 2
    for pending in again.pending:
        again.done(pending)
    again.close()
    assert not journal.path.exists()


def test_cut_anywhere_it_holds_what_was_complete(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, HEADER)
    for number in range(20):
        journal.record("unlink", path=f"/file{number}")
    data = journal.path.read_bytes()
    for cut in range(len(data) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(data[:cut])
        complete = data[:cut].count(b"\n")
        with closing(Journal.load(path)) as loaded:
            assert len(loaded.pending) == max(0, complete - 1)
            if complete:
                loaded.record("thaw")  # a torn line must not run into the next one
                with closing(Journal.load(path)) as again:
                    assert len(again.pending) == complete


def test_a_damaged_line_is_refused_with_the_file_named(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, HEADER)
    for number in range(5):
        journal.record("unlink", path=f"/file{number}")
    data = bytearray(journal.path.read_bytes())
    chance = random.Random(7)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        journal.path.write_bytes(damaged)
        try:
            Journal.load(journal.path).close()
        except JournalCorrupt as error:
            assert str(journal.path) in str(error)


def test_two_jobs_cannot_share_a_journal(tmp_path: Path) -> None:
    Journal.create(tmp_path, HEADER)
    with pytest.raises(FileExistsError):
        Journal.create(tmp_path, HEADER)
