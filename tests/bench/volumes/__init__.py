"""What a backup costs a running guest: ``./dev bench volumes``, on a guest of the lab.

The guest has virtual disks and LUNs; the daemon runs as a process of its own and is driven by ``vmbackupctl``, peers
by their own commands, in the same guest, taking turns.
"""
