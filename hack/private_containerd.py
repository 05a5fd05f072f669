"""A containerd of our own: real, with its own root, state and sockets, beside whatever the machine runs.

`hack/containerd`, `hack/ctr`, the benchmark and the integration tests share it. Standard library only: it
runs under /usr/bin/python3 before anything is set up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import private_cri

REPO = Path(__file__).resolve().parent.parent
# As in lib.sh: two clones share what is expensive to make, and nothing that runs.
KEY = hashlib.sha256(str(REPO).encode()).hexdigest()[:8]
CACHE = Path("/var/cache/kata-py")
STATE = Path("/var/lib/kata-py") / KEY
RUN = Path("/run/kata-py") / KEY
GUEST_IMAGE = STATE / "guest"
TEST_IMAGE_ARCHIVE = CACHE / "images/busybox.tar"
TEST_IMAGE = "docker.io/library/busybox:latest"
RUNTIME = "io.containerd.kata-py.v2"
STANDARD_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# By default a shim is dead that takes 2 to 5 s for its answer, on a host however busy.
_TIMEOUTS = """[timeouts]
  "io.containerd.timeout.shim.cleanup" = "2m"
  "io.containerd.timeout.shim.load" = "2m"
  "io.containerd.timeout.shim.shutdown" = "2m"
  "io.containerd.timeout.task.state" = "2m"
"""

_TIMEOUT_S = 600
"""For what containerd does at its start: only a hang is longer, on the slowest host."""

Settings = Mapping[str, Mapping[str, Any]]
"""Section ("hypervisor.qemu") to keys and values, as in Kata's configuration.toml."""


def write_kata_config(path: Path, settings: Settings | None = None) -> Path:
    """A configuration.toml for this clone's guest image and small machines; `settings` come on top."""
    merged: dict[str, dict[str, Any]] = {
        "hypervisor.qemu": {
            "kernel": str(GUEST_IMAGE / "vmlinuz"),
            "initrd": str(GUEST_IMAGE / "initrd.img"),
            "default_memory": 256,
        },
        # An emulated machine is slow on a host that is busy.
        "agent.kata": {"dial_timeout": 240},
        "runtime": {"create_container_timeout": 240},
    }
    for section, values in (settings or {}).items():
        merged.setdefault(section, {}).update(values)
    lines = []
    for section, values in merged.items():
        # What JSON writes for strings, numbers, booleans and lists is TOML too.
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    path.write_text("\n".join(lines))
    return path


class ContainerdError(Exception):
    """The private containerd did not start, stop or answer; the message ends with its log's last lines."""


@dataclass(frozen=True)
class Containerd:
    """One private instance; `root` outlives it, `run` holds its config, sockets, pid file and log."""

    root: Path
    run: Path
    binaries: Path = Path("/usr/bin")
    """Where `containerd` and `ctr` are."""
    programs: Path = REPO / ".venv/bin"
    """Where it finds the shim."""
    settings: Settings | None = None
    """Of kata-py's configuration, when there is none yet."""
    cri: bool = False
    """With the CRI plugin, the runtime handler `kata-py`, and a bridge on the host for its pods."""
    plugins: str = ""
    """More of containerd's own configuration, for versions that read `version = 2`."""

    @property
    def address(self) -> Path:
        return self.run / "containerd.sock"

    @property
    def config(self) -> Path:
        return self.run / "containerd.toml"

    @property
    def kata_config(self) -> Path:
        return self.run / "configuration.toml"

    @property
    def log(self) -> Path:
        return self.run / "containerd.log"

    @property
    def _pid_file(self) -> Path:
        return self.run / "containerd.pid"

    @property
    def pid(self) -> int | None:
        """Of the running instance; a recycled pid is told by its command line."""
        try:
            pid = int(self._pid_file.read_text())
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        return pid if str(self.config).encode() in arguments else None

    def start(self) -> None:
        """Returns once it answers; does nothing when it already runs."""
        if self.pid:
            return
        self.write_configuration()
        if self.cri:
            self.network.create()
        environment = os.environ | {
            "PATH": f"{self.programs}:{self.binaries}:{STANDARD_PATH}",
            "KATA_CONF_FILE": str(self.kata_config),
        }
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [self.binaries / "containerd", "--config", self.config],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._pid_file.write_text(str(process.pid))
        deadline = time.monotonic() + _TIMEOUT_S
        while self.ctr("version").returncode:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise ContainerdError(f"{self.binaries}/containerd did not start:\n{self.log_tail()}")
            time.sleep(0.05)
        self._import_image("default", TEST_IMAGE, TEST_IMAGE_ARCHIVE)
        if self.cri:
            self._import_image(private_cri.NAMESPACE, TEST_IMAGE, TEST_IMAGE_ARCHIVE)
            self._import_image(
                private_cri.NAMESPACE, private_cri.PAUSE_IMAGE, private_cri.PAUSE_IMAGE_ARCHIVE
            )

    def _import_image(self, namespace: str, image: str, archive: Path) -> None:
        if not archive.exists() or image in self.ctr("-n", namespace, "images", "ls", "-q").stdout:
            return
        self.ctr("-n", namespace, "images", "import", str(archive), check=True)
        # The CRI plugin hears of it by an event.
        deadline = time.monotonic() + _TIMEOUT_S
        name = image.rpartition(":")[0]
        while namespace == private_cri.NAMESPACE and name not in self._crictl("images").stdout:
            if time.monotonic() > deadline:
                raise ContainerdError(f"the CRI plugin does not know {image}:\n{self.log_tail()}")
            time.sleep(0.05)

    def terminate(self, timeout_s: float = 30) -> None:
        """Ends containerd alone: containers go on."""
        pid = self.pid
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while self.pid:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)
        self._pid_file.unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends every container, then containerd."""
        if self.pid:
            if self.cri:
                with contextlib.suppress(ContainerdError):  # its CRI plugin may not have come up
                    if pods := self.crictl("pods", "-q").split():
                        self.crictl("rmp", "--force", *pods)
            self.remove_containers()
        self.terminate()
        if self.cri:
            self.network.delete()

    def remove_containers(self) -> None:
        for namespace in self.ctr("namespaces", "ls", "-q").stdout.split():
            for task in self.ctr("-n", namespace, "tasks", "ls", "-q").stdout.split():
                self.ctr("-n", namespace, "tasks", "rm", "-f", task)
            for container in self.ctr("-n", namespace, "containers", "ls", "-q").stdout.split():
                self.ctr("-n", namespace, "containers", "rm", container)

    def destroy(self) -> None:
        """Stops it and removes all it ever wrote."""
        self.stop()
        for directory in (self.root, self.run):
            shutil.rmtree(directory, ignore_errors=True)

    def kata_py(self, *arguments: str) -> None:
        """kata-py with its configuration, on this terminal."""
        environment = os.environ | {"KATA_CONF_FILE": str(self.kata_config)}
        subprocess.run([self.programs / "kata-py", *arguments], env=environment, check=True)

    def ctr_command(self, *arguments: str) -> list[str]:
        return [str(self.binaries / "ctr"), "--address", str(self.address), *arguments]

    def ctr(
        self, *arguments: str, check: bool = False, timeout_s: float = 300
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            self.ctr_command(*arguments), capture_output=True, text=True, timeout=timeout_s
        )
        if check and result.returncode:
            raise ContainerdError(f"ctr {' '.join(arguments)}: {result.stderr.strip()}\n{self.log_tail()}")
        return result

    @property
    def network(self) -> private_cri.Network:
        return private_cri.Network(self.run)

    def crictl_command(self, *arguments: str) -> list[str]:
        return private_cri.crictl_command(self.address, *arguments)

    def crictl(self, *arguments: str) -> str:
        """What crictl prints. Raises ContainerdError."""
        result = self._crictl(*arguments)
        if result.returncode:
            raise ContainerdError(f"crictl {' '.join(arguments)}: {result.stderr.strip()}\n{self.log_tail()}")
        return result.stdout

    def _crictl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.crictl_command(*arguments), capture_output=True, text=True)

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def write_configuration(self) -> None:
        """containerd's, always anew; kata-py's only where there is none: a person may have changed it."""
        for directory in (self.root, self.run):
            directory.mkdir(parents=True, exist_ok=True)
        if not self.kata_config.exists():
            write_kata_config(self.kata_config, self.settings)
        # Version 2 is read by 1.6, 1.7 and 2.x. The NRI plugin, and CRI's where nobody wants it, would listen
        # where the machine's own containerd may; `opt` would make /opt/containerd.
        disabled = ["io.containerd.nri.v1.nri", "io.containerd.internal.v1.opt"]
        version, imports, settings = 2, "", ""
        if self.cri:
            major = private_cri.major_version(self.binaries)
            version = 2 if major == 1 else 3
            imports = private_cri.containerd_imports(major)
            settings = private_cri.containerd_settings(major, self.run)
            self.network.write_cni(self.run / "cni")
        else:
            disabled += ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"]
            disabled += ["io.containerd.cri.v1.runtime", "io.containerd.podsandbox.controller.v1.podsandbox"]
        self.config.write_text(
            f"""version = {version}
root = "{self.root}"
state = "{self.run}/state"
disabled_plugins = {json.dumps(disabled)}
{imports}
[grpc]
  address = "{self.address}"
[ttrpc]
  address = "{self.address}.ttrpc"
[debug]
  level = "debug"
{_TIMEOUTS}
{settings}
{self.plugins}"""
        )


def require_root() -> None:
    if os.geteuid() != 0:
        sys.exit(f"error: {Path(sys.argv[0]).name} must run as root: containerd does, and so do its machines")


def of_this_clone_running() -> Containerd:
    """`of_this_clone`, started if it is not up. Who cannot have it ends here, with a message."""
    require_root()
    containerd = of_this_clone()
    if containerd.pid is None:
        started = subprocess.run([REPO / "hack/containerd", "start"], stdout=subprocess.DEVNULL)
        if started.returncode:
            sys.exit(started.returncode)
    return containerd


def of_this_clone() -> Containerd:
    """The instance of `hack/containerd` and `hack/ctr`. Its template is its own, and so is a VM cache."""
    factory = {
        "enable_template": True,
        "template_path": str(RUN / "template"),
        "vm_cache_endpoint": str(RUN / "cache.sock"),
    }
    return Containerd(root=STATE / "containerd", run=RUN, settings={"factory": factory}, cri=True)
