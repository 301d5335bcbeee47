"""Brings the helper into a guest through its agent: one ``guest-exec`` that takes the program on its standard input.

So the file is written by a shell of ours, into a directory only root can enter, and never lies about writable by others
(files made by ``guest-file-open`` are, for everybody).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import shlex
import sys
import zipfile
from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import Any

from vmbackupd.errors import GuestHelperUnavailable, GuestProtocolError
from vmbackupd.typed import get_bool, get_int, get_list, get_str

AgentCall = Callable[[str, Mapping[str, object] | None, float], Awaitable[object]]
"""A guest agent bound to one VM: command, arguments, timeout in seconds; returns the command's ``return`` value."""

PACKAGE = "vmbackupd_guest_helper"
"""The helper's package name inside the zipapp."""

NO_PYTHON = 97  # exit status of our scripts
_PYTHONS = "python3 /usr/libexec/platform-python"  # the second is RHEL 8's own
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip format's: the same sources make the same file
_CALL_TIMEOUT = 20.0
_POLL = 0.1

_PROLOGUE = f"""\
umask 077
PATH=/usr/sbin:/usr/bin:/sbin:/bin
python=
for candidate in {_PYTHONS}; do
    python=$(command -v $candidate) && break
done
[ -n "$python" ] || exit {NO_PYTHON}
"""
# systemd ends the service's processes with it and cleans up after one that was killed; its own file still being there
# says that it did not end well. Without systemd the helper gets a session of its own, so that the agent's end is not
# its own.
_START = (
    _PROLOGUE
    + """\
directory=/run/vmbackupd-$1
mkdir -p "$directory" && cat > "$directory/helper.pyz" || exit 1
set -- "$1" "$python" "$directory/helper.pyz" --port "$2" --lease "$3" --remove-self
job=$1
shift
if [ -d /run/systemd/system ] && command -v systemd-run > /dev/null; then
    exec systemd-run --quiet --collect --unit="vmbackupd-$job" \\
        --property="ExecStopPost=-/bin/sh -c 'test ! -e $2 || exec $1 $2 --release $job --remove-self'" -- "$@"
fi
setsid "$@" < /dev/null > /dev/null 2>&1 &
"""
)
_RELEASE = (
    _PROLOGUE
    + """\
directory=$(mktemp -d /run/vmbackupd-XXXXXX) && cat > "$directory/helper.pyz" || exit 1
"$python" "$directory/helper.pyz" --release "$1"
status=$?
rm -rf "$directory" "/run/vmbackupd-$1"
exit $status
"""
)


def build_zipapp() -> bytes:
    """The helper as one file for ``python3``: the same bytes for the same sources."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:

        def add(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), data, zipfile.ZIP_DEFLATED)

        add("__main__.py", f"import sys\n\nfrom {PACKAGE}.__main__ import main\n\nsys.exit(main())\n".encode())
        sources = resources.files("vmbackupd.guest_helper")
        for source in sorted(sources.iterdir(), key=lambda item: item.name):
            if source.name.endswith(".py"):
                add(f"{PACKAGE}/{source.name}", source.read_bytes())
    return packed.getvalue()


async def may_execute(agent: AgentCall) -> bool:
    """Whether the guest's agent runs programs for us (RHEL-like guests forbid it)."""
    info = _object(await agent("guest-info", None, _CALL_TIMEOUT), "guest-info")
    for command in get_list(info, "supported_commands", max_length=1024, error=GuestProtocolError):
        if isinstance(command, dict) and command.get("name") == "guest-exec":
            return command.get("enabled") is True
    return False


async def start(agent: AgentCall, *, vm: str, job: str, channel: str, lease: float) -> None:
    """Push the helper and start it; it serves ``channel`` soon after. Raises ``GuestAgentRefused``,
    ``GuestAgentUnavailable``, ``GuestHelperUnavailable``."""
    await _run(agent, _START, [job, channel, f"{lease:g}"], vm=vm, what="start the helper", timeout=60.0)


async def release(agent: AgentCall, *, vm: str, job: str, timeout: float) -> None:
    """Run the helper once to end another one of ``job`` and to remove everything it made."""
    await _run(agent, _RELEASE, [job], vm=vm, what=f"release the snapshots of {job}", timeout=timeout)


async def _run(agent: AgentCall, script: str, arguments: list[str], *, vm: str, what: str, timeout: float) -> None:
    """Run a shell script with the helper on its standard input, and wait for its end."""
    call = {
        "path": "/bin/sh",
        "arg": ["-c", script, "vmbackupd", *arguments],
        "capture-output": True,
        "input-data": base64.b64encode(await asyncio.to_thread(build_zipapp)).decode(),
    }
    started = _object(await agent("guest-exec", call, _CALL_TIMEOUT), "guest-exec")
    pid = get_int(started, "pid", error=GuestProtocolError)
    deadline = asyncio.get_running_loop().time() + timeout
    while True:
        status = _object(await agent("guest-exec-status", {"pid": pid}, _CALL_TIMEOUT), "guest-exec-status")
        if get_bool(status, "exited", error=GuestProtocolError):
            break
        if asyncio.get_running_loop().time() > deadline:
            raise GuestHelperUnavailable(f"VM {vm}: could not {what} in the guest within {timeout:g} s")
        await asyncio.sleep(_POLL)
    _check_status(status, vm, what)


def _check_status(status: dict[str, Any], vm: str, what: str) -> None:
    code = get_int(status, "exitcode", None, minimum=-(2**31), error=GuestProtocolError)
    if code == 0:
        return
    if code == NO_PYTHON:
        raise GuestHelperUnavailable(f"VM {vm} has no python3, which the guest helper needs: install it in the guest")
    said = _text(status, "err-data") or _text(status, "out-data") or "it said nothing"
    ended = f"exit status {code}" if code is not None else "it was killed"
    raise GuestHelperUnavailable(f"VM {vm}: could not {what} in the guest ({ended}): {said}")


def _text(status: dict[str, Any], key: str) -> str:
    """The end of a captured stream, as one line."""
    encoded = get_str(status, key, "", max_length=64 * 2**20, error=GuestProtocolError)
    try:
        text = base64.b64decode(encoded, validate=True).decode("utf-8", "replace")
    except (binascii.Error, ValueError) as error:
        raise GuestProtocolError(f"guest-exec-status: {key} is not base64") from error
    return " ".join(text.replace("\0", " ").split())[-400:]


def _object(value: object, command: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GuestProtocolError(f"{command}: expected an object")
    return value


def main(arguments: list[str]) -> int:
    """Write the zipapp to a file: for packages that install the helper in guests."""
    if len(arguments) != 2:
        print(f"usage: {shlex.quote(arguments[0])} FILE", file=sys.stderr)
        return 2
    with open(arguments[1], "wb") as file:
        file.write(build_zipapp())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
