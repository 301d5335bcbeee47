"""A laboratory of real parts: libvirt, QEMU, an iSCSI target and Debian guests, private to one test run.

``with Lab() as lab: guest = lab.start_guest("plain")`` is the way in; ``python -m tests.lab shell plain`` keeps one up
by hand.
"""

from tests.lab.lab import Lab

__all__ = ["Lab"]
