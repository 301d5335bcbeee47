"""Another build of the engine beside the normal one: a copy of the tree under ``build/``, built with other settings."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ["engine", "vmbackupd", "tests", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
BUILT = {".so", ".pyc"}


def build(name: str, settings: Mapping[str, str]) -> Path:
    """The copy's root, up to date with ours; ``settings`` are variables of setup.py. Two builds wait for each other."""
    tree = ROOT / "build" / name
    tree.mkdir(parents=True, exist_ok=True)
    with open(tree / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for source in COPIED:
            _copy(ROOT / source, tree / source)
        # the translation to C is the same for every build
        shutil.copytree(ROOT / "build/cython", tree / "build/cython-debug", dirs_exist_ok=True, copy_function=_newer)
        words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", f"-j{os.cpu_count() or 1}"]
        done = subprocess.run(
            words, cwd=tree, env={**os.environ, **settings}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{name} build of the engine: {done.stderr[-4000:]}")
    return tree


def _copy(source: Path, target: Path) -> None:
    """Make ``target`` like ``source``; what was built from it stays."""
    if source.is_symlink():
        if not target.is_symlink():
            target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir(exist_ok=True)
        names = {path.name for path in source.iterdir() if path.suffix not in BUILT and path.name != "__pycache__"}
        for path in target.iterdir():
            if path.name not in names and path.suffix not in BUILT and path.name != "__pycache__":
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for name in sorted(names):
            _copy(source / name, target / name)
    else:
        _newer(str(source), str(target))


def _newer(source: str, target: str) -> None:
    """Copy a file with its time of change unless that is the same."""
    if not os.path.exists(target) or os.stat(source).st_mtime_ns > os.stat(target).st_mtime_ns:
        shutil.copy2(source, target)


def python_packages() -> str:
    """Where this interpreter's packages are."""
    return sysconfig.get_path("platlib")
