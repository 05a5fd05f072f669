"""The pod's packet filter, by the image's iptables; its modules are loaded by its first use."""

from __future__ import annotations

import contextlib
import os

from guest.agent.reaper import Reaper
from ttrpc import Code, StatusError

_DIRECTORY = "/usr/sbin"
_WAIT_S = 5  # as Kata's agent


async def get_rules(reaper: Reaper, *, ipv6: bool) -> bytes:
    """As `iptables-save` tells them. Raises StatusError."""
    program = "ip6tables-save" if ipv6 else "iptables-save"
    return await _run(reaper, [program], b"", Code.INTERNAL)


async def set_rules(reaper: Reaper, rules: bytes, *, ipv6: bool) -> bytes:
    """All of them or none, for `iptables-restore`; what it says. Raises StatusError."""
    program = "ip6tables-restore" if ipv6 else "iptables-restore"
    return await _run(reaper, [program, "--wait", str(_WAIT_S)], rules, Code.INVALID_ARGUMENT)


async def _run(reaper: Reaper, argv: list[str], stdin: bytes, refused: Code) -> bytes:
    with contextlib.ExitStack() as stack:
        # Files: a pipe would have to be read and written meanwhile.
        fds = []
        for name in ("stdin", "stdout", "stderr"):
            fds.append(os.memfd_create(name))
            stack.callback(os.close, fds[-1])
        while stdin:
            stdin = stdin[os.write(fds[0], stdin) :]
        os.lseek(fds[0], 0, os.SEEK_SET)
        try:
            status = await reaper.spawn(f"{_DIRECTORY}/{argv[0]}", argv, fds)
        except FileNotFoundError:
            raise StatusError(Code.UNIMPLEMENTED, f"the guest image has no {argv[0]}") from None
        output, errors = (_whole(fd) for fd in fds[1:])
        if status:
            lines = errors.decode(errors="replace").splitlines()
            said = [line.removeprefix(f"{argv[0]}: ") for line in lines if not line.startswith("Try `")]
            reason = "; ".join(filter(None, said))
            raise StatusError(refused, f"{argv[0]}: {reason or f'exit status {status}'}")
        return output


def _whole(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
