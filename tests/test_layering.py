"""Who may import whom. The rules are in docs/architecture.md; here they are enforced on the syntax trees."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vmbackupd"

LEAVES = {"model", "errors", "units", "typed"}

#: part -> parts of the project it may import, besides itself
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "typed": {"errors"},
    "model": {"units", "errors"},
    "config": LEAVES,
    "engine": LEAVES,
    "repository": LEAVES | {"engine"},
    "host": LEAVES,
    "hypervisor": LEAVES | {"host", "config"},
    "guest": LEAVES | {"config"},
    "guest_helper": set(),
    "job": LEAVES | {"config", "engine", "repository", "host", "hypervisor", "guest", "restore", "exchange"},
    "exchange": LEAVES | {"config", "engine", "repository", "host", "hypervisor"},
    "restore": LEAVES | {"config", "engine", "repository", "host", "hypervisor", "job.observer", "job.options"},
    "api": LEAVES | {"job.manager", "job.options", "job.states", "job.observer"},
    "cli": LEAVES | {"api.names"},
    "daemon": LEAVES
    | {"config", "engine", "repository", "host", "hypervisor", "guest", "job", "restore", "exchange", "api"},
    "__main__": {"daemon"},
}

#: third-party library -> the modules that own it
OWNERS: dict[str, set[str]] = {
    "libvirt": {"vmbackupd.hypervisor.libvirt"},
    "libvirt_qemu": {"vmbackupd.hypervisor.libvirt"},
    "qemu": {"vmbackupd.hypervisor.qmpclient"},
    "pyudev": {"vmbackupd.host.udev"},
    "systemd": {"vmbackupd.daemon.sd"},
    "boto3": {"vmbackupd.repository.s3client"},
    "botocore": {"vmbackupd.repository.s3client"},
    "urllib3": {"vmbackupd.repository.s3client"},
}


def modules() -> list[tuple[str, Path]]:
    """(dotted name, file) of every Python module of the project, the engine's by its import name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append((".".join(parts).removesuffix(".__init__"), path))
    return found


def imports(path: Path) -> set[str]:
    """Every module ``path`` imports, also inside functions and for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or "guest_helper" in path.parts, f"{path}: relative import"
            if node.level == 0:
                assert node.module is not None
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(module: str) -> str:
    pieces = module.split(".")
    return pieces[1] if len(pieces) > 1 else ""


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_module_imports_only_what_its_part_may(name: str, path: Path) -> None:
    part = part_of(name)
    if not part:
        return
    for imported in imports(path):
        if not imported.startswith("vmbackupd."):
            continue
        inner = imported.removeprefix("vmbackupd.")
        if inner.split(".")[0] in (part, "__version__"):
            continue
        assert any(inner == allowed or inner.startswith(allowed + ".") for allowed in ALLOWED[part]), (
            f"{name} imports {imported}"
        )


@pytest.mark.parametrize(("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_library_is_imported_only_by_its_owner(name: str, path: Path) -> None:
    for imported in imports(path):
        library = imported.split(".")[0]
        if library in OWNERS:
            assert name in OWNERS[library], f"{name} imports {imported}"
        if library == "dbus_fast":
            assert part_of(name) in ("api", "cli"), f"{name} imports {imported}"


def test_a_step_never_imports_another_step() -> None:
    for name, path in modules():
        if name.startswith("vmbackupd.job.steps."):
            assert not [item for item in imports(path) if item.startswith("vmbackupd.job.steps")], name


def test_hypervisor_and_guest_never_import_each_other() -> None:
    for name, path in modules():
        if part_of(name) in ("hypervisor", "guest"):
            other = "vmbackupd.guest." if part_of(name) == "hypervisor" else "vmbackupd.hypervisor."
            assert not [item for item in imports(path) if item.startswith(other)], name


def test_the_guest_helper_uses_the_standard_library_only() -> None:
    for name, path in modules():
        if part_of(name) == "guest_helper":
            outside = {item.split(".")[0] for item in imports(path)} - set(sys.stdlib_module_names)
            assert not outside, f"{name} imports {outside}"
            ast.parse(path.read_text(), feature_version=(3, 6))
