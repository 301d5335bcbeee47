"""The configured repository: where it is, what opens it, and one that is open shared by all who need it at the time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from vmbackupd.config import Config, S3Config
from vmbackupd.errors import BackupError, ConfigError, InvalidArgument, KeyRequired
from vmbackupd.host.newfile import sync
from vmbackupd.job.context import to_the_end
from vmbackupd.job.options import InitOptions
from vmbackupd.repository import Repository, Settings, Storage
from vmbackupd.repository.header import NAME as HEADER_NAME
from vmbackupd.repository.keys import Credential, KeyFile, KeySource, Passphrase, RecoveryKey, new_recovery_key
from vmbackupd.repository.manifest import Manifest
from vmbackupd.repository.place import storage_from_url
from vmbackupd.repository.s3options import S3Options

log = logging.getLogger("job.repositories")

KEY_FILE_BYTES = 64
LONGEST_RECOVERY_KEY = 4096  # bytes of a file that holds one


class Repositories:
    """Opens the configured repository.

    Those who use it at the same time share one that is open: its indexes, its connections and the work of unlocking it
    are needed once. It is closed when the last of them is done, so that a place that was mounted anew is found.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._repository: Repository | None = None
        self._users = 0

    @contextmanager
    def use(self) -> Iterator[Repository]:
        """The repository, for as long as the context lasts. Blocks; for a thread.

        Raises ``RepositoryMissing``, ``RepositoryCorrupt``, ``StorageError``, ``KeyRequired``, ``WrongKey``.
        """
        repository = self._acquire()
        try:
            yield repository
        finally:
            self._release()

    @asynccontextmanager
    async def using(self) -> AsyncIterator[Repository]:
        """:meth:`use` for the event loop, which it does not block."""
        opening, cancelled = await to_the_end(asyncio.to_thread(self._acquire))
        repository = opening.result()
        try:
            if cancelled:
                raise asyncio.CancelledError
            yield repository
        finally:
            closing, _ = await to_the_end(asyncio.to_thread(self._release))
            closing.result()

    @asynccontextmanager
    async def reading(self, backup: str) -> AsyncIterator[tuple[Repository, Manifest]]:
        """The repository and a backup in it, which stays there for as long as the context lasts, though it be
        forgotten. Raises ``NotFound``, ``InvalidArgument`` and what :meth:`use` does."""
        async with self.using() as repository:
            session = repository.reading(backup)
            beginning, cancelled = await to_the_end(asyncio.to_thread(session.__enter__))
            manifest = beginning.result()
            try:
                if cancelled:
                    raise asyncio.CancelledError
                yield repository, manifest
            finally:
                ending, _ = await to_the_end(asyncio.to_thread(session.__exit__, None, None, None))
                ending.result()

    def open(self, keys: Sequence[KeySource]) -> Repository:
        """The repository opened with other keys than the configured ones, for the caller to close."""
        return Repository.open(self.storage(), settings=self._settings(), keys=keys)

    def create(self, options: InitOptions) -> Repository:
        """Make the repository: an encrypted one, if there is a key in the configuration.

        A key file that is not there is made. Raises ``InvalidArgument``, ``KeyRequired``, ``StorageError``.
        """
        encryption = self._config.encryption
        if options.encrypt and not encryption.configured:
            raise InvalidArgument(
                "an encrypted repository needs a key: set key_file, credential or passphrase_file in [encryption] of"
                " the configuration and restart vmbackupd"
            )
        storage = self.storage()
        try:
            storage.create()
            if storage.stat(HEADER_NAME) is not None:
                raise InvalidArgument(f"there is a repository at {storage.place} already")
            with _made_key_file(encryption.key_file):
                sources = self.keys(all_of_them=True)
                if sources and options.reveal is not None:
                    text = new_recovery_key()
                    sources.append(RecoveryKey(text))
                    options.reveal(text)  # before it counts: a key nobody has is no help
                return Repository.create(storage, settings=self._settings(), keys=sources)
        except BaseException:
            storage.close()
            raise

    def storage(self) -> Storage:
        """Where the repository is. Raises ``StorageError``, ``ConfigError``."""
        repository = self._config.repository
        cache = self._config.cache_directory if repository.url else None
        return storage_from_url(repository.place, _s3_options(repository.s3, cache))

    def keys(self, *, all_of_them: bool = False) -> list[KeySource]:
        """What the configuration gives to open the repository with.

        One that is not there is logged, if there are others: any of them may open it. With ``all_of_them``, and where
        none is left, it raises ``KeyRequired`` or ``ConfigError``.
        """
        encryption = self._config.encryption
        wanted: list[Callable[[], KeySource]] = []
        if (key_file := encryption.key_file) is not None:
            wanted.append(lambda: KeyFile(key_file))
        if (credential := encryption.credential) is not None:
            wanted.append(lambda: Credential(credential))
        if (passphrase_file := encryption.passphrase_file) is not None:
            wanted.append(lambda: Passphrase.from_file(passphrase_file))
        if (recovery_file := encryption.recovery_key_file) is not None:
            wanted.append(lambda: recovery_key(_read_text(recovery_file)))
        sources: list[KeySource] = []
        problems: list[BackupError] = []
        for source in wanted:
            try:
                sources.append(source())
            except (KeyRequired, ConfigError) as error:
                problems.append(error)
        if problems and (all_of_them or not sources):
            raise problems[0]
        for problem in problems:
            log.warning("%s", problem)
        return sources

    def _settings(self) -> Settings:
        repository = self._config.repository
        return Settings(level=repository.compression_level, workers=repository.workers, pack_size=repository.pack_size)

    def _acquire(self) -> Repository:
        with self._lock:
            if self._repository is None:
                self._repository = self.open(self.keys())
            self._users += 1
            return self._repository

    def _release(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._repository is not None:
                repository, self._repository = self._repository, None
                repository.close()


def recovery_key(typed: bytes) -> RecoveryKey:
    """A recovery key as somebody typed it."""
    return RecoveryKey(typed.decode("ascii", "replace"))


def _read_text(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LONGEST_RECOVERY_KEY)
    except OSError as error:
        raise ConfigError(f"encryption.recovery_key_file: {path} cannot be read: {error.strerror}") from error


def _s3_options(s3: S3Config, cache: Path | None) -> S3Options:
    credentials = s3.credentials_file
    if s3.credential is not None:
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory:
            raise ConfigError(
                "repository.s3.credential: no credentials were passed to vmbackupd; add"
                f" LoadCredential={s3.credential}:FILE to its unit"
            )
        credentials = Path(directory, s3.credential)
    return S3Options(
        endpoint=s3.endpoint,
        region=s3.region,
        profile=s3.profile,
        credentials_file=credentials,
        ca_bundle=s3.ca_file,
        addressing=s3.addressing,
        timeout=s3.timeout,
        cache_directory=cache,
        lock_days=s3.lock_days,
        lock_mode=s3.lock_mode,
    )


@contextmanager
def _made_key_file(path: Path | None) -> Iterator[None]:
    """Make a key file that is not there; remove it again if what it was made for fails."""
    if path is None or path.exists():
        yield
        return
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"encryption.key_file: {path} cannot be made: {error.strerror}") from error
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(secrets.token_bytes(KEY_FILE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        sync(path.parent)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    log.info("made the key file %s", path)
