"""What containerd talks to: start, delete, the Task service, events, stdio."""

__version__ = "0.1.0"
