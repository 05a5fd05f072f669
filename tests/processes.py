"""Whether processes still run."""

import time
from collections.abc import Collection
from pathlib import Path

TIMEOUT_S = 600


def runs(pid: int) -> bool:
    """A zombie does not: whoever inherits orphans here may let them lie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:  # also "no such process", when it ends between open and read
        return False


def wait_gone(pids: Collection[int]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while running := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(0.01)
