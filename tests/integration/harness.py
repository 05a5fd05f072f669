"""What the integration tests share: ctr as a person uses it, and waiting."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import re
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from host_state import RUN
from private_containerd import RUNTIME, TEST_IMAGE, TEST_IMAGE_ARCHIVE, Containerd

T = TypeVar("T")

Config = Callable[..., tuple[str, ...]]
"""conftest's fixture `config`. Two files are named conftest.py: none can be imported by that name."""

TIMEOUT_S = 600
"""For anything that must happen: only a hang is longer, on the slowest machine under TCG."""

_numbers = itertools.count(1)


def new_id(name: str) -> str:
    """A container id nobody else has, on this machine."""
    return f"{re.sub('[^a-z0-9]+', '-', name.lower())[:40].strip('-')}-{RUN}-{next(_numbers)}"


@functools.cache
def busybox() -> bytes:
    """The test image's program, which is static."""
    with tarfile.open(TEST_IMAGE_ARCHIVE) as archive:
        layer = archive.extractfile(max(archive.getmembers(), key=lambda member: member.size))
        assert layer
        with tarfile.open(fileobj=io.BytesIO(layer.read())) as tar:
            program = tar.extractfile("bin/busybox")
            assert program
            return program.read()


def put_busybox(path: Path) -> None:
    path.write_bytes(busybox())
    path.chmod(0o755)


def wait_for(what: str, look: Callable[[], T | None], timeout_s: float = TIMEOUT_S) -> T:
    """The first truthy answer of `look`."""
    deadline = time.monotonic() + timeout_s
    while not (answer := look()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)
    return answer


def wait_page(url: str) -> bytes:
    """Of a server in a guest: one that stands still for a moment answers no ARP."""

    def page() -> bytes | None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            found: bytes = response.read()
            return found
        return None

    return wait_for(f"the page {url}", page)


def remove_cgroups(path: Path) -> None:
    """This one and all below, when their processes have ended."""

    def removed(cgroup: Path) -> bool:
        with contextlib.suppress(OSError):
            cgroup.rmdir()
        return not cgroup.exists()

    for directory, _, _ in os.walk(path, topdown=False):
        wait_for(f"the end of what runs in {directory}", functools.partial(removed, Path(directory)))


@contextlib.contextmanager
def loop(path: Path) -> Iterator[str]:
    """A device of the host that has the file's content."""
    command = ["losetup", "--find", "--show", str(path)]
    device = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


@dataclass(frozen=True)
class Events:
    """What containerd has published since."""

    _file: Path
    """What `ctr events` prints."""

    def of(self, container_id: str) -> list[tuple[str, dict[str, Any]]]:
        """Topic, without "/tasks/", and content of each of this container's so far, in order."""
        # Of the last line there may be a part only. Times tell events apart: a shim sends one again when it
        # has waited too long for containerd's answer.
        lines = dict.fromkeys(re.findall(r".* /tasks/\S+ \{.*\}\n", self._file.read_text()))
        found = []
        for line in lines:
            topic, content = line.partition(" /tasks/")[2].split(maxsplit=1)
            found.append((topic, json.loads(content)))
        return [(topic, content) for topic, content in found if content["container_id"] == container_id]


@dataclass(frozen=True)
class Ctr:
    """containerd's `ctr`, on one private containerd. Output is text unless `input` is bytes."""

    containerd: Containerd

    def __call__(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            self.containerd.ctr_command(*arguments),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert result.returncode == 0, (
                f"ctr {' '.join(arguments)}: {result.stderr}{self.containerd.log_tail()}"
            )
        return result

    def run_command(self, container_id: str, *command: str, options: tuple[str, ...] = ()) -> list[str]:
        """The command line of `ctr run` with kata-py and the test image."""
        return self.containerd.ctr_command(
            "run", "--runtime", RUNTIME, *options, TEST_IMAGE, container_id, *command
        )

    def run(
        self, container_id: str, *command: str, options: tuple[str, ...] = (), input: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """`ctr run --rm`, to its end."""
        return subprocess.run(
            self.run_command(container_id, *command, options=("--rm", *options)),
            capture_output=True,
            input=input,
            timeout=TIMEOUT_S,
        )

    @contextlib.contextmanager
    def detached(self, container_id: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
        """`ctr run -d`; at the end whatever is left of the container is removed by force."""
        try:
            result = subprocess.run(
                self.run_command(container_id, *command, options=("-d", *options)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                timeout=TIMEOUT_S,
            )
            assert result.returncode == 0, result.stderr
            yield container_id
        finally:
            self.remove(container_id)

    @contextlib.contextmanager
    def foreground(
        self, container_id: str, *command: str, options: tuple[str, ...] = ()
    ) -> Iterator[subprocess.Popen[bytes]]:
        """`ctr run --rm` with its output in `stdout`, under way; at the end nothing is left of it."""
        process = subprocess.Popen(
            self.run_command(container_id, *command, options=("--rm", *options)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        try:
            with process:
                try:
                    yield process
                finally:
                    process.kill()
        finally:
            self.remove(container_id)

    @contextlib.contextmanager
    def events(self, directory: Path) -> Iterator[Events]:
        """`ctr events`; nothing that happens from now on is missed."""
        file = directory / "events"
        with (
            file.open("wb") as out,
            subprocess.Popen(self.containerd.ctr_command("events"), stdout=out) as process,
        ):

            def heard() -> int:
                self("namespaces", "label", "default", "harness=listens")
                return file.stat().st_size

            try:
                wait_for("ctr to listen, which it does not tell", heard)
                yield Events(file)
            finally:
                process.kill()

    def remove(self, container_id: str) -> None:
        """Whatever there is of the container, by force."""
        self("tasks", "rm", "-f", container_id, check=False)
        self("containers", "rm", container_id, check=False)

    def exec(
        self, container_id: str, *command: str, options: tuple[str, ...] = (), input: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """`ctr tasks exec`, to its end."""
        return subprocess.run(
            self.containerd.ctr_command(
                "tasks", "exec", "--exec-id", new_id("exec"), *options, container_id, *command
            ),
            capture_output=True,
            input=input,
            timeout=TIMEOUT_S,
        )

    def status(self, container_id: str) -> str | None:
        """As `ctr tasks ls` shows it; None when it has no such task."""
        for line in self("tasks", "ls").stdout.splitlines()[1:]:
            name, _pid, status = line.split()
            if name == container_id:
                return status
        return None

    def host_pid(self, container_id: str) -> int:
        """The pid that `ctr tasks ls` shows."""
        for line in self("tasks", "ls").stdout.splitlines()[1:]:
            name, pid, _status = line.split()
            if name == container_id:
                return int(pid)
        raise AssertionError(f"no task {container_id}")


MONITORED = {"enable_debug": True, "extra_monitor_socket": "qmp"}
"""Of [hypervisor.qemu], for `qmp`."""


def qmp(pod: str, command: str, **arguments: Any) -> None:
    """Ask the QEMU of a pod that is MONITORED."""
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("rw") as monitor:
        connection.settimeout(TIMEOUT_S)
        connection.connect(f"/run/vc/vm/{pod}/extra-monitor.sock")
        assert "QMP" in json.loads(monitor.readline())
        for asked in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": arguments}):
            monitor.write(json.dumps(asked) + "\n")
            monitor.flush()
            while "event" in (answer := json.loads(monitor.readline())):
                pass
            assert "return" in answer, answer


def processes_of(container_id: str, program: str) -> list[int]:
    """Processes whose program's name begins with `program` and whose command line names the pod."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if entry.name.isdigit():
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                named = any(Path(argument).name.startswith(program) for argument in arguments[:3])
                if named and any(container_id in argument for argument in arguments):
                    found.append(int(entry.name))
    return sorted(found)
