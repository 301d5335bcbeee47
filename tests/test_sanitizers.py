"""The engine under AddressSanitizer and UndefinedBehaviorSanitizer: parsers, the chunk store, all that copies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests import variant
from tests.conftest import require

MEASURED = "not memory"  # how much memory a process needs is the sanitizer's matter here


def preloaded() -> str:
    """The sanitizers' own libraries: the interpreter was not built with them."""
    names = ("libasan.so", "libubsan.so")
    words = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in names
    ]
    return " ".join(word.stdout.strip() for word in words)


@pytest.mark.slow
def test_the_engines_tests_under_sanitizers() -> None:
    require("gcc", shutil.which("gcc") is not None)
    root = variant.build("sanitize", {"VMBACKUPD_SANITIZE": "1"})
    environment = {
        **os.environ,
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # each object of Python in memory of its own, so that a step beyond it is seen
        "PYTHONMALLOC": "malloc",
    }
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", MEASURED, "tests/engine"]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
