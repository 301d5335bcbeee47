"""Every parser of bytes that a disk, a guest or a network hands us, under a coverage-guided fuzzer.

``./dev fuzz`` runs libFuzzer (through atheris) on a build of the engine by clang, with coverage counters and
AddressSanitizer in the C code and undefined behaviour trapped; Python modules are instrumented as they are imported. A
target takes bytes and lets nothing but the errors of its contract pass as normal. Where a structure is sealed, a target
repairs the seals after the fuzzer's damage: else nothing behind a checksum would ever be reached.

``corpus/TARGET/`` holds inputs that found something new, kept small; each is also run by the normal test suite.
"""
