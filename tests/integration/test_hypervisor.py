"""Real machines of the QEMU driver, with the real guest."""

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guest_shell import run_in_guest
from harness import TIMEOUT_S
from host_state import RUN
from processes import wait_gone

from agent_client.protocols import agent_pb2, health_pb2
from ttrpc import StatusError
from virtcontainers.agent import KataAgent
from virtcontainers.config import (
    GUEST_SHARED_DIR,
    AgentConfig,
    AgentTransport,
    FactoryConfig,
    HypervisorConfig,
    SharedFS,
)
from virtcontainers.errors import KataError
from virtcontainers.factory import Factory, new_factory
from virtcontainers.factory.direct import Direct
from virtcontainers.hypervisor import qemu, qmp, vhost_vsock, virtiofsd
from virtcontainers.hypervisor.base import BootTimeout, HypervisorError, QMPFailed, QMPTimeout, VMState
from virtcontainers.hypervisor.process import find_processes
from virtcontainers.hypervisor.qemu import Qemu
from virtcontainers.vm import VM, VMConfig

REPO = Path(__file__).resolve().parents[2]
DAEMONS = Path("/var/cache/kata-py/daemons/bin")
"""Of a newer Debian than the machine's."""

_numbers = itertools.count(1)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines need root")


@pytest.fixture
def vm_id() -> str:
    return f"test-hypervisor-{RUN}-{next(_numbers)}"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


@pytest.fixture
def config(guest_image: Path) -> VMConfig:
    hypervisor = HypervisorConfig(
        kernel=guest_image / "vmlinuz",
        initrd=guest_image / "initrd.img",
        default_memory_mib=256,
        default_maxvcpus=2,
        shared_fs=SharedFS.VIRTIO_9P,
    )
    return VMConfig(hypervisor, AgentConfig(dial_timeout_s=120, transport=AgentTransport.SERIAL))


def changed(config: VMConfig, *, agent: dict[str, Any] | None = None, **hypervisor: Any) -> VMConfig:
    return VMConfig(replace(config.hypervisor, **hypervisor), replace(config.agent, **agent or {}))


@contextlib.asynccontextmanager
async def machine(
    vm_id: str, config: VMConfig, shared: Path | None, *, booted: bool = True
) -> AsyncIterator[VM]:
    """Not `booted`: as soon as its processes run; the guest has hardly begun."""
    vm = VM.new(vm_id, config, shared_path=shared)
    await (vm.start() if booted else vm.hypervisor.start_vm(config.agent.dial_timeout_s))
    try:
        yield vm
    finally:
        directory = vm.hypervisor.directory
        await vm.stop()
        await vm.stop()
        assert vm.hypervisor.state is VMState.STOPPED
        assert find_processes(directory) == []
        assert not directory.exists()


async def answers(vm: VM, timeout_s: float = 60) -> bool:
    try:
        await vm.agent.check(health_pb2.CheckRequest(), timeout_s=timeout_s)
    except StatusError:
        return False
    return True


def daemon(name: str, *candidates: Path) -> Path:
    found = next((path for path in (*candidates, DAEMONS / name) if path.exists()), None)
    if found is None:
        pytest.skip(f"no {name} here, and none in {DAEMONS}")
    return found


def virtiofsd_of(flavour: virtiofsd.Flavour) -> Path:
    for path in (*virtiofsd.DAEMONS, DAEMONS / "virtiofsd"):
        if path.exists() and virtiofsd.detect_flavour(path) is flavour:
            return path
    pytest.skip(f"no virtiofsd in {flavour.value} here, and none in {DAEMONS}")


@pytest.fixture(params=["9p", "virtiofsd-c", "virtiofsd-rust"])
def sharing(request: pytest.FixtureRequest, config: VMConfig) -> VMConfig:
    if request.param == "9p":
        return config
    flavour = virtiofsd.Flavour.C if request.param == "virtiofsd-c" else virtiofsd.Flavour.RUST
    return changed(
        config,
        shared_fs=SharedFS.VIRTIO_FS,
        virtio_fs_daemon=virtiofsd_of(flavour),
        virtio_fs_extra_args=("--thread-pool-size=1", "--announce-submounts"),
    )


async def write_from_guest(vm: VM, name: str, data: bytes) -> None:
    """A file in the share, written by the guest."""
    request = agent_pb2.CopyFileRequest(
        path=GUEST_SHARED_DIR + name, file_size=len(data), file_mode=0o100644, dir_mode=0o755, data=data
    )
    await vm.agent.copy_file(request)


async def create_sandbox(vm: VM, vm_id: str) -> None:
    await KataAgent(vm.agent).create_sandbox(
        vm_id,
        hostname="guest",
        dns=[],
        sandbox_pidns=False,
        shm_size_bytes=1 << 20,
        hypervisor=vm.config.hypervisor,
        config=vm.config.agent,
    )


def test_what_the_guest_writes_to_the_share_is_on_the_host(
    vm_id: str, sharing: VMConfig, shared: Path
) -> None:
    """Under QEMU's seccomp sandbox."""
    data = os.urandom(100_000)

    async def body() -> None:
        async with machine(vm_id, sharing, shared) as vm:
            status = Path(f"/proc/{vm.hypervisor.pid}/status").read_text()
            assert "\nSeccomp:\t2\n" in status
            await create_sandbox(vm, vm_id)
            await write_from_guest(vm, "from-guest", data)
            assert (shared / "from-guest").read_bytes() == data
            assert (shared / "from-guest").stat().st_mode == 0o100644

    asyncio.run(body())


def test_the_machine_is_as_large_as_configured(vm_id: str, config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        async with machine(vm_id, changed(config, default_vcpus=2), shared) as vm:
            threads = vm.hypervisor.get_thread_ids()
            assert sorted(threads) == [0, 1]
            tasks = Path(f"/proc/{vm.hypervisor.pid}/task")
            names = [(tasks / str(thread) / "comm").read_text() for thread in threads.values()]
            assert all(name.startswith("CPU ") for name in names)
            # Though it has booted on one of them, and with what its scheduler needs for CPU limits.
            asked = "cat cpu/online; cd /sys/fs/cgroup/limited; cat cpu.max cgroup.procs"
            seen = await run_in_guest(vm, f"cd /sys/devices/system; {asked}")
            assert seen.splitlines() == ["0-1", "100000 100000"]
            assert vm.hypervisor.get_pids() == [vm.hypervisor.pid]

    asyncio.run(body())


@pytest.mark.parametrize("shared_fs", [SharedFS.VIRTIO_9P, SharedFS.VIRTIO_FS])
def test_the_agent_answers_over_hvsock(
    vm_id: str, config: VMConfig, shared: Path, shared_fs: SharedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = daemon("vhost-device-vsock", *vhost_vsock.VHOST_DEVICE_VSOCK)
    monkeypatch.setattr(qemu, "VHOST_DEVICE_VSOCK", (program,))

    async def body() -> None:
        hvsock = changed(config, shared_fs=shared_fs, agent={"transport": AgentTransport.HVSOCK})
        async with machine(vm_id, hvsock, shared) as vm:
            assert str(vm.agent.address).startswith("hvsock:")
            assert await answers(vm)

    asyncio.run(body())


@pytest.mark.skipif(not vhost_vsock.VHOST_VSOCK_DEVICE.exists(), reason="no vhost-vsock on this host")
def test_the_agent_answers_over_vsock(vm_id: str, config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        vsock = changed(config, agent={"transport": AgentTransport.VSOCK})
        async with machine(vm_id, vsock, shared) as vm:
            assert str(vm.agent.address).startswith("vsock:")
            assert await answers(vm)

    asyncio.run(body())


def test_a_paused_machine_is_silent_until_it_is_resumed(vm_id: str, config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        async with machine(vm_id, config, shared) as vm:
            await vm.pause()
            with pytest.raises(HypervisorError, match="the machine is paused, expected running"):
                await vm.pause()
            assert not await answers(vm, timeout_s=1)
            await vm.resume()
            assert await answers(vm)

    asyncio.run(body())


def test_a_machine_saved_is_restored_where_it_was(
    vm_id: str, config: VMConfig, shared: Path, tmp_path: Path
) -> None:
    files: dict[str, Any] = {"memory_path": tmp_path / "memory", "devices_state_path": tmp_path / "state"}

    async def body() -> None:
        async with machine(vm_id, changed(config, boot_to_be_template=True, **files), shared) as vm:
            await vm.disconnect()
            with pytest.raises(HypervisorError, match="the machine is running, expected paused"):
                await vm.save()
            await vm.pause()
            await vm.save()
        # The device state alone: the memory is in its file.
        assert 0 < files["devices_state_path"].stat().st_size < 4 << 20
        assert files["devices_state_path"].stat().st_mode & 0o777 == 0o600
        assert files["memory_path"].stat().st_size == 256 << 20

        clone = changed(config, boot_from_template=True, **files)
        memory_written = files["memory_path"].stat().st_mtime_ns
        async with machine(f"{vm_id}-clone", clone, shared) as vm:
            assert vm.hypervisor.state is VMState.PAUSED
            await vm.resume()
            await vm.connect(60)
            assert await answers(vm)
            await create_sandbox(vm, vm_id)
            await write_from_guest(vm, "from-clone", b"x")
            assert (shared / "from-clone").exists()
        assert files["memory_path"].stat().st_mtime_ns == memory_written

    asyncio.run(body())


def test_a_machine_that_was_not_to_be_a_template_is_not_saved(
    vm_id: str, config: VMConfig, shared: Path
) -> None:
    async def body() -> None:
        async with machine(vm_id, config, shared, booted=False) as vm:
            await vm.pause()
            with pytest.raises(KataError, match="was not booted to be a template"):
                await vm.save()

    asyncio.run(body())


def test_a_broken_device_state_is_an_error_and_nothing_stays(
    vm_id: str, config: VMConfig, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "memory").write_bytes(bytes(256 << 20))
    (tmp_path / "state").write_bytes(b"nothing QEMU has written")
    files: dict[str, Any] = {"memory_path": tmp_path / "memory", "devices_state_path": tmp_path / "state"}

    async def body() -> None:
        vm = VM.new(vm_id, changed(config, boot_from_template=True, **files), shared_path=shared)
        with pytest.raises(HypervisorError, match=r"(?s)QMP .*migrat.*"):
            await vm.start()
        assert not vm.hypervisor.directory.exists()

    asyncio.run(body())


# -- deaths


def test_the_death_of_qemu_is_told(vm_id: str, config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        async with machine(vm_id, config, shared, booted=False) as vm:
            watch = asyncio.create_task(vm.hypervisor.wait_dead())
            await asyncio.sleep(0)
            os.kill(vm.hypervisor.pid, signal.SIGKILL)
            reason = await asyncio.wait_for(watch, TIMEOUT_S)
            assert reason.startswith(f"qemu (pid {vm.hypervisor.pid}) was killed by SIGKILL")

    asyncio.run(body())


def test_the_death_of_virtiofsd_is_told(vm_id: str, config: VMConfig, shared: Path) -> None:
    daemon("virtiofsd", *virtiofsd.DAEMONS)

    async def body() -> None:
        async with machine(vm_id, changed(config, shared_fs=SharedFS.VIRTIO_FS), shared, booted=False) as vm:
            watch = asyncio.create_task(vm.hypervisor.wait_dead())
            await asyncio.sleep(0)
            qemu_pid, virtiofsd_pid = vm.hypervisor.get_pids()
            assert qemu_pid == vm.hypervisor.pid
            os.kill(virtiofsd_pid, signal.SIGKILL)
            reason = await asyncio.wait_for(watch, TIMEOUT_S)
            assert reason.startswith(f"virtiofsd (pid {virtiofsd_pid}) was killed by SIGKILL")

    asyncio.run(body())


def test_a_frozen_qemu_is_a_qmp_timeout_and_can_be_stopped_by_many(
    vm_id: str, config: VMConfig, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with machine(vm_id, config, shared, booted=False) as vm:
            os.kill(vm.hypervisor.pid, signal.SIGSTOP)
            monkeypatch.setattr(qmp.QMP.execute, "__kwdefaults__", {"timeout_s": 1.0})
            with pytest.raises(QMPTimeout, match="QMP stop: no answer within 1 s"):
                await vm.pause()
            await asyncio.gather(vm.stop(), vm.stop(), vm.hypervisor.stop_vm())

    asyncio.run(body())


def test_a_dead_qemu_is_a_qmp_failure(vm_id: str, config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        async with machine(vm_id, config, shared, booted=False) as vm:
            os.kill(vm.hypervisor.pid, signal.SIGKILL)
            await vm.hypervisor.wait_dead()
            with pytest.raises(QMPFailed, match="QMP stop: the connection to QEMU ended"):
                await vm.pause()

    asyncio.run(body())


OWNER = """
import asyncio, json, pickle, sys
from pathlib import Path
from virtcontainers.vm import VM

async def body():
    vm_id, config, shared = pickle.loads(bytes.fromhex(sys.argv[1]))
    vm = VM.new(vm_id, config, shared_path=shared)
    persisted = vm.hypervisor.save()
    await vm.hypervisor.start_vm(120)
    print(json.dumps([persisted, vm.hypervisor.get_pids()]), flush=True)
    await asyncio.sleep(600)

asyncio.run(body())
"""


@contextlib.contextmanager
def owner(
    vm_id: str, config: VMConfig, shared: Path
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any], list[int]]]:
    """A process that has a machine, whose guest has hardly begun, with what it persisted and the pids."""
    import pickle

    argument = pickle.dumps((vm_id, config, shared)).hex()
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, argument], stdout=subprocess.PIPE, text=True, cwd=REPO
    ) as process:
        try:
            assert process.stdout is not None
            persisted, pids = json.loads(process.stdout.readline())
            yield process, persisted, pids
        finally:
            process.kill()


def test_the_machine_dies_with_its_owner_and_the_rest_is_cleaned_up(
    vm_id: str, config: VMConfig, shared: Path
) -> None:
    daemon("virtiofsd", *virtiofsd.DAEMONS)
    with owner(vm_id, changed(config, shared_fs=SharedFS.VIRTIO_FS), shared) as (process, persisted, pids):
        process.kill()
        process.wait()
        wait_gone(pids)
    directory = Path(persisted["directory"])
    assert directory.exists()
    asyncio.run(Qemu.cleanup(persisted))
    asyncio.run(Qemu.cleanup(persisted))
    assert not directory.exists()


@pytest.mark.parametrize("lost", [(), ("pid",)], ids=["", "without its pid file"])
def test_another_process_ends_a_machine_that_still_runs(
    vm_id: str, config: VMConfig, shared: Path, lost: tuple[str, ...]
) -> None:
    daemon("virtiofsd", *virtiofsd.DAEMONS)
    with owner(vm_id, changed(config, shared_fs=SharedFS.VIRTIO_FS), shared) as (process, persisted, pids):
        process.send_signal(signal.SIGSTOP)
        for name in lost:
            (Path(persisted["directory"]) / name).unlink()
        asyncio.run(Qemu.cleanup(persisted))
        assert find_processes(Path(persisted["directory"])) == []
        assert not Path(persisted["directory"]).exists()
        process.kill()
        process.wait()
        wait_gone(pids)


# -- failures: each names its cause, and the fixture sees that nothing stays


def failure_of(vm_id: str, config: VMConfig, shared: Path) -> KataError:
    async def body() -> KataError:
        vm = VM.new(vm_id, config, shared_path=shared)
        with pytest.raises(KataError) as failure:
            await vm.start()
        assert not vm.hypervisor.directory.exists()
        return failure.value

    return asyncio.run(body())


def test_a_guest_that_panics_is_told_at_once_with_its_last_words(
    vm_id: str, config: VMConfig, shared: Path
) -> None:
    panics = changed(config, kernel_params="rdinit=/none root=/dev/none")
    error = failure_of(vm_id, panics, shared)
    # It may be gone before QEMU has been asked for its vCPUs.
    assert re.search("(the machine ended before its agent answered|did not start): qemu", str(error))
    assert "--- console.log:" in str(error) and "Kernel panic" in str(error)


def test_an_agent_that_never_answers_is_a_timeout_with_the_consoles_end(
    vm_id: str, config: VMConfig, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A busy host takes its time to the console's first words, and to show registers.
    monkeypatch.setattr(qemu, "_LAST_WORDS_TIMEOUT_S", TIMEOUT_S)
    silent = changed(config, agent={"dial_timeout_s": 15}, kernel_params="agent.transport=none debug")
    error = failure_of(vm_id, silent, shared)
    assert isinstance(error, BootTimeout)
    assert "no answer within" in str(error)
    # A kernel that says nothing more can still be found out.
    assert re.search(
        r"\(dial_timeout in \[agent\.kata\]\); vCPU 0 (running|halted) at [0-9a-f]{8,16}", str(error)
    )
    assert "--- console.log:" in str(error)


def test_a_file_that_is_no_kernel_is_told_in_qemus_words(
    vm_id: str, config: VMConfig, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "kernel").write_text("no kernel")
    error = failure_of(vm_id, changed(config, kernel=tmp_path / "kernel"), shared)
    assert "qemu-system-x86_64 did not start: qemu (pid" in str(error) and "--- qemu.log:" in str(error)
    assert "kernel" in str(error).partition("--- qemu.log:")[2]


def test_a_qemu_that_is_none_is_told(vm_id: str, config: VMConfig, shared: Path) -> None:
    error = failure_of(vm_id, changed(config, path=Path("/bin/false")), shared)
    assert "/bin/false did not start: qemu (pid" in str(error) and "exited with status 1" in str(error)


def test_a_virtiofsd_that_dies_is_the_cause_told_first(vm_id: str, config: VMConfig, shared: Path) -> None:
    dies = changed(config, shared_fs=SharedFS.VIRTIO_FS, virtio_fs_daemon=Path("/bin/false"))
    error = failure_of(vm_id, dies, shared)
    assert "qemu-system-x86_64 did not start: virtiofsd (pid" in str(error)


def test_a_virtiofsd_that_hangs_is_a_timeout(
    vm_id: str, config: VMConfig, shared: Path, tmp_path: Path
) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nsleep 600\n')
    program.chmod(0o755)
    hangs = changed(
        config, agent={"dial_timeout_s": 2}, shared_fs=SharedFS.VIRTIO_FS, virtio_fs_daemon=program
    )
    error = failure_of(vm_id, hangs, shared)
    assert isinstance(error, BootTimeout)
    assert "QEMU did not greet" in str(error)


def test_an_image_is_accepted_by_qemu(vm_id: str, config: VMConfig, shared: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4 << 20))

    async def body() -> None:
        hypervisor = changed(config, initrd=None, image=image).hypervisor
        machine = Qemu(vm_id, hypervisor, config.agent, shared_path=shared)
        machine.create_vm()
        await machine.start_vm(60)
        try:
            assert machine.state is VMState.RUNNING
        finally:
            await machine.stop_vm()

    asyncio.run(body())


# -- the factory


def test_the_plan_is_told_before_the_first_trace(vm_id: str, config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        factory: Factory = await new_factory(FactoryConfig(), config, fetch_only=True)
        assert isinstance(factory.base, Direct)
        planned: list[dict[str, Any]] = []

        def on_planned(persisted: dict[str, Any], share_of: str | None = None) -> None:
            assert share_of is None
            assert not Path(persisted["directory"]).exists()
            planned.append(persisted)

        vm = await factory.get_vm(vm_id, config, shared_path=shared, on_planned=on_planned)
        try:
            assert planned == [vm.hypervisor.save()]
            assert await answers(vm)
        finally:
            await vm.stop()

    asyncio.run(body())


def test_a_machine_whose_boot_is_cancelled_leaves_nothing(vm_id: str, config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        factory = await new_factory(FactoryConfig(), config, fetch_only=True)
        task = asyncio.create_task(
            factory.get_vm(
                vm_id, config, shared_path=shared, on_planned=lambda persisted, share_of=None: None
            )
        )
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(body())
