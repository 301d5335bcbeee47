"""Builds the Cython engine; everything else is in pyproject.toml.

Every ``vmbackupd/engine/*.pyx`` is one extension module. Environment:

``VMBACKUPD_DEBUG=1``
    a build for debuggers: little optimisation, symbols, assertions, C line numbers in tracebacks.
``VMBACKUPD_SANITIZE=1``
    the same under AddressSanitizer and UndefinedBehaviorSanitizer; run with
    ``LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"`` and
    ``ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1``.
``VMBACKUPD_FUZZ=1``
    the same by clang with counters for a coverage-guided fuzzer; undefined behaviour traps. See ``tests/fuzz``.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import subprocess
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
ENGINE = "vmbackupd/engine"
LIBRARIES = ("libnbd", "libzstd", "libcrypto")

FUZZ = os.environ.get("VMBACKUPD_FUZZ") == "1"
SANITIZE = os.environ.get("VMBACKUPD_SANITIZE") == "1"
DEBUG = FUZZ or SANITIZE or os.environ.get("VMBACKUPD_DEBUG") == "1"


def pkg_config(option: str) -> list[str]:
    """What pkg-config says of the libraries we link; a missing one ends the build with pkg-config's own sentence."""
    output = subprocess.run(["pkg-config", option, *LIBRARIES], check=True, stdout=subprocess.PIPE, text=True).stdout
    return shlex.split(output)


def extensions() -> list[Extension]:
    cflags = [*pkg_config("--cflags"), "-Wall", "-Wno-sign-compare", "-fno-strict-aliasing", "-fvisibility=hidden"]
    ldflags = ["-Wl,--as-needed", *pkg_config("--libs")]
    cflags += ["-O1", "-g", "-UNDEBUG", "-DCYTHON_CLINE_IN_TRACEBACK=1"] if DEBUG else ["-O3", "-g1"]
    if SANITIZE:
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        cflags += sanitizers
        ldflags += sanitizers
    if FUZZ:
        os.environ["CC"] = "clang"
        cflags += ["-fsanitize=fuzzer-no-link,address,undefined", "-fsanitize-trap=undefined", "-Wno-unknown-pragmas"]
        ldflags += ["-shared-libsan"]
    os.chdir(ROOT)
    return [
        Extension(
            f"vmbackupd.engine.{source.stem}",
            [f"{ENGINE}/{source.name}"],
            include_dirs=[ENGINE],
            extra_compile_args=cflags,
            extra_link_args=ldflags,
        )
        for source in sorted(Path(ENGINE).glob("*.pyx"))
    ]


def compiled() -> list[Extension]:
    """The extensions translated to C. Safe directives are the default; a function that wants less says so itself."""
    directives = {
        "language_level": 3,
        "embedsignature": True,
        "boundscheck": True,
        "initializedcheck": True,
    }
    build_dir = "build/cython-debug" if DEBUG else "build/cython"
    return cythonize(extensions(), build_dir=build_dir, compiler_directives=directives, quiet=True)


def lock() -> None:
    """Two builds in one tree wait for each other; held until this process ends."""
    (ROOT / "build").mkdir(exist_ok=True)
    descriptor = os.open(ROOT / "build" / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)


if __name__ == "__main__":
    wants_engine = not {"--version", "--help", "egg_info", "clean"} & set(sys.argv[1:])
    if wants_engine:
        lock()
    setup(ext_modules=compiled() if wants_engine else [])
