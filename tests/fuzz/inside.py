"""One target under the fuzzer, in a process of its own: ``python -m tests.fuzz.inside TARGET [libFuzzer's arguments]``.

Run by ``python -m tests.fuzz``, in the tree that clang built and with the fuzzer's library preloaded.
"""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["vmbackupd.repository", "vmbackupd.guest", "vmbackupd.typed"]):
    from tests.fuzz.targets import TARGETS


def main(words: list[str]) -> None:
    target = TARGETS[words[1]]
    atheris.Setup([words[0], *words[2:]], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
