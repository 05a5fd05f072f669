"""A shell in the guest itself, outside of any container's root."""

from __future__ import annotations

import itertools

from agent_client.protocols import agent_pb2, oci_json
from virtcontainers.vm import VM

ROOT = "/run/guest-root"
CAPABILITIES = ["CAP_NET_RAW", "CAP_SYSLOG"]

_numbers = itertools.count(1)


async def run_in_guest(vm: VM, command: str) -> str:
    """What a shell of the guest's own root says."""
    container_id = f"shell-{next(_numbers)}"
    spec = {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["/bin/busybox", "sh", "-ec", command],
            "cwd": "/",
            "env": ["PATH=/bin:/sbin"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": {
                k: ["CAP_NET_RAW", "CAP_SYSLOG"] for k in ("bounding", "effective", "permitted")
            },
        },
        "root": {"path": ROOT},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "devtmpfs", "source": "dev"},
            {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind"]},
        ],
        "linux": {"namespaces": [{"type": "mount"}]},
    }
    root = agent_pb2.Storage(driver="bind", source="/", fstype="bind", mount_point=ROOT)
    await vm.agent.create_container(
        agent_pb2.CreateContainerRequest(
            container_id=container_id, storages=[root], OCI=oci_json.spec_from_json(spec)
        )
    )
    await vm.agent.start_container(agent_pb2.StartContainerRequest(container_id=container_id))
    read = agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=container_id, len=1 << 16)
    output = b""
    for stream in (vm.agent.read_stdout, vm.agent.read_stderr):
        while data := (await stream(read)).data:
            output += data
    wait = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=container_id)
    status = (await vm.agent.wait_process(wait)).status
    await vm.agent.remove_container(agent_pb2.RemoveContainerRequest(container_id=container_id))
    assert status == 0, output
    return output.decode()
