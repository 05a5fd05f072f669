"""The host's devices that containers are given, after Kata's `pkg/device`."""
