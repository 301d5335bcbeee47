"""``python -m tests.lab shell [KIND]``: a lab and a guest by hand, until standard input ends or Ctrl-C."""

from __future__ import annotations

import contextlib
import sys

from tests.lab.image import SYSTEMS, ensure, timed
from tests.lab.lab import KINDS, Lab


def main(words: list[str]) -> int:
    """Run one command; the exit status."""
    if words[:1] == ["image"]:
        for system in SYSTEMS:
            print(ensure(system).directory)
        return 0
    if words[:1] != ["shell"] or len(words) > 2 or not {*words[1:]} <= {*KINDS}:
        print(f"usage: python -m tests.lab image | shell [{'|'.join(KINDS)}]", file=sys.stderr)
        return 2
    kind = words[1] if len(words) == 2 else "plain"
    with contextlib.suppress(KeyboardInterrupt), Lab() as lab:
        with timed(f"guest {kind} is up"):
            guest = lab.start_guest(kind)
        facts = {"directory": lab.dir, "libvirt": lab.libvirt_uri, "bus": lab.bus_address, "iscsi": lab.iscsi.portal}
        facts |= {
            "domain": f"{guest.name} {guest.uuid}",
            "console": guest.console_path,
            "kvm": "yes" if lab.kvm else "no",
        }
        for name, fact in facts.items():
            print(f"{name:<12}{fact}")
        print("a line is run in the guest; end with Ctrl-D", flush=True)
        for line in sys.stdin:
            if line.strip():
                out = guest.exec(f"({line.strip()}) 2>&1", check=False, timeout=600)
                sys.stdout.write(out.decode(errors="replace"))
                sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
