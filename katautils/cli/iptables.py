"""`kata-py iptables`: the packet filter of a pod's machine, after `kata-runtime iptables`."""

from __future__ import annotations

import sys
from pathlib import Path

from katautils.shim_client import do_get, do_put
from virtcontainers.errors import InvalidArgumentError


def get(sandbox_id: str, *, is_ipv6: bool) -> int:
    """Print it as `iptables-save` does. Raises KataError."""
    sys.stdout.write(do_get(sandbox_id, _url(is_ipv6=is_ipv6)).decode(errors="replace"))
    return 0


def set_(sandbox_id: str, file: Path, *, is_ipv6: bool) -> int:
    """Have what is in the file, or in stdin for "-", in place of it. Raises KataError."""
    try:
        rules = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(f"{file}: {error.strerror}") from error
    do_put(sandbox_id, _url(is_ipv6=is_ipv6), rules)
    return 0


def _url(*, is_ipv6: bool) -> str:
    return "/ip6tables" if is_ipv6 else "/iptables"
