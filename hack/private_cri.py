"""The CRI plugin of a private containerd: its configuration, a network for its pods, and crictl.

Standard library only, as private_containerd.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CACHE = Path("/var/cache/kata-py")
KUBERNETES = REPO / "hack/kubernetes"
RUNTIME_HANDLER = "kata-py"
HOST_DEVICES_HANDLER = "kata-py-host-devices"
"""Of containerd 1.x alone: as containerd has it when nobody sets privileged_without_host_devices."""

NAMESPACE = "k8s.io"
"""The CRI plugin's in containerd."""

PAUSE_IMAGE = "docker.io/library/kata-py-pause:latest"
PAUSE_IMAGE_ARCHIVE = CACHE / "images/pause.tar"

CRICTL_MISSING = CACHE / "bin/crictl.missing"
"""Why there is none."""

BRIDGE_PREFIX = "kpy-"
CNI_DIRECTORIES = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
"""Debian's, and everybody else's."""


@dataclass(frozen=True)
class Network:
    """A bridge of the instance's own, with its address on the host; pods join it by CNI.

    Made here and not by CNI's bridge plugin as a gateway: that would turn on forwarding on the whole host.
    """

    run: Path

    @property
    def _number(self) -> int:
        return int(hashlib.sha256(str(self.run).encode()).hexdigest()[:8], 16)

    @property
    def bridge(self) -> str:
        return f"{BRIDGE_PREFIX}{self._number:08x}"

    @property
    def prefix(self) -> str:
        """Of the addresses: a /24 of 198.18.0.0/15, which is for tests of networks (RFC 2544). Never the
        last of either half: tests/integration/lan.py has 198.19.255.0/24."""
        return f"198.{18 + (self._number >> 8) % 2}.{self._number % 255}"

    def create(self) -> None:
        """Idempotent. Raises CalledProcessError."""
        if Path("/sys/class/net", self.bridge).exists():
            return
        for command in (
            ["link", "add", self.bridge, "type", "bridge"],
            ["address", "add", f"{self.prefix}.1/24", "dev", self.bridge],
            ["link", "set", self.bridge, "up"],
        ):
            subprocess.run(["ip", *command], check=True, capture_output=True)

    def delete(self) -> None:
        """Idempotent."""
        subprocess.run(["ip", "link", "delete", self.bridge], capture_output=True)

    def write_cni(self, directory: Path) -> None:
        """The directory that CNI reads its configuration from."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "10-kata-py.conflist").write_text(self.conflist)

    @property
    def conflist(self) -> str:
        """CNI's configuration of a pod's network, JSON."""
        addresses = {
            "type": "host-local",
            "dataDir": str(self.run / "cni-addresses"),
            "ranges": [[{"subnet": f"{self.prefix}.0/24", "gateway": f"{self.prefix}.1"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        }
        plugin = {"type": "bridge", "bridge": self.bridge, "ipam": addresses}
        network = {"cniVersion": "0.4.0", "name": self.bridge, "plugins": [plugin]}
        return json.dumps(network, indent=2)


def major_version(binaries: Path) -> int:
    """Of the containerd in `binaries`: "containerd github.com/... v2.1.9 ..." is 2."""
    program = str(binaries / "containerd")
    text = subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"\sv?(\d+)\.\d+", text)
    if found is None:
        raise ValueError(f"{program} --version: found {text!r}, expected a version")
    return int(found[1])


def containerd_settings(major: int, run: Path) -> str:
    """The CRI plugin's part of containerd's configuration (version 2 for 1.x, 3 for 2.x).

    It ends with what hack/kubernetes has for this containerd: what a person is told to add is what runs here.
    """
    bin_dir = next((path for path in CNI_DIRECTORIES if path.exists()), CNI_DIRECTORIES[0])
    if major == 1:
        drop_in = (KUBERNETES / "containerd-1.x.toml").read_text()
        # The network namespaces elsewhere than everybody's: /run/netns is compared before and after tests.
        return f"""
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "{bin_dir}"
  conf_dir = "{run}/cni"
{drop_in}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.{HOST_DEVICES_HANDLER}]
  runtime_type = "io.containerd.kata-py.v2"
"""
    return f"""
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  netns_mounts_under_state_dir = true
[plugins."io.containerd.cri.v1.runtime".cni]
  bin_dir = "{bin_dir}"
  conf_dir = "{run}/cni"
"""


def containerd_imports(major: int) -> str:
    """The line before all tables: 2.x takes the file of hack/kubernetes as it is."""
    return f'imports = ["{KUBERNETES}/containerd-2.x.toml"]' if major > 1 else ""


def find_crictl() -> str | None:
    """As hack/get-crictl leaves it."""
    installed = CACHE / "bin/crictl"
    return str(installed) if installed.exists() else shutil.which("crictl")


def crictl_command(address: Path, *arguments: str) -> list[str]:
    """crictl, else what has its commands here."""
    crictl = find_crictl()
    return _command([crictl], address, *arguments) if crictl else client_command(address, *arguments)


def client_command(address: Path, *arguments: str) -> list[str]:
    """What has crictl's commands here."""
    program = [str(REPO / ".venv/bin/python"), str(REPO / "hack/cri_client.py")]
    return _command(program, address, *arguments)


def _command(program: list[str], address: Path, *arguments: str) -> list[str]:
    endpoint = f"unix://{address}"
    # No configuration file: crictl would warn that it has none, or take what is meant for another containerd.
    options = ["--config", "/dev/null", "--runtime-endpoint", endpoint, "--image-endpoint", endpoint]
    return [*program, *options, "--timeout", "180s", *arguments]
