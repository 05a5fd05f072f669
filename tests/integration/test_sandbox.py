"""Sandboxes without containerd: real machines, driven through virtcontainers alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from harness import TIMEOUT_S, new_id, processes_of, put_busybox
from templates import Pods

from agent_client.client import REQUEST_TIMEOUT_S
from virtcontainers import persist
from virtcontainers.agent import KataAgent
from virtcontainers.cleanup import cleanup
from virtcontainers.config import (
    AgentConfig,
    ContainerConfig,
    ContainerType,
    FactoryConfig,
    HypervisorConfig,
    Mount,
    NetworkConfig,
    RootFs,
    SandboxConfig,
    SharedFS,
)
from virtcontainers.container import Container, ContainerState
from virtcontainers.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    KataError,
    NotFoundError,
    UnavailableError,
)
from virtcontainers.factory import Factory
from virtcontainers.factory.direct import Direct
from virtcontainers.fs_share import FilesystemShare
from virtcontainers.hypervisor.hotplug import NotOnline
from virtcontainers.mount import mounts_below
from virtcontainers.sandbox import Sandbox, create_sandbox
from virtcontainers.vm import VMConfig

CAPABILITIES = ["CAP_CHOWN", "CAP_KILL", "CAP_SYS_ADMIN"]


def spec(*args: str, mounts: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """A small OCI spec of a container that runs `args` of busybox."""
    kinds = ("bounding", "effective", "permitted")
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(args),
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": dict.fromkeys(kinds, CAPABILITIES),
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            *(mounts or []),
        ],
        "linux": {"namespaces": [{"type": t} for t in ("pid", "ipc", "uts", "mount", "network")]},
    }


def container_config(directory: Path, container_id: str, given: dict[str, Any]) -> ContainerConfig:
    """A bundle with a root of busybox, as an overlay that the sandbox mounts."""
    base = directory / container_id
    lower = base / "lower"
    (lower / "bin").mkdir(parents=True)
    put_busybox(lower / "bin/busybox")
    for applet in ("sh", "cat", "echo", "sleep", "true"):
        (lower / "bin" / applet).symlink_to("busybox")
    for name in ("proc", "dev"):
        (lower / name).mkdir()
    for name in ("upper", "work", "rootfs"):
        (base / name).mkdir()
    options = (f"lowerdir={lower}", f"upperdir={base}/upper", f"workdir={base}/work")
    return ContainerConfig(
        id=container_id,
        bundle=base,
        rootfs=RootFs(
            target=base / "rootfs", mounts=(Mount(type="overlay", source="overlay", options=options),)
        ),
        spec=given,
        container_type=ContainerType.SINGLE_CONTAINER,
    )


def sandbox_config(
    directory: Path, guest_image: Path, sandbox_id: str, given: dict[str, Any], **hypervisor: Any
) -> SandboxConfig:
    hypervisor = {
        "shared_fs": SharedFS.VIRTIO_9P,
        "kernel": guest_image / "vmlinuz",
        "initrd": guest_image / "initrd.img",
        "default_memory_mib": 256,
        **hypervisor,
    }
    return SandboxConfig(
        id=sandbox_id,
        hostname="pod",
        hypervisor=HypervisorConfig(**hypervisor),
        agent=AgentConfig(dial_timeout_s=120),
        factory=FactoryConfig(),
        network=NetworkConfig(),
        container=container_config(directory, sandbox_id, given),
    )


def booting(config: SandboxConfig) -> Factory:
    return Factory(Direct(VMConfig(config.hypervisor, config.agent)))


async def run(container: Container) -> tuple[int, bytes]:
    """Start the container; its exit status and stdout."""
    await container.start()

    async def everything(read: Callable[[int], Awaitable[bytes]]) -> bytes:
        data = b""
        while piece := await read(65536):
            data += piece
        return data

    process = container.process
    output, _, status = await asyncio.gather(
        everything(process.read_stdout), everything(process.read_stderr), process.wait()
    )
    return status, output


def test_containers_share_a_machine_and_a_failed_one_leaves_it_usable(
    tmp_path: Path, guest_image: Path
) -> None:
    async def body() -> None:
        pod = new_id("pod")
        (tmp_path / "volume").mkdir()
        volume = [
            {"destination": "/data", "type": "bind", "source": str(tmp_path / "volume"), "options": ["rbind"]}
        ]
        config = sandbox_config(tmp_path, guest_image, pod, spec("sleep", "1000"))
        sandbox = await create_sandbox(config, booting(config))
        try:
            await sandbox.containers[pod].start()
            command = spec(
                "sh", "-c", "echo from the guest > /data/f; cat /proc/sys/kernel/hostname", mounts=volume
            )
            first = await sandbox.create_container(container_config(tmp_path, "one", command))
            assert await run(first) == (0, b"pod\n")
            assert (tmp_path / "volume/f").read_text() == "from the guest\n"

            shared = sorted(p.name for p in sandbox.fs_share.shared_path.iterdir())
            with pytest.raises(KataError, match="no-such-command"):
                await sandbox.create_container(container_config(tmp_path, "two", spec("no-such-command")))
            broken = spec("true", mounts=[{**volume[0], "source": str(tmp_path / "nowhere")}])
            with pytest.raises(InvalidArgumentError, match=r"/data of container three.*nowhere"):
                await sandbox.create_container(container_config(tmp_path, "three", broken))
            with pytest.raises(AlreadyExistsError, match="one"):
                await sandbox.create_container(first.config)
            assert set(sandbox.containers) == {pod, "one"}
            assert sorted(p.name for p in sandbox.fs_share.shared_path.iterdir()) == shared

            four = await sandbox.create_container(
                container_config(tmp_path, "four", spec("sh", "-c", "exit 4"))
            )
            assert await run(four) == (4, b"")
            assert four.state is ContainerState.STOPPED
            await four.delete()
            with pytest.raises(FailedPreconditionError, match="running, expected created or stopped"):
                await sandbox.containers[pod].delete()
        finally:
            await sandbox.delete()
        await sandbox.delete()

    asyncio.run(body())


def test_a_container_whose_memory_the_guest_does_not_use_is_undone_and_the_pod_goes_on(
    tmp_path: Path, guest_image: Path
) -> None:
    """Its agent leaves the blocks offline, as Kata's does with those that the kernel refuses."""

    async def online_cpu_mem(agent: KataAgent, nb_cpus: int, *, cpu_only: bool, timeout_s: float) -> None:
        pass

    async def body() -> None:
        pod = new_id("pod")
        config = sandbox_config(tmp_path, guest_image, pod, spec("sleep", "1000"), default_maxmemory_mib=1024)
        limited = spec("sh", "-c", "while read -r what size unit; do echo $size; break; done </proc/meminfo")
        limited["linux"]["resources"] = {"memory": {"limit": 512 << 20}}
        sandbox = await create_sandbox(config, booting(config))
        try:
            await sandbox.containers[pod].start()
            shared = sorted(p.name for p in sandbox.fs_share.shared_path.iterdir())
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(KataAgent, "online_cpu_mem", online_cpu_mem)
                patch.setattr("virtcontainers.online._SETTLED_S", 0.5)
                patch.setattr("virtcontainers.online._TAKE_BACK_TIMEOUT_S", 120)
                with pytest.raises(NotOnline, match="does not use 512 MiB more memory: its MemTotal is "):
                    await sandbox.create_container(container_config(tmp_path, "late", limited))
            assert set(sandbox.containers) == {pod}
            assert sorted(p.name for p in sandbox.fs_share.shared_path.iterdir()) == shared
            assert sandbox.memory_mib == 256, "what it does not use was taken back"
            free = await sandbox.create_container(container_config(tmp_path, "free", spec("true")))
            assert await run(free) == (0, b"")
            later = await sandbox.create_container(container_config(tmp_path, "later", limited))
            status, shown = await run(later)
            assert status == 0
            assert int(shown) > 512 << 10
        finally:
            await sandbox.delete()

    asyncio.run(body())


def test_a_second_sandbox_of_the_same_name_is_refused(tmp_path: Path, guest_image: Path) -> None:
    async def body() -> None:
        pod = new_id("pod")
        persist.store(persist.SandboxState(id=pod, shim_pid=os.getpid()))
        try:
            with pytest.raises(AlreadyExistsError, match=pod):
                given_config = sandbox_config(tmp_path, guest_image, pod, spec("true"))
                await create_sandbox(given_config, booting(given_config))
        finally:
            persist.destroy(pod)

    asyncio.run(body())


@pytest.mark.parametrize(
    ("shared_fs", "victim"), [(SharedFS.VIRTIO_9P, "qemu-system"), (SharedFS.VIRTIO_FS, "virtiofsd")]
)
def test_the_monitor_tells_who_died_and_every_wait_ends(
    tmp_path: Path, guest_image: Path, cloning: Pods, shared_fs: SharedFS, victim: str
) -> None:
    async def body() -> None:
        pod = new_id("pod")
        config = sandbox_config(tmp_path, guest_image, pod, spec("sleep", "1000"), shared_fs=shared_fs)
        sandbox = await create_sandbox(config, cloning(config))
        try:
            container = sandbox.containers[pod]
            await container.start()
            monitor = asyncio.create_task(sandbox.monitor())
            waiting = asyncio.create_task(container.process.wait())
            reading = asyncio.create_task(container.process.read_stdout(10))
            await asyncio.sleep(0.1)
            assert sandbox._vm is not None
            pids = sandbox._vm.hypervisor.get_pids()
            comm = {Path(f"/proc/{pid}/comm").read_text().strip(): pid for pid in pids}
            os.kill(next(pid for name, pid in comm.items() if name.startswith(victim)), signal.SIGKILL)
            async with asyncio.timeout(60):
                reason = await monitor
                assert victim.split("-")[0] in reason.lower()
                assert await reading == b""
                with pytest.raises(UnavailableError):
                    await waiting
            with pytest.raises(UnavailableError):
                await sandbox.create_container(container_config(tmp_path, "late", spec("true")))
        finally:
            await sandbox.delete()

    asyncio.run(body())


def test_a_guest_that_answers_no_more_is_not_waited_for_at_every_step(
    tmp_path: Path, guest_image: Path, cloning: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    for timeout in ("_KILL_TIMEOUT_S", "_CHECK_TIMEOUT_S"):
        monkeypatch.setattr(f"virtcontainers.sandbox.{timeout}", 2)

    async def body() -> None:
        pod = new_id("pod")
        config = sandbox_config(tmp_path, guest_image, pod, spec("sleep", "1000"))
        sandbox = await create_sandbox(config, cloning(config))
        try:
            await sandbox.containers[pod].start()
            await sandbox.containers[pod].pause()
            os.kill(sandbox.hypervisor_pid, signal.SIGSTOP)
        finally:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await sandbox.delete()
        assert mounts_below(tmp_path) == mounts_below(FilesystemShare(pod).root) == []

    asyncio.run(body())


OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_sandbox import booting, create_sandbox, sandbox_config, spec

async def body():
    config = sandbox_config(Path({directory!r}), Path({image!r}), {pod!r}, spec("sleep", "1000"))
    await create_sandbox(config, booting(config))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(body())
"""


@pytest.mark.parametrize(
    ("shared_fs", "victim"), [(SharedFS.VIRTIO_9P, "qemu-system"), (SharedFS.VIRTIO_FS, "virtiofsd")]
)
def test_a_machine_that_dies_while_its_guest_is_set_up_is_the_reason(
    tmp_path: Path, guest_image: Path, cloning: Pods, shared_fs: SharedFS, victim: str
) -> None:
    async def body() -> None:
        pod = new_id("pod")
        config = sandbox_config(tmp_path, guest_image, pod, spec("true"), shared_fs=shared_fs)

        killed_at = 0.0

        async def kill(sandbox: Sandbox) -> None:
            nonlocal killed_at
            killed_at = asyncio.get_running_loop().time()
            for pid in processes_of(pod, victim):
                with contextlib.suppress(ProcessLookupError):  # one half of virtiofsd ends with the other
                    os.kill(pid, signal.SIGKILL)

        with pytest.raises(KataError, match=f"is dead: {victim.split('-')[0]}.*SIGKILL"):
            await create_sandbox(config, cloning(config), prestart=kill)
        # Without virtiofsd the guest would be waited for until the agent's timeout.
        assert asyncio.get_running_loop().time() - killed_at < REQUEST_TIMEOUT_S

    asyncio.run(body())


def test_cleanup_takes_a_pod_off_the_host_whose_owner_was_killed(tmp_path: Path, guest_image: Path) -> None:
    pod = new_id("pod")
    code = OWNER.format(path=sys.path, directory=str(tmp_path), image=str(guest_image), pod=pod)
    owner = subprocess.run([sys.executable, "-c", code], timeout=TIMEOUT_S)
    assert owner.returncode == -signal.SIGKILL
    assert persist.load(pod).rootfs == {pod: str(tmp_path / pod / "rootfs")}
    asyncio.run(cleanup(pod, pod))
    with pytest.raises(NotFoundError):
        persist.load(pod)
    asyncio.run(cleanup(pod, pod))


def test_what_would_not_go_is_all_that_stays_and_hides_no_reason(
    tmp_path: Path, guest_image: Path, cloning: Pods
) -> None:
    pod = new_id("pod")
    config = sandbox_config(tmp_path, guest_image, pod, spec("true"))
    odd = FilesystemShare(pod).root / "mounts" / pod / "odd"

    async def put_it_there(sandbox: Sandbox) -> None:
        odd.write_text("content")
        raise InvalidArgumentError("the hook's reason")

    try:
        with pytest.raises(InvalidArgumentError, match="the hook's reason"):
            asyncio.run(create_sandbox(config, cloning(config), prestart=put_it_there))
        assert processes_of(pod, "qemu-system") == []
        assert mounts_below(tmp_path) == mounts_below(FilesystemShare(pod).root) == []
        assert odd.read_text() == "content"
        with pytest.raises(KataError, match=f"{odd} is not removed: it has content"):
            asyncio.run(cleanup(pod, pod))
    finally:
        odd.unlink(missing_ok=True)
        asyncio.run(cleanup(pod, pod))


def test_a_creation_that_fails_leaves_nothing(tmp_path: Path, guest_image: Path) -> None:
    async def body() -> None:
        pod = new_id("pod")
        given = spec("true", mounts=[{"destination": "/x", "type": "bind", "source": "/nowhere"}])
        with pytest.raises(InvalidArgumentError, match=r"mount /x.*/nowhere"):
            given_config = sandbox_config(tmp_path, guest_image, pod, given)
            await create_sandbox(given_config, booting(given_config))
        with pytest.raises(InvalidArgumentError, match="kernel"):
            config = sandbox_config(tmp_path / "2", guest_image, pod, spec("true"), kernel=tmp_path / "none")
            await create_sandbox(config, booting(config))
        with pytest.raises(InvalidArgumentError, match=r'shared_fs = "none".*expected "virtio-fs"'):
            config = sandbox_config(tmp_path / "3", guest_image, pod, spec("true"), shared_fs=SharedFS.NONE)
            await create_sandbox(config, booting(config))

    asyncio.run(body())
