"""crictl as a person uses it, and pods to use it on: the real program, or what has its commands here."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import host_state
import private_cri
from harness import TIMEOUT_S, new_id, remove_cgroups, wait_for
from private_containerd import TEST_IMAGE, Containerd

Json = dict[str, Any]

CONTAINER, POD, NODE = 1, 0, 2
"""CRI's NamespaceMode."""


@dataclass(frozen=True)
class Result:
    """Of a command, or of a container's only process."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Terminal:
    """What a person types and sees."""

    process: subprocess.Popen[bytes]
    _fd: int
    _shown: bytes = b""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, text: str) -> None:
        """Wait until it has been shown; what comes before it is not looked at again."""
        deadline = time.monotonic() + TIMEOUT_S
        while (wanted := text.encode()) not in self._shown:
            readable, _, _ = select.select([self._fd], [], [], deadline - time.monotonic())
            assert readable, f"waited {TIMEOUT_S} s for {text!r}, found {self._shown!r}"
            try:
                self._shown += os.read(self._fd, 4096)
            except OSError:  # nobody has the other end any more
                break
        assert wanted in self._shown, (text, self._shown)
        self._shown = self._shown.partition(wanted)[2]


@dataclass(frozen=True)
class Crictl:
    """crictl, on one private containerd that has the CRI plugin."""

    containerd: Containerd
    directory: Path
    """For pods' and containers' configurations, and for logs."""

    def command(self, *arguments: str) -> list[str]:
        return self.containerd.crictl_command(*arguments)

    def __call__(self, *arguments: str, check: bool = True, input: str = "") -> Result:
        found = subprocess.run(
            self.command(*arguments),
            capture_output=True,
            text=True,
            input=input,
            timeout=TIMEOUT_S,
        )
        if check:
            assert found.returncode == 0, f"crictl {' '.join(arguments)}: {found.stderr}"
        return Result(found.returncode, found.stdout, found.stderr)

    @contextlib.contextmanager
    def terminal(self, *arguments: str, size: tuple[int, int] = (24, 80)) -> Iterator[Terminal]:
        """crictl on a terminal of its own, `size` rows and columns."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, size)
        command = self.command(*arguments)
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
            process.wait()
            os.close(ours)

    def inspect(self, container_id: str) -> Json:
        return _loads(self("inspect", container_id).stdout)

    def inspectp(self, pod_id: str) -> Json:
        return _loads(self("inspectp", pod_id).stdout)

    def status(self, container_id: str) -> Json:
        found: Json = self.inspect(container_id)["status"]
        return found

    @contextlib.contextmanager
    def pod(self, name: str, handler: str = private_cri.RUNTIME_HANDLER, **config: Any) -> Iterator[Pod]:
        """`runp`; at the end the pod is stopped and removed. `config` comes on top of a kubelet's usual."""
        name = new_id(name)
        defaults = {
            "metadata": {"name": name, "namespace": "default", "uid": name},
            "hostname": name,
            "log_directory": str(self.directory / name),
        }
        # Not below one that another run of tests takes away.
        cgroup = f"/kpy-test-{host_state.RUN}/{name}"
        linux = {
            "cgroup_parent": cgroup,  # statsp looks there
            "security_context": {"namespace_options": {"pid": CONTAINER}},
        }
        config = _merged({**defaults, "linux": linux}, config)
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(config))
        with cgroups(cgroup):
            pod_id = self("runp", "--runtime", handler, str(path)).stdout.strip()
            host_state.own_ids.add(pod_id)
            try:
                yield Pod(self, pod_id, name, path, cgroup)
            finally:
                self("rmp", "--force", pod_id, check=False)


@dataclass(frozen=True)
class CriClient(Crictl):
    """What is taken for crictl where that cannot be had."""

    def command(self, *arguments: str) -> list[str]:
        return private_cri.client_command(self.containerd.address, *arguments)


@dataclass(frozen=True)
class Pod:
    crictl: Crictl
    id: str
    name: str
    config: Path
    cgroup: str
    """In each hierarchy, the one that is above all of the pod's own."""
    containers: list[str] = field(default_factory=list)

    def create(self, name: str, *command: str, **config: Any) -> str:
        """The id of a new container, not started."""
        namespaces = json.loads(self.config.read_text())["linux"]["security_context"]["namespace_options"]
        defaults = {
            "metadata": {"name": name},
            "image": {"image": TEST_IMAGE},
            "command": list(command),
            "log_path": f"{name}.log",
            "linux": {"security_context": {"namespace_options": namespaces}},
        }
        path = self.config.with_name(f"{self.name}-{name}.json")
        path.write_text(json.dumps(_merged(defaults, config)))
        found = self.crictl("create", self.id, str(path), str(self.config)).stdout.strip()
        host_state.own_ids.add(found)
        self.containers.append(found)
        return found

    def start(self, name: str, *command: str, **config: Any) -> str:
        """The id of a new container that runs."""
        container_id = self.create(name, *command, **config)
        self.crictl("start", container_id)
        return container_id

    def run(self, name: str, *command: str, **config: Any) -> Result:
        """A container to its end, which is removed then."""
        container_id = self.start(name, *command, **config)
        status = self.wait_exited(container_id)
        logs = self.crictl("logs", container_id)
        self.crictl("rm", container_id)
        return dataclasses.replace(logs, returncode=status["exitCode"])

    def wait_exited(self, container_id: str) -> Json:
        """Its status."""

        def look() -> Json | None:
            status = self.crictl.status(container_id)
            return status if status["state"] == "CONTAINER_EXITED" else None

        return wait_for(f"the end of {container_id}", look)

    def exec(self, container_id: str, *command: str, check: bool = True) -> Result:
        """`exec -s`, and what the command wrote to stdout when that was all it wrote."""
        found = self.crictl("exec", "--sync", container_id, *command, check=check)
        # crictl ends both stdout and stderr, which it prints one after another, with a newline of its own.
        return dataclasses.replace(found, stdout=found.stdout.removesuffix("\n\n"))


def _loads(text: str) -> Json:
    found: Json = json.loads(text)
    return found


def _merged(under: Json, over: Json) -> Json:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


@contextlib.contextmanager
def cgroups(path: str) -> Iterator[None]:
    """The pod's own in each hierarchy, as the kubelet makes them and takes them away."""
    root = Path("/sys/fs/cgroup")
    hierarchies = (
        [root] if (root / "cgroup.controllers").exists() else [d for d in root.iterdir() if d.is_dir()]
    )
    made = [
        hierarchy / path.strip("/")
        for hierarchy in hierarchies
        if (hierarchy / "cgroup.procs").exists() and hierarchy.name != "unified"
    ]
    for directory in made:
        for each in (directory.parent, directory):
            each.mkdir(exist_ok=True)
            for name in ("cpuset.cpus", "cpuset.mems"):
                if (each / name).exists() and not (each / name).read_text().strip():
                    (each / name).write_text((each.parent / name).read_text())
    try:
        yield
    finally:
        for directory in made:
            remove_cgroups(directory)
            with contextlib.suppress(OSError):  # another pod is in there
                directory.parent.rmdir()
