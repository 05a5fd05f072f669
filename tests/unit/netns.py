"""A network namespace that a test has for itself."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def own_namespace() -> Iterator[int]:
    """The pid of a process that is alone in it."""
    command = ["unshare", "--net", "sh", "-c", "echo made; exec sleep 1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"made\n"
        try:
            yield process.pid
        finally:
            process.kill()
