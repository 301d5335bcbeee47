"""packaging/vmbackup-extract.py, which knows nothing but docs/format.md, on repositories the engine wrote."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import require
from tests.unit.exchange.exchange_support import CHUNK, disk_image, stored, stored_at_t2
from tests.unit.repository.repository_support import FIXED_KEY, make, manifest, objects, reopen, volume
from vmbackupd.engine.blake3 import keyed_hash
from vmbackupd.repository import Repository
from vmbackupd.repository.keys import KeyFile, Passphrase, RecoveryKey, new_recovery_key
from vmbackupd.repository.settle import void

SCRIPT = Path(__file__).parents[3] / "packaging" / "vmbackup-extract.py"
SIZE = (6 << 20) + 512


@pytest.fixture(autouse=True)
def zstd_is_here() -> None:
    require("zstd", shutil.which("zstd") is not None)


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vmbackup_extract", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*words: object, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the script alone: where nothing of this project can be imported."""
    argv = [sys.executable, "-I", "-S", str(SCRIPT), *map(str, words)]
    done = subprocess.run(argv, capture_output=True, text=True, input=stdin, check=False, cwd="/")
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done


def extracted(tmp_path: Path, *options: object, backup: str = "web1-1", status: int = 0) -> bytes:
    path = tmp_path / "extracted.raw"
    run(tmp_path / "repository", *options, "--force", "--extract", backup, "vda", path, status=status)
    assert not (tmp_path / "extracted.raw.part").exists()
    return path.read_bytes()


# ---- the file itself


def test_it_uses_the_standard_library_only_and_an_old_python() -> None:
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 9))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    assert names <= set(sys.stdlib_module_names)


# ---- its BLAKE3


@pytest.mark.parametrize("size", [0, 1, 64, 65, 1023, 1024, 1025, 2048, 2049, 3073, 8208, 65535, 65536, 102_400])
def test_hashes_are_those_of_the_engine(size: int) -> None:
    rng = random.Random(size)
    key = rng.randbytes(32)
    contents = [rng.randbytes(size) for _ in range(3)]
    assert load().hash_many(key, contents) == [keyed_hash(key, content) for content in contents]


def test_hashes_of_contents_of_several_sizes_keep_their_order() -> None:
    rng = random.Random(2)
    key = rng.randbytes(32)
    contents = [rng.randbytes(rng.choice([0, 10, 1024, 5000, 8208, 65536])) for _ in range(60)]
    assert load().hash_many(key, contents) == [keyed_hash(key, content) for content in contents]
    assert load().hash_many(key, []) == []


# ---- plain repositories


@pytest.mark.parametrize("chunk", [4096, CHUNK, 1 << 20])
@pytest.mark.parametrize("options", [(), ("--no-verify",)])
def test_an_image_is_extracted_as_it_was_stored(tmp_path: Path, chunk: int, options: tuple[str, ...]) -> None:
    image = disk_image(random.Random(chunk), SIZE)
    repository, _ = stored(tmp_path, image, chunk=chunk)
    repository.close()
    before = objects(tmp_path / "repository")
    assert extracted(tmp_path, *options) == image
    assert chunk > CHUNK or (tmp_path / "extracted.raw").stat().st_blocks * 512 < SIZE
    assert os.stat(tmp_path / "extracted.raw").st_mode & 0o777 == 0o600
    assert objects(tmp_path / "repository") == before


def test_an_image_of_nothing_and_a_large_sparse_one(tmp_path: Path) -> None:
    repository = make(tmp_path / "repository", chunk_size=CHUNK, fanout=16)
    size = 1 << 40
    with repository, repository.writer("b") as writer:
        sink = writer.image(size)
        sink.write(size - CHUNK, b"the end".ljust(CHUNK, b"."))
        empty = writer.image(0).finish()
        writer.publish(manifest("b", volume("vda", sink.finish(), size), volume("vdb", empty, 0)))
    for name in ("vda", "vdb"):
        run(tmp_path / "repository", "--extract", "b", name, tmp_path / name)
    assert (tmp_path / "vdb").read_bytes() == b""
    with (tmp_path / "vda").open("rb") as file:
        assert file.seek(-CHUNK, os.SEEK_END) == size - CHUNK and file.read() == b"the end".ljust(CHUNK, b".")
    assert (tmp_path / "vda").stat().st_blocks * 512 <= 2 * CHUNK


def test_a_backup_that_is_reverted_at_restore_time_is_extracted_as_of_t1(tmp_path: Path) -> None:
    repository, _, expected = stored_at_t2(tmp_path, random.Random(3), 4 << 20)
    repository.close()
    assert extracted(tmp_path, backup="web1-t2") == expected


def test_listing_and_showing(tmp_path: Path) -> None:
    repository = make(tmp_path / "repository")
    with repository, repository.writer("web1-1") as writer:
        tree = writer.blob(b"x" * 10_000)
        xml = writer.blob(b"<domain/>")
        writer.publish(manifest("web1-1", volume("vda", tree, 10_000), config={"domain.xml": xml}))
    told = run(tmp_path / "repository", "--list").stdout
    assert told == "web1-1  1970-01-01 00:16:41 UTC  web1  vda (10000 bytes)\n"
    shown = json.loads(run(tmp_path / "repository", "--show", "web1-1").stdout)
    with reopen(tmp_path / "repository") as again:
        assert shown == again.manifest("web1-1").to_json()
    run(tmp_path / "repository", "--blob", "web1-1", "domain.xml", tmp_path / "xml")
    assert (tmp_path / "xml").read_bytes() == b"<domain/>"


def test_the_mark_of_a_writer_that_was_shut_out_is_no_backup(tmp_path: Path) -> None:
    repository, _ = stored(tmp_path, b"x" * CHUNK)
    with repository:
        assert repository.storage.put_if_absent("manifests/web1-2", [void(repository.header, "web1-2")])
    assert run(tmp_path / "repository", "--list").stdout.count("\n") == 1
    assert "there is no backup web1-2" in run(tmp_path / "repository", "--show", "web1-2", status=1).stderr


def test_mistakes_are_told_plainly(tmp_path: Path) -> None:
    repository, _ = stored(tmp_path, b"x" * CHUNK)
    repository.close()
    root, out = tmp_path / "repository", tmp_path / "out"
    out.write_bytes(b"precious")
    for words, expected in (
        ((tmp_path / "none", "--list"), "is no vmbackupd repository"),
        ((root, "--show", "web2"), "there is no backup web2"),
        ((root, "--show", "../repository.json"), "there is no backup"),
        ((root, "--extract", "web1-1", "vdb", tmp_path / "x"), "has the volumes vda"),
        ((root, "--blob", "web1-1", "domain.xml", tmp_path / "x"), "no configuration"),
        ((root, "--extract", "web1-1", "vda", out), "exists already"),
        ((root, "--list", "--key-file", SCRIPT), "is not encrypted"),
    ):
        assert expected in run(*words, status=1).stderr
    assert out.read_bytes() == b"precious" and not (tmp_path / "x").exists()


# ---- damage


def test_without_any_index_the_packs_are_enough(tmp_path: Path) -> None:
    image = disk_image(random.Random(4), SIZE)
    repository, _ = stored(tmp_path, image)
    repository.close()
    shutil.rmtree(tmp_path / "repository" / "indexes")
    assert extracted(tmp_path) == image
    for pack in (tmp_path / "repository").glob("packs/*/*"):  # and not even their own indexes
        pack.chmod(0o600)
        os.truncate(pack, pack.stat().st_size - 10)
    assert extracted(tmp_path) == image


def test_a_damaged_index_is_no_harm(tmp_path: Path) -> None:
    image = disk_image(random.Random(5), SIZE)
    repository, _ = stored(tmp_path, image)
    repository.close()
    for index in (tmp_path / "repository" / "indexes").glob("*"):
        index.chmod(0o600)
        data = bytearray(index.read_bytes())
        for at in range(100, len(data) - 5000, 997):
            data[at] ^= 0x55
        index.write_bytes(data)
    assert extracted(tmp_path) == image


def ruin(tmp_path: Path, content: bytes) -> None:
    """Damage the record that holds this content as it is."""
    for pack in (tmp_path / "repository").glob("packs/*/*"):
        data = bytearray(pack.read_bytes())
        at = data.find(content)
        if at >= 0:
            data[at + 5] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(data)
            return
    raise AssertionError("it is in no pack")


def test_a_lost_chunk_is_named_or_left_out(tmp_path: Path) -> None:
    image = random.Random(6).randbytes(1 << 20)
    repository, _ = stored(tmp_path, image)
    repository.close()
    ruin(tmp_path, image[3 * CHUNK : 4 * CHUNK])
    words = (tmp_path / "repository", "--extract", "web1-1", "vda", tmp_path / "x")
    assert f"bytes {3 * CHUNK} to {4 * CHUNK} of the image are lost" in run(*words, status=1).stderr
    assert sorted(os.listdir(tmp_path)) == ["repository"]
    assert f"lost: bytes {3 * CHUNK} to {4 * CHUNK}" in run(*words, "--keep-going", status=3).stderr
    assert (tmp_path / "x").read_bytes() == image[: 3 * CHUNK] + bytes(CHUNK) + image[4 * CHUNK :]


def test_another_copy_heals_a_lost_chunk(tmp_path: Path) -> None:
    image = random.Random(7).randbytes(1 << 20)
    repository, _ = stored(tmp_path, image)
    repository.close()
    ruin(tmp_path, image[3 * CHUNK : 4 * CHUNK])
    with stored_in_another_place(tmp_path, repository, image) as copy:
        for pack in copy.glob("packs/*/*"):
            target = tmp_path / "repository" / "packs" / pack.parent.name
            target.mkdir(exist_ok=True)
            shutil.copy(pack, target / pack.name)
        assert extracted(tmp_path) == image


class stored_in_another_place:
    """The same image stored again under the same header: other packs, the same names."""

    def __init__(self, tmp_path: Path, repository: Repository, image: bytes) -> None:
        self.path = tmp_path / "copy"
        self.path.mkdir()
        shutil.copy(tmp_path / "repository" / "repository.json", self.path)
        with reopen(self.path) as again, again.writer("copy") as writer:
            sink = writer.image(len(image))
            sink.write(0, image)
            writer.publish(manifest("copy", volume("vda", sink.finish(), len(image))))

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path)


def test_a_damaged_manifest_hides_no_other(tmp_path: Path) -> None:
    repository, _ = stored(tmp_path, b"x" * CHUNK)
    with repository, repository.writer("web1-2") as writer:
        writer.publish(manifest("web1-2", volume("vda", writer.blob(b"y"), 1)))
    path = tmp_path / "repository" / "manifests" / "web1-1"
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    told = run(tmp_path / "repository", "--list", status=1)
    assert told.stdout.startswith("web1-2") and "web1-1: manifest web1-1 is damaged" in told.stderr
    shutil.copy(tmp_path / "repository" / "manifests" / "web1-2", path)
    assert "an object was swapped" in run(tmp_path / "repository", "--list", status=1).stderr


# ---- encrypted repositories


def test_every_kind_of_key_opens_an_encrypted_repository(tmp_path: Path) -> None:
    image = disk_image(random.Random(8), SIZE)
    repository, _ = stored(tmp_path, image, encrypted=True)
    key_file, recovery = tmp_path / "key", new_recovery_key()
    key_file.write_bytes(random.Random(9).randbytes(100))
    with repository:
        repository.add_key(KeyFile(key_file), "a file")
        repository.add_key(Passphrase("geheim, große Worte".encode()), "a passphrase")
        repository.add_key(RecoveryKey(recovery), "a recovery key")
    (tmp_path / "fixed").write_bytes(FIXED_KEY.secret())
    (tmp_path / "words").write_text("geheim, große Worte\n")
    (tmp_path / "recovery").write_text(recovery.lower().replace("-", " ") + "\n")
    for options in (
        ("--key-file", tmp_path / "fixed"),
        ("--key-file", key_file),
        ("--passphrase-file", tmp_path / "words"),
        ("--recovery-key", tmp_path / "recovery"),
    ):
        assert extracted(tmp_path, *options) == image
        assert run(tmp_path / "repository", "--list", *options).stdout.startswith("web1-1  ")
    assert extracted(tmp_path, "--key-file", key_file, "--no-verify") == image
    (tmp_path / "wrong").write_bytes(bytes(40))
    root = tmp_path / "repository"
    assert "None of them opens" in run(root, "--list", "--key-file", tmp_path / "wrong", status=1).stderr
    assert "Give --key-file" in run(root, "--list", status=1).stderr
    (tmp_path / "recovery").write_text(recovery[:-1] + ("0" if recovery[-1] != "0" else "1"))
    assert "mistyped" in run(root, "--list", "--recovery-key", tmp_path / "recovery", status=1).stderr


def test_an_encrypted_repository_without_indexes_and_with_damage(tmp_path: Path) -> None:
    image = random.Random(10).randbytes(1 << 20)
    repository, _ = stored(tmp_path, image, encrypted=True)
    repository.close()
    key = tmp_path / "fixed"
    key.write_bytes(FIXED_KEY.secret())
    shutil.rmtree(tmp_path / "repository" / "indexes")
    assert extracted(tmp_path, "--key-file", key) == image
    pack = max((tmp_path / "repository").glob("packs/*/*"), key=lambda path: path.stat().st_size)
    pack.chmod(0o600)
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    words = (tmp_path / "repository", "--key-file", key, "--extract", "web1-1", "vda", tmp_path / "x")
    assert "are lost" in run(*words, status=1).stderr
    assert "are lost" in run(*words, "--no-verify", status=1).stderr  # the cipher tells


def test_a_header_that_was_changed_is_found_out(tmp_path: Path) -> None:
    repository, _ = stored(tmp_path, b"x" * CHUNK, encrypted=True)
    repository.close()
    (tmp_path / "fixed").write_bytes(FIXED_KEY.secret())
    path = tmp_path / "repository" / "repository.json"
    path.chmod(0o600)
    fields = json.loads(path.read_text())
    fields["fanout"] = 32
    del fields["checksum"]
    module = load()
    fields["checksum"] = module.hashlib.sha256(module.canonical(fields)).hexdigest()
    path.write_text(json.dumps(fields))
    told = run(tmp_path / "repository", "--list", "--key-file", tmp_path / "fixed", status=1).stderr
    assert "the repository's header was changed" in told
