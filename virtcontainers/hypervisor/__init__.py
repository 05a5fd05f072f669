"""Machines: the interface, and QEMU behind it."""
