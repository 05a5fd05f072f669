"""Which of the host's devices the processes in a pod's cgroup may open, after Kata's `sandboxDevices` and
`createResourceController`.

For cgroup v1's devices controller, and for `virtcontainers.device_filter`, which is v2's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtcontainers.errors import KataError

log = logging.getLogger(__name__)

_ALWAYS = (
    *("c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm"),  # null, zero, full
    *("c 1:8 rwm", "c 1:9 rwm"),  # random, urandom
    *("c 5:0 rwm", "c 5:1 rwm", "c 136:* rwm"),  # tty, console, pts
    "c 10:200 rwm",  # net/tun
    *("c *:* m", "b *:* m"),
)
"""Numbers of Linux' admin-guide/devices.txt."""

_BY_NAME = ("/dev/kvm", "/dev/vhost-net", "/dev/vfio/vfio", "/dev/vhost-vsock")

_OF_THE_SHIM = ("c 10:237 rwm", "b 7:* rwm")
"""loop-control and the loop devices: with `sandbox_cgroup_only` it mounts containers' roots from inside."""

_PTMX = "c 5:2 rwm"


@dataclass(frozen=True)
class DeviceRule:
    """A line for devices.allow or devices.deny."""

    allow: bool
    text: str

    @property
    def device(self) -> str:
        """As "c 1:3"; its numbers may be "*"."""
        return self.text.rpartition(" ")[0]

    @property
    def access(self) -> str:
        return self.text.rpartition(" ")[2]


def sandbox_rules(
    spec_rules: Sequence[Mapping[str, Any]],
    *,
    sandbox_cgroup_only: bool,
    debug: bool,
    others: Iterable[Path],
) -> list[DeviceRule]:
    """What the pod's spec says (its linux.resources.devices), and then what a machine needs; `others` are
    devices that it has been configured to use. Order counts."""
    rules = [_of_spec(rule) for rule in spec_rules]
    rules += [DeviceRule(True, text) for text in _ALWAYS]
    if sandbox_cgroup_only:
        rules += [DeviceRule(True, text) for text in (*_OF_THE_SHIM, *([_PTMX] if debug else []))]
    return rules + device_rules([*map(Path, _BY_NAME), *others])


def device_rules(paths: Iterable[Path]) -> list[DeviceRule]:
    """One for each path that is a device."""
    rules = []
    for path in paths:
        try:
            found = path.stat()
        except OSError:
            continue
        if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
            kind = "c" if stat.S_ISCHR(found.st_mode) else "b"
            rules.append(DeviceRule(True, f"{kind} {os.major(found.st_rdev)}:{os.minor(found.st_rdev)} rwm"))
    return rules


def _of_spec(rule: Mapping[str, Any]) -> DeviceRule:
    def number(name: str) -> str:
        value = rule.get(name)
        return "*" if value is None or value == -1 else str(value)

    access = rule.get("access") or "rwm"
    text = f"{rule.get('type') or 'a'} {number('major')}:{number('minor')} {access}"
    return DeviceRule(bool(rule.get("allow")), text)


class DevicesController:
    """cgroup v1's, of one cgroup. What the cgroup above does not allow is not allowed here either."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def update(self, rules: Iterable[DeviceRule]) -> None:
        """In their order. Raises KataError."""
        for rule in rules:
            try:
                (self._directory / ("devices.allow" if rule.allow else "devices.deny")).write_text(rule.text)
            except OSError as error:
                if rule.allow and isinstance(error, PermissionError):
                    log.info("cgroup %s: device %s is not allowed above it", self._directory, rule.text)
                    continue
                asked = "allowed" if rule.allow else "denied"
                raise KataError(
                    f"{self._directory}: device {rule.text!r} cannot be {asked}: {error.strerror}"
                ) from error

    @contextlib.contextmanager
    def allowed(self, rules: Iterable[DeviceRule]) -> Iterator[None]:
        """`update` with what allows single devices, and then all is as it was. Raises KataError."""
        rules = list(rules)
        try:
            lines = (self._directory / "devices.list").read_text().splitlines()
        except OSError as error:
            raise KataError(f"{self._directory}: {error.strerror}") from error
        if any(line.startswith("a") for line in lines):
            yield
            return
        devices = {rule.device for rule in rules}
        before = [rule for line in lines if (rule := DeviceRule(True, line)).device in devices]
        try:
            self.update(rules)
            yield
        finally:
            self.update([*(DeviceRule(False, rule.text) for rule in rules), *before])
