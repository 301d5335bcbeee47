"""The configured repository: shared while it is in use, made with the keys there are, and what jobs do with it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from tests.unit.api.support import SmallRunner
from vmbackupd.config import Config, parse
from vmbackupd.errors import ConfigError, InvalidArgument, KeyRequired, RepositoryMissing
from vmbackupd.job import care as care_module
from vmbackupd.job.care import RepositoryCare, Stage
from vmbackupd.job.manager import JobContext, JobManager, Result
from vmbackupd.job.observer import JobObserver
from vmbackupd.job.options import GcOptions, InitOptions
from vmbackupd.job.repositories import Repositories
from vmbackupd.model import Consistency, Method, RevertMode, VolumeKind, VolumeRecord
from vmbackupd.repository import Manifest, Repository, VmIdentity


def configured(directory: Path, more: str = "") -> Config:
    config = parse(f'state_directory = "{directory}/state"\n[repository]\npath = "{directory}/repository"\n{more}')
    config.state_directory.mkdir(exist_ok=True)
    return config


def made(directory: Path, more: str = "") -> Repositories:
    repositories = Repositories(configured(directory, more))
    repositories.create(InitOptions()).close()
    return repositories


def add_backup(repository: Repository, number: int, vm: str = "web") -> str:
    """Publish a backup with T1 ``number`` days after the epoch."""
    with repository.writer(f"{vm}-{number}") as writer:
        image = writer.image(65536)
        image.write(0, bytes([number + 1]) * 65536)
        record = VolumeRecord(id="vda", kind=VolumeKind.VIRTUAL, method=Method.IMPORT, consistency=Consistency.CRASH,
                              size=65536, tree=image.finish())
        when = number * 86400.0
        writer.publish(Manifest(id=f"{vm}-{number}", vm=VmIdentity(vm, f"uuid-of-{vm}"), created=when, t1=when, t2=when,
                                freeze_ms=0.0, revert=RevertMode.BACKUP, volumes=(record,)))
    return f"{vm}-{number}"


def test_who_works_at_the_same_time_shares_one_repository(tmp_path: Path) -> None:
    repositories = made(tmp_path)

    async def main() -> None:
        async with repositories.using() as first:
            with repositories.use() as second:
                assert second is first
            assert first.backups() == []  # still open
        async with repositories.using() as third:
            assert third is not first

    asyncio.run(main())


def test_a_repository_that_does_not_open_is_tried_again_by_the_next(tmp_path: Path) -> None:
    repositories = Repositories(configured(tmp_path))

    async def main() -> None:
        with pytest.raises(RepositoryMissing):
            async with repositories.using():
                pass
        repositories.create(InitOptions()).close()
        async with repositories.using() as repository:
            assert repository.backups() == []

    asyncio.run(main())


def test_a_job_that_is_cancelled_while_it_opens_leaves_nothing_open(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    repositories = made(tmp_path)
    opening, go = threading.Event(), threading.Event()
    closed: list[Repository] = []
    true_open, true_close = Repository.open, Repository.close

    def slow_open(*args: object, **options: object) -> Repository:
        opening.set()
        assert go.wait(30)
        return true_open(*args, **options)  # type: ignore[arg-type]

    def told_close(self: Repository) -> None:
        closed.append(self)
        true_close(self)

    monkeypatch.setattr(Repository, "open", slow_open)
    monkeypatch.setattr(Repository, "close", told_close)

    async def work() -> None:
        async with repositories.using():
            raise AssertionError("it was cancelled before")

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.to_thread(opening.wait, 30)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(closed) == 1

    asyncio.run(main())


def test_what_is_read_stays_while_it_is_read(tmp_path: Path) -> None:
    repositories = made(tmp_path)

    async def main() -> None:
        with repositories.use() as repository:
            add_backup(repository, 1)
        async with repositories.reading("web-1") as (repository, manifest):
            repository.forget([manifest.id])
            assert repository.gc().freed_bytes == 0
            assert repository.image(str(manifest.volumes[0].tree)).read(0, 4) == b"\2\2\2\2"
        with repositories.use() as repository:
            assert repository.gc().freed_bytes > 0

    asyncio.run(main())


def test_the_recovery_key_is_revealed_before_anything_is_made(tmp_path: Path) -> None:
    key = tmp_path / "key"
    repositories = Repositories(configured(tmp_path, f'[encryption]\nkey_file = "{key}"\n'))

    def nobody_listens(text: str) -> None:
        assert text and not (tmp_path / "repository/repository.json").exists()
        raise InvalidArgument("the recovery key cannot be handed over")

    with pytest.raises(InvalidArgument, match="handed over"):
        repositories.create(InitOptions(reveal=nobody_listens))
    assert not key.exists() and not (tmp_path / "repository/repository.json").exists()
    shown: list[str] = []
    with repositories.create(InitOptions(reveal=shown.append)) as repository:
        assert sorted(slot.kind for slot in repository.key_slots()) == ["keyfile", "recovery"]
    assert len(shown) == 1


@pytest.mark.parametrize(("more", "error", "words"), [
    ('[encryption]\npassphrase_file = "/nowhere/p"', KeyRequired, "/nowhere/p"),
    ('[encryption]\nrecovery_key_file = "/nowhere/r"', ConfigError, "/nowhere/r"),
    ('[encryption]\nkey_file = "/nowhere/k"', ConfigError, "/nowhere/k cannot be made"),
])
def test_a_key_that_is_not_there_is_named(tmp_path: Path, more: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Repositories(configured(tmp_path, more)).create(InitOptions())


def test_one_of_several_keys_is_enough_to_open_but_not_to_make(tmp_path: Path) -> None:
    key, passphrase = tmp_path / "key", tmp_path / "passphrase"
    both = f'[encryption]\nkey_file = "{key}"\npassphrase_file = "{passphrase}"\n'
    repositories = Repositories(configured(tmp_path, both))
    with pytest.raises(KeyRequired, match=str(passphrase)):
        repositories.create(InitOptions())
    passphrase.write_text("correct horse battery\n")
    with repositories.create(InitOptions()) as repository:
        assert sorted(slot.kind for slot in repository.key_slots()) == ["keyfile", "passphrase"]
    passphrase.unlink()
    with repositories.use() as repository:
        assert repository.backups() == []
    passphrase.write_text("correct horse battery\n")
    key.unlink()
    with repositories.use() as repository:
        assert repository.backups() == []
    passphrase.unlink()
    with pytest.raises(KeyRequired), repositories.use():
        pass


def test_an_s3_credential_without_systemd_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    config = parse('[repository]\nurl = "s3://bucket/a"\n[repository.s3]\ncredential = "s3-credentials"')
    with pytest.raises(ConfigError, match="LoadCredential=s3-credentials:FILE"):
        Repositories(config).storage()


def test_a_backup_is_followed_by_the_configured_prune_of_its_vm(tmp_path: Path) -> None:
    repositories = made(tmp_path)
    care = RepositoryCare(configured(tmp_path, "[retention]\nkeep_daily = 2\nafter_backup = true"))
    with repositories.use() as repository:
        for number in range(4):
            add_backup(repository, number)
        add_backup(repository, 0, "db")
        repository.protect("web-0", True)
    changes: list[set[str]] = []

    async def main() -> None:
        observer = JobObserver(changes.append)
        assert await care.prune_after_backup("uuid-of-web", observer) == ["web-1"]
        assert (observer.current_step, observer.warnings) == ("prune", [])

    asyncio.run(main())
    with repositories.use() as repository:
        assert {backup.id for backup in repository.backups()} == {"web-0", "web-2", "web-3", "db-0"}


def test_a_prune_that_fails_after_a_backup_is_a_warning(tmp_path: Path) -> None:
    care = RepositoryCare(configured(tmp_path, "[retention]\nkeep_last = 2\nafter_backup = true"))

    async def main() -> None:
        observer = JobObserver(lambda changed: None)
        assert await care.prune_after_backup("uuid-of-web", observer) == []
        (warning,) = observer.warnings
        assert "the backup was made" in warning and "does not exist" in warning

    asyncio.run(main())


def test_nothing_is_pruned_after_a_backup_unless_that_is_configured(tmp_path: Path) -> None:
    care = RepositoryCare(configured(tmp_path, "[retention]\nkeep_last = 1"))

    async def main() -> None:
        observer = JobObserver(lambda changed: None)
        assert await care.prune_after_backup("uuid-of-web", observer) == []
        assert (observer.current_step, observer.warnings) == ("", [])

    asyncio.run(main())


@pytest.mark.parametrize("stop_at", ["mark", "remove"])
def test_a_gc_that_is_cancelled_ends_and_another_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          stop_at: str) -> None:
    repositories = made(tmp_path)
    with repositories.use() as repository:
        kept, gone = add_backup(repository, 1), add_backup(repository, 2)
        repository.forget([gone])
    reached, go_on = threading.Event(), threading.Event()
    steps: list[str] = []

    class Watched(Stage):
        def __call__(self, step: str, done: int, total: int) -> None:
            steps.append(step)
            if step == stop_at and not reached.is_set():
                reached.set()
                assert go_on.wait(30)
            super().__call__(step, done, total)

    async def main() -> None:
        care = RepositoryCare(configured(tmp_path))
        manager = JobManager(OnlyCare(care))
        job = manager.start_gc(GcOptions())
        assert await asyncio.to_thread(reached.wait, 30), steps
        job.cancel()
        go_on.set()
        await asyncio.wait_for(job.wait(), 30)
        assert (job.state.value, job.error.code if job.error else "") == ("cancelled", "Cancelled")
        again = manager.start_gc(GcOptions())
        await asyncio.wait_for(again.wait(), 30)
        assert again.state == "succeeded", again.error
        assert again.result["waiting_packs"] == 0

    with monkeypatch.context() as patch:
        patch.setattr(care_module, "Stage", Watched)
        asyncio.run(main())
    with repositories.use() as repository:
        assert [backup.id for backup in repository.backups()] == [kept]
        assert repository.gc().removed_packs == 0
        (volume,) = repository.manifest(kept).volumes
        assert repository.image(str(volume.tree)).read(0, 4) == b"\2\2\2\2"


class OnlyCare(SmallRunner):
    """The tests' runner, with a true gc."""

    def __init__(self, care: RepositoryCare) -> None:
        super().__init__()
        self._care = care

    async def gc(self, job: JobContext, options: GcOptions) -> Result:
        return await self._care.gc(job, options)


def test_a_stage_tells_its_steps_once_and_ends_when_asked() -> None:
    async def main() -> None:
        steps: list[str] = []
        observer = JobObserver(lambda changed: steps.append(observer.current_step) if "step" in changed else None)
        stage = Stage()
        for step, done in (("mark", 1), ("mark", 2), ("copy", 0)):
            stage(step, done, 2)
            stage.show(observer)
        assert steps == ["mark", "copy"]
        stage.cancel()
        with pytest.raises(Exception, match="copy was stopped"):
            stage("copy", 1, 2)
        observer.close()

    asyncio.run(main())
