"""What processes in a cgroup may open, with v1's devices controller and with our filter of v2: the same."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.descriptors import open_descriptors
from virtcontainers import bpf, syscalls
from virtcontainers.device_cgroup import DeviceRule
from virtcontainers.errors import InvalidArgumentError, KataError
from virtcontainers.resource_control import Hierarchy, ResourceController, find_hierarchies

REPO = Path(__file__).parents[3]
MOUNTINFO = Path("/proc/self/mountinfo")

TRY = """
echo $$ >"$1/cgroup.procs" || exit 1
for device in zero full; do
    for how in "r <" "w >>" "rw <>"; do
        if (eval ": ${how#* } /dev/$device"); then echo "$device ${how% *}"; fi
    done
done
if mknod "$2" c 1 5; then echo mknod; rm "$2"; fi
"""
NOTHING: set[str] = set()
ZERO, FULL = {"zero r", "zero w", "zero rw"}, {"full r", "full w", "full rw"}


def v1() -> list[Hierarchy]:
    return [hierarchy for hierarchy in find_hierarchies() if "devices" in hierarchy.controllers]


def v2() -> list[Hierarchy]:
    points = [line.split()[4] for line in MOUNTINFO.read_text().splitlines() if " - cgroup2 " in line]
    return [Hierarchy(Path(point), frozenset()) for point in points[:1]]


class Cgroup:
    def __init__(self, hierarchy: Hierarchy, directory: Path) -> None:
        path = f"/kata-py-unit-test-{secrets.token_hex(3)}"
        self.controller = ResourceController(path, [hierarchy])
        self.directory = hierarchy.mount_point / path[1:]
        self._node = directory / "node"

    def may(self) -> set[str]:
        """What a process in it can do with c 1:5 (zero) and c 1:7 (full), and whether it makes nodes."""
        command = ["sh", "-c", TRY, "sh", self.directory, self._node]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(found.stdout.splitlines())

    def update(self, *rules: str) -> None:
        self.controller.update_devices(parse(*rules))


def parse(*rules: str) -> list[DeviceRule]:
    return [DeviceRule(rule[0] == "+", rule[1:]) for rule in rules]


@contextlib.contextmanager
def made(hierarchies: list[Hierarchy], directory: Path) -> Iterator[Cgroup]:
    if os.geteuid() != 0:
        pytest.skip("cgroups need root")
    if not hierarchies:
        pytest.skip("this host has no such cgroup")
    cgroup = Cgroup(hierarchies[0], directory)
    cgroup.controller.create()
    try:
        yield cgroup
    finally:
        cgroup.controller.delete()


@pytest.fixture(params=[v1, v2])
def cgroup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cgroup]:
    with made(request.param(), tmp_path) as cgroup:
        yield cgroup


@pytest.fixture
def cgroup_v2(tmp_path: Path) -> Iterator[Cgroup]:
    with made(v2(), tmp_path) as cgroup:
        yield cgroup


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], NOTHING),
        (["+c 1:5 rwm"], ZERO | {"mknod"}),
        (["+c 1:5 r"], {"zero r"}),
        (["+c 1:5 r", "+c 1:5 w"], ZERO),
        # One rule has to allow all that is asked at once.
        (["+c 1:5 r", "+c *:5 w"], {"zero r", "zero w"}),
        (["+b 1:5 rwm"], NOTHING),
        (["+c 2:5 rwm", "+c 1:6 rwm"], NOTHING),
        (["+c *:* m"], {"mknod"}),
        (["+c 1:* rw"], ZERO | FULL),
        (["+c 1:5 rwm", "-c 1:5 wm"], {"zero r"}),
        (["+c 1:5 rwm", "+c 1:7 rwm", "-c 1:5 rwm"], FULL),
        # Taken away is what was given: the rule for all of them is another.
        (["+c 1:* rw", "-c 1:7 rw"], ZERO | FULL),
        (["+a *:* rwm"], ZERO | FULL | {"mknod"}),
        (["+a *:* rwm", "-c 1:5 w"], FULL | {"zero r", "mknod"}),
        (["+a *:* rwm", "-c 1:5 w", "-c *:* m"], FULL | {"zero r"}),
        (["+a *:* rwm", "-c 1:5 rw", "+c 1:5 r"], FULL | {"zero r", "mknod"}),
        (["+a *:* rwm", "-a *:* rwm", "+c 1:7 r"], {"full r"}),
    ],
)
def test_rules_are_followed_in_their_order(cgroup: Cgroup, rules: list[str], expected: set[str]) -> None:
    cgroup.update("-a *:* rwm")
    for rule in rules:  # and as one program after another
        cgroup.update(rule)
    assert cgroup.may() == expected
    cgroup.update("-a *:* rwm", *rules)
    assert cgroup.may() == expected


def test_what_is_allowed_for_a_while_is_as_it_was_afterwards(cgroup: Cgroup) -> None:
    cgroup.update("-a *:* rwm", "+c 1:5 r")
    with cgroup.controller.devices_allowed(parse("+c 1:5 rwm", "+c 1:7 rw")):
        assert cgroup.may() == ZERO | FULL | {"mknod"}
    assert cgroup.may() == {"zero r"}
    with (
        contextlib.suppress(ZeroDivisionError),
        cgroup.controller.devices_allowed(parse("+c 1:7 rwm")),
    ):
        raise ZeroDivisionError
    assert cgroup.may() == {"zero r"}


def test_where_all_is_allowed_nothing_is_taken_back(cgroup: Cgroup) -> None:
    cgroup.update("+a *:* rwm")
    with cgroup.controller.devices_allowed(parse("+c 1:5 rwm")):
        pass
    assert cgroup.may() == ZERO | FULL | {"mknod"}


def test_on_v2_nothing_is_allowed_that_no_rule_allows(cgroup_v2: Cgroup) -> None:
    assert cgroup_v2.may() == ZERO | FULL | {"mknod"}, "without a filter"
    cgroup_v2.update("+c 1:5 rwm")
    assert cgroup_v2.may() == ZERO | {"mknod"}


def test_the_cgroup_above_has_to_allow_it_too(cgroup_v2: Cgroup, tmp_path: Path) -> None:
    hierarchy = v2()[0]
    below = Cgroup(hierarchy, tmp_path)
    below.controller = ResourceController(f"{cgroup_v2.controller.path}/below", [hierarchy])
    below.directory = cgroup_v2.directory / "below"
    below.controller.create()
    try:
        cgroup_v2.update("+c 1:7 rw")
        below.update("+c 1:5 rw", "+c 1:7 r")
        assert below.may() == {"full r"}
    finally:
        below.controller.delete()


def test_the_filter_stays_when_its_process_ends(cgroup_v2: Cgroup) -> None:
    script = f"""
import os
from pathlib import Path
from virtcontainers.device_cgroup import DeviceRule
from virtcontainers.device_filter import DeviceFilter
DeviceFilter(Path({str(cgroup_v2.directory)!r})).update([DeviceRule(True, "c 1:5 r")])
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)
    assert cgroup_v2.may() == {"zero r"}


KEEP_TRYING = """
import os, sys
open(f"{sys.argv[1]}/cgroup.procs", "w").write(str(os.getpid()))
print("there", flush=True)
tries = 0
while not os.path.exists(sys.argv[2]) or not tries:
    os.close(os.open("/dev/zero", os.O_RDONLY))
    try:
        os.open("/dev/full", os.O_RDONLY)
        sys.exit("a moment without a filter")
    except PermissionError:
        tries += 1
"""


def test_there_is_no_moment_without_a_filter(cgroup_v2: Cgroup, tmp_path: Path) -> None:
    cgroup_v2.update("+c 1:5 r")
    command = [sys.executable, "-c", KEEP_TRYING, cgroup_v2.directory, tmp_path / "end"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "there\n"
        for _ in range(300):
            with cgroup_v2.controller.devices_allowed(parse("+c 1:3 rw")):
                pass
        (tmp_path / "end").touch()
        assert process.wait() == 0
    before = len(open_descriptors())
    cgroup_v2.update("+c 1:3 rw")
    assert len(open_descriptors()) <= before


def test_a_host_that_has_no_filters_is_warned_of_once(cgroup_v2: Cgroup) -> None:
    """Without the right to, as in a user namespace."""
    script = f"""
import logging
from pathlib import Path
from virtcontainers.device_cgroup import DeviceRule
from virtcontainers.device_filter import DeviceFilter
logging.basicConfig(format="%(levelname)s: %(message)s")
found = DeviceFilter(Path({str(cgroup_v2.directory)!r}))
found.update([DeviceRule(True, "c 1:5 r")])
with found.allowed([DeviceRule(True, "c 1:7 r")]):
    print("allowed")
"""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", script]
    if subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True).returncode:
        pytest.skip("this host gives nobody a user namespace")
    found = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert found.stdout == "allowed\n"
    assert found.stderr == (
        f"WARNING: cgroup {cgroup_v2.directory} may open all of the host's devices: bpf(BPF_PROG_LOAD): "
        "Operation not permitted\n"
    )


def test_a_signal_that_comes_while_a_filter_is_verified_is_no_refusal(
    cgroup_v2: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's word for it comes from here: nobody can send one at the right moment."""
    call, interrupted = syscalls.call, 0

    def interrupting(number: int, *arguments: Any) -> int:
        nonlocal interrupted
        if arguments[0] == bpf.Command.BPF_PROG_LOAD and interrupted < 3:
            interrupted += 1
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return call(number, *arguments)

    monkeypatch.setattr(syscalls, "call", interrupting)
    cgroup_v2.update("+c 1:5 r")
    assert (interrupted, cgroup_v2.may()) == (3, {"zero r"})


def test_what_is_no_rule_or_no_cgroup_is_an_error(cgroup_v2: Cgroup) -> None:
    cgroup_v2.update("+c 1:5 r")
    for rule in ("+u 1:5 r", "+c 1:x r", "+c 1:5 rx", f"+c 1:{1 << 40} r"):
        with pytest.raises(InvalidArgumentError, match=f"device rule '{rule[1:]}'"):
            cgroup_v2.update(rule)
    assert cgroup_v2.may() == {"zero r"}
    gone = ResourceController("/kata-py-unit-test-none", v2())
    with pytest.raises(KataError, match="kata-py-unit-test-none: No such file"):
        gone.update_devices(parse("+c 1:5 r"))
