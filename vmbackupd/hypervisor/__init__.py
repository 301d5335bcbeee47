"""The hypervisor's side of a backup: domains, hot-plug, snapshots, the guest agent's transport, qemu-storage-daemon."""
