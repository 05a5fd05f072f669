"""The embedded guest: its image builder, and its agent (PID 1 in the machine)."""
