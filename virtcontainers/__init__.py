"""Sandboxes in virtual machines: sandbox, container, VM, hypervisor, factory, storage, persistence.

The library knows nothing of containerd; `katautils` turns bundles and files into its configuration.
"""
