"""The QEMU that runs guests without KVM.

Before 8.1, QEMU translates the code of a page without a lock on it, and two emulated CPUs are two threads. A kernel
that patches its own code (static branches: an ``int3`` first, the rest, then a signal to every CPU) can have the
``int3`` translated by one CPU while another writes what replaces it; that translation stays, and the kernel dies of
it. A tracer that comes and goes while disks work kills such a guest within seconds. So no older QEMU emulates here:
Debian 13's does, unpacked into the cache with the libraries that it needs, and nothing of it installed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

from tests.lab import image

NAME = "qemu-system-x86_64"
SOUND = (8, 1)
"""The first version that locks a page before it is translated."""
SUITE = "trixie"
PACKAGES = "qemu-system-x86,qemu-block-extra,qemu-system-modules-opengl,qemu-system-modules-spice"
"""All modules: one that is missing would be looked for among those of this machine's QEMU, and refused."""
WRAPPER = """#!/bin/sh
here=$(dirname "$(readlink -f "$0")")
share=$here/tree/usr/share libraries=$here/tree/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR=$libraries/qemu
exec "$here/tree/usr/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" "$here/tree/usr/bin/qemu-system-x86_64" \\
    -L "$share/seabios" -L "$share/qemu" "$@"
"""


def system() -> Path:
    """This machine's QEMU. Raises ImageError."""
    found = shutil.which(NAME)
    if found is None:
        raise image.ImageError(f"there is no {NAME} on this machine: ./dev setup installs it")
    return Path(found)


def ensure() -> Path:
    """A QEMU that emulates more than one CPU soundly: this machine's, or one from the cache, fetched now if need be.
    Raises ImageError."""
    own = system()
    if version(own) >= SOUND:
        return own
    digest = hashlib.sha256(f"{SUITE} {PACKAGES} {WRAPPER}".encode()).hexdigest()[:16]
    return image.cached(f"qemu-{digest}", f"the emulator of Debian {SUITE}", _make) / NAME


def version(program: Path) -> tuple[int, int]:
    """Major and minor version of a QEMU. Raises ImageError."""
    said = subprocess.run([program, "--version"], check=False, capture_output=True, text=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    if found is None:
        raise image.ImageError(f"{program} --version does not tell a version: {said!r}")
    return int(found[1]), int(found[2])


def _make(work: Path) -> None:
    image.run(
        "mmdebstrap",
        "--variant=extract",
        "--mode=root",
        "--format=directory",
        "--aptopt=APT::Install-Recommends false",
        "--aptopt=Acquire::Languages none",
        f"--include={PACKAGES}",
        SUITE,
        work / "tree",
        *image.sources(SUITE),
    )
    wrapper = work / NAME
    wrapper.write_text(WRAPPER)
    wrapper.chmod(0o755)
    if version(wrapper) < SOUND:
        raise image.ImageError(f"Debian {SUITE} has QEMU {version(wrapper)}, and {SOUND} is needed")
