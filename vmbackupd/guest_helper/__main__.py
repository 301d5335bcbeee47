"""The helper's command line.

--port NAME [--lease SECONDS]      serve the host on this virtio-serial port
--release JOB                      remove everything of a job (or of a control port's job), end its helper, exit
--untrack                          end all tracking of changes, remove what is pinned in the kernel for it, exit
--fd NUMBER                        serve an inherited descriptor instead of a port
--allow-files                      let ``serve`` export files (tests)
--remove-self                      delete the program's own file, and its directory, at the end

Or what an administrator of the guest calls: enroll, unenroll (see ``enroll``).
"""

import argparse
import errno
import os
import signal
import sys

# Everything is imported now: while a root filesystem is suspended nothing can be.
from . import control, enroll, memory, params, processes, release
from .dm import Dm, present
from .failures import HelperError
from .port import Port, open_port
from .tracker import Trackers

PORT_WAIT = 30.0
PORT = ("org.vmbackupd.", ".c")  # what stands around the job in the name of its control port


def main() -> int:
    """Exit status: 0 done, 1 failed, 2 usage, 3 the host fell silent and may come back: another may be started."""
    if sys.argv[1:2] and sys.argv[1] in enroll.COMMANDS:
        return enroll.main(sys.argv[1:])
    parser = argparse.ArgumentParser(prog="vmbackupd-guest-helper")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--port")
    action.add_argument("--fd", type=int)
    action.add_argument("--release", metavar="JOB")
    action.add_argument("--untrack", action="store_true")
    parser.add_argument("--lease", type=float, default=300.0)
    parser.add_argument("--allow-files", action="store_true")
    parser.add_argument("--remove-self", action="store_true")
    options = parser.parse_args()
    status = 0
    try:
        if options.release:
            _release(options.release)
        elif options.untrack:
            for device in Trackers().untrack():
                print(device)
        else:
            status = 0 if _serve(options) else 3
    except (HelperError, OSError) as error:
        print("vmbackupd guest helper: %s" % error, file=sys.stderr)
        return 1
    if options.remove_self:  # after a failure the service manager runs it once more, to clean up
        _remove_self()
    return status


def _serve(options: argparse.Namespace) -> bool:
    """False when nobody told the helper to end."""
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    memory.interruptible()
    try:
        port = Port(options.fd) if options.fd is not None else open_port(options.port, PORT_WAIT)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True  # an installed helper, started by udev, serves this port already
        raise
    port.announce()
    return control.Control(port, options.lease, options.allow_files).run()


def _end(number: int, frame: object) -> None:
    """SIGTERM: undo everything and go. Blocked while volumes are suspended."""
    sys.exit(1)


def _release(job: str) -> None:
    if job.startswith(PORT[0]) and job.endswith(PORT[1]):
        job = job[len(PORT[0]) : -len(PORT[1])]
    job = params.job_id(job)
    processes.end_helpers(job.join(PORT))
    for name in release.release(Dm(), job) if present() else []:
        print(name)


def _remove_self() -> None:
    """The file this program runs from, where it was pushed into a directory of its own."""
    path = os.path.abspath(sys.argv[0])
    if not path.endswith(".pyz"):
        return
    try:
        os.unlink(path)
        os.rmdir(os.path.dirname(path))
    except OSError:
        pass


if __name__ == "__main__":
    sys.exit(main())
