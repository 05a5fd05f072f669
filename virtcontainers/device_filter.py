"""Which devices the processes of a cgroup v2 may open: a BPF program that the kernel asks about each of them
(BPF_PROG_TYPE_CGROUP_DEVICE, Linux 4.15).

Rules mean what they do to cgroup v1's devices controller (security/device_cgroup.c), except that nothing is
allowed before the first. Programs of the cgroups above are asked, too, and each has to allow it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from virtcontainers import bpf
from virtcontainers.bpf import BPFError, Command
from virtcontainers.device_cgroup import DeviceRule
from virtcontainers.errors import InvalidArgumentError, KataError
from virtcontainers.syscalls import opened

log = logging.getLogger(__name__)

_BPF_PROG_TYPE_CGROUP_DEVICE = 15
_BPF_CGROUP_DEVICE = 6
_BPF_F_ALLOW_MULTI = 1 << 1

# struct bpf_cgroup_dev_ctx: access << 16 | type, major, minor
_ACCESS_TYPE, _MAJOR, _MINOR = 0, 4, 8
_KINDS = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}
_ANY_ACCESS = 7

_RULE = re.compile(r"[bc] (\*|[0-9]{1,7}):(\*|[0-9]{1,7}) [rwm]+")
"""A major number has 12 bits, a minor number 20."""

_REFUSALS = (errno.EPERM, errno.ENOSYS, errno.EINVAL)
"""For want of rights, by a seccomp filter, by a kernel that has no such programs."""


@dataclass(frozen=True)
class _Rules:
    allows_all: bool = False
    exceptions: dict[str, int] = field(default_factory=dict)
    """Of devices, as "c 1:3": bits of _ACCESS that are not as for all."""

    def after(self, rules: Iterable[DeviceRule]) -> _Rules:
        allows_all, exceptions = self.allows_all, dict(self.exceptions)
        for rule in rules:
            if rule.text.startswith("a"):
                allows_all = rule.allow
                exceptions.clear()
                continue
            access = _access(rule)
            found = exceptions.pop(rule.device, 0)
            if left := found & ~access if rule.allow is allows_all else found | access:
                exceptions[rule.device] = left
        return _Rules(allows_all, exceptions)

    def program(self) -> bytes:
        """Returns 1 for what is allowed, else 0."""
        kind, access, major, minor, scratch = 2, 3, 4, 5, 0
        lines: list[bpf.Instruction | str] = [
            (bpf.LOAD_WORD, kind, 1, _ACCESS_TYPE, 0),
            (bpf.MOVE, access, kind, 0, 0),
            (bpf.AND_VALUE, kind, 0, 0, 0xFFFF),
            (bpf.SHIFT_RIGHT, access, 0, 0, 16),
            (bpf.LOAD_WORD, major, 1, _MAJOR, 0),
            (bpf.LOAD_WORD, minor, 1, _MINOR, 0),
        ]
        for number, (device, bits) in enumerate(self.exceptions.items()):
            letter, _, numbers = device.partition(" ")
            following = f"after {number}"
            lines.append((bpf.JUMP_NOT_EQUAL, kind, 0, following, _KINDS[letter]))
            for register, text in zip((major, minor), numbers.split(":"), strict=True):
                if text != "*":
                    lines.append((bpf.JUMP_NOT_EQUAL, register, 0, following, int(text)))
            # Refused is what is asked in part; allowed only the whole.
            others = bits if self.allows_all else _ANY_ACCESS & ~bits
            jump = bpf.JUMP_EQUAL if self.allows_all else bpf.JUMP_NOT_EQUAL
            lines += [
                (bpf.MOVE, scratch, access, 0, 0),
                (bpf.AND_VALUE, scratch, 0, 0, others),
                (jump, scratch, 0, following, 0),
                (bpf.MOVE_VALUE, 0, 0, 0, int(not self.allows_all)),
                (bpf.EXIT, 0, 0, 0, 0),
                following,
            ]
        lines += [(bpf.MOVE_VALUE, 0, 0, 0, int(self.allows_all)), (bpf.EXIT, 0, 0, 0, 0)]
        return bpf.assemble(lines)


def _access(rule: DeviceRule) -> int:
    """Raises InvalidArgumentError for a rule that is none."""
    if not _RULE.fullmatch(rule.text):
        raise InvalidArgumentError(
            f"device rule {rule.text!r}: expected a type of a, b or c, its numbers, and some of r, w and m"
        )
    return sum(bit for letter, bit in _ACCESS.items() if letter in rule.access)


class DeviceFilter:
    """Of one cgroup; it stays there when this process ends, and goes with the cgroup."""

    def __init__(self, cgroup: Path) -> None:
        self._cgroup = cgroup
        self._rules = _Rules()
        self._attached: list[int] = []
        """The programs that are asked, more than one only while they are exchanged."""
        self._loaded: _Rules | None = None
        self._is_refused = False

    def update(self, rules: Iterable[DeviceRule]) -> None:
        """In their order, after those that were. Where the host has no such filters, that is logged, once.
        Raises KataError."""
        self._set(self._rules.after(rules))

    @contextlib.contextmanager
    def allowed(self, rules: Iterable[DeviceRule]) -> Iterator[None]:
        """`update`, and then all is as it was."""
        before = self._rules
        try:
            self._set(before.after(rules))
            yield
        finally:
            self._set(before)

    def _set(self, rules: _Rules) -> None:
        # What fails here is made good by the next who gets here.
        self._rules = rules
        if self._is_refused or (rules == self._loaded and len(self._attached) == 1):
            return
        try:
            with opened(self._cgroup, os.O_RDONLY | os.O_DIRECTORY) as directory:
                self._replace(directory, rules)
        except OSError as error:
            raise KataError(f"cgroup {self._cgroup}: {error.strerror}") from error
        except BPFError as error:
            if self._attached or error.errno not in _REFUSALS or error.verifier_log:
                raise KataError(f"cgroup {self._cgroup}: its devices are not filtered: {error}") from error
            log.warning("cgroup %s may open all of the host's devices: %s", self._cgroup, error)
            self._is_refused = True

    def _replace(self, directory: int, rules: _Rules) -> None:
        """Meanwhile what both programs allow is allowed: there is no moment without any."""
        code = rules.program()
        with contextlib.ExitStack() as undo:
            program = bpf.load_program(_BPF_PROG_TYPE_CGROUP_DEVICE, code, _BPF_CGROUP_DEVICE)
            undo.callback(os.close, program)
            arguments = directory, program, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI
            bpf.syscall(Command.BPF_PROG_ATTACH, "=4I", *arguments)
            undo.pop_all()
        self._attached.append(program)
        self._loaded = rules
        while len(self._attached) > 1:
            before = self._attached[0]
            bpf.syscall(Command.BPF_PROG_DETACH, "=4I", directory, before, _BPF_CGROUP_DEVICE, 0)
            os.close(self._attached.pop(0))

    def close(self) -> None:
        """Let go of it; it is not taken away. Idempotent."""
        while self._attached:
            os.close(self._attached.pop())
