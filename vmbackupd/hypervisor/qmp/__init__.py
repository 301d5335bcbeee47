"""QEMU without libvirt: the hypervisor interface on QMP sockets."""
