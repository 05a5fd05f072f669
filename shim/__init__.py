"""What containerd talks to: start, delete, the Task service, events, stdio."""
