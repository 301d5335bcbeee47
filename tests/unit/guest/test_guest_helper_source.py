"""The helper runs on old Pythons, on nothing but their standard library, and as one file."""

from __future__ import annotations

import ast
import glob
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import vmbackupd.guest_helper
from vmbackupd.guest.deploy import build_zipapp

SOURCES = sorted(Path(vmbackupd.guest_helper.__file__).parent.glob("*.py"))
PYTHONS = sorted(glob.glob(os.path.expanduser("~/.pyenv/versions/3.*/bin/python3"))) or [sys.executable]
NEW_METHODS = {"removeprefix", "removesuffix", "is_relative_to", "bit_count", "preadv", "pidfd_open", "isascii"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_grammar_of_3_6(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 6))
    for node in ast.walk(tree):
        assert not isinstance(
            node,
            ast.NamedExpr | ast.Match | ast.TypeAlias if sys.version_info >= (3, 12) else ast.NamedExpr | ast.Match,
        )
        if isinstance(node, ast.Attribute):
            assert node.attr not in NEW_METHODS, f"{path.name}:{node.lineno}: {node.attr} is newer than Python 3.6"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_standard_library_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 1 or node.module in sys.stdlib_module_names, node.module
        elif isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= sys.stdlib_module_names


def test_no_import_inside_a_function() -> None:
    for path in SOURCES:
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                assert not [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)], path


def test_same_sources_make_the_same_file(tmp_path: Path) -> None:
    assert build_zipapp() == build_zipapp()
    path = tmp_path / "helper.pyz"
    path.write_bytes(build_zipapp())
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    assert "__main__.py" in names
    assert len(names) == len(SOURCES) + 1


@pytest.mark.parametrize("python", PYTHONS)
def test_starts_on(python: str, tmp_path: Path) -> None:
    path = tmp_path / "helper.pyz"
    path.write_bytes(build_zipapp())

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-W", "error", path, *arguments], check=False, capture_output=True, text=True, timeout=60
        )

    done = run("--release", "j01234567")
    assert done.returncode == 0, done.stderr
    done = run("--release", "j0123/567")
    assert (done.returncode, "not a job id" in done.stderr) == (1, True)
    assert run().returncode == 2
