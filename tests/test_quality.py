"""Linters, type checker and the rules that no tool knows, as tests."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import vmbackupd
from vmbackupd import errors

ROOT = Path(__file__).parent.parent


def tool(*argv: str) -> None:
    result = subprocess.run([sys.executable, "-m", *argv], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff() -> None:
    tool("ruff", "check", "--no-cache", ".", "dev")


def test_mypy_strict() -> None:
    tool("mypy", "--strict", "-p", "vmbackupd")


def all_errors() -> list[type[errors.BackupError]]:
    for module in pkgutil.walk_packages(vmbackupd.__path__, "vmbackupd."):
        if "guest_helper" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    found, queue = [], [errors.BackupError]
    while queue:
        cls = queue.pop()
        found.append(cls)
        queue += cls.__subclasses__()
    return found


def test_every_error_has_a_code_of_its_own() -> None:
    codes: dict[str, type[errors.BackupError]] = {}
    for cls in all_errors():
        assert "code" in vars(cls), f"{cls.__name__} has no code of its own"
        assert cls.code not in codes, f"{cls.__name__} and {codes[cls.code].__name__} share {cls.code}"
        codes[cls.code] = cls


def test_every_public_module_says_what_it_is_for() -> None:
    for path in sorted((ROOT / "vmbackupd").rglob("*.py")):
        text = path.read_text()
        assert not text.strip() or text.lstrip().startswith(('"""', "#!")), f"{path} has no docstring"
