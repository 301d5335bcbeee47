"""What the helper tells of a guest besides its devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmbackupd.guest_helper import facts


@pytest.mark.parametrize(
    ("arguments", "hook"),
    [
        (["/usr/sbin/qemu-ga", "-F"], facts.DEFAULT_HOOK),
        (["/usr/sbin/qemu-ga", "-m", "virtio-serial", "-F/etc/hook"], "/etc/hook"),
        (["qemu-ga", "--fsfreeze-hook=/etc/hook"], "/etc/hook"),
        (["qemu-ga", "--fsfreeze-hook"], facts.DEFAULT_HOOK),
        (["/usr/sbin/qemu-ga", "-m", "virtio-serial"], None),
        (["/bin/sh", "-F"], None),
        ([""], None),
        ([], None),
    ],
)
def test_the_hook_is_the_one_the_agent_was_started_with(arguments: list[str], hook: str | None) -> None:
    assert facts._hook(arguments) == hook


def test_a_stock_hook_without_scripts_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook, scripts = tmp_path / "hook", tmp_path / "hook.d"
    monkeypatch.setattr(facts, "_arguments", lambda pid: ["qemu-ga", f"-F{hook}"])
    assert not facts.fsfreeze_hook()  # there is no such file
    hook.touch(0o755)
    assert facts.fsfreeze_hook()  # one file that does it all
    scripts.mkdir()
    assert not facts.fsfreeze_hook()
    (scripts / "mysql.sh").touch(0o755)
    assert facts.fsfreeze_hook()


def test_the_initiators_name_is_read_with_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "initiatorname.iscsi"
    monkeypatch.setattr(facts, "INITIATOR", str(file))
    assert facts.initiator() is None
    file.write_bytes(b"## comment\nInitiatorName=iqn.1993-08.org.debian:01:abc\n")
    assert facts.initiator() == "iqn.1993-08.org.debian:01:abc"
    file.write_bytes(b"\xff\xfe" * 100 + b"\nInitiatorName=" + b"x" * 1000)
    assert facts.initiator() == "x" * 255
