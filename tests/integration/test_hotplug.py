"""Machines that grow while they run: what their guests see before and after, and each way it can fail."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import re
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guest_shell import run_in_guest
from harness import TIMEOUT_S
from host_state import RUN
from templates import ReadyTemplates
from test_template_guest import mount_share

from agent_client.protocols import agent_pb2
from virtcontainers.agent import KataAgent
from virtcontainers.config import (
    GUEST_SHARED_DIR,
    MOUNT_GUEST_TAG,
    AgentConfig,
    AgentTransport,
    HypervisorConfig,
    SharedFS,
)
from virtcontainers.errors import DeadlineExceededError, FailedPreconditionError, UnimplementedError
from virtcontainers.factory import Factory
from virtcontainers.factory.template import Template, destroy
from virtcontainers.hypervisor import virtiofsd
from virtcontainers.hypervisor.base import HypervisorError, Persisted, QMPFailed
from virtcontainers.hypervisor.hotplug import AboveMaximum, NotOnline, OutOfSlots
from virtcontainers.vm import VM, VMConfig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines need root")

MEMORY_MIB = 256
BLOCK_MIB = 128
SHARES = [SharedFS.VIRTIO_9P, SharedFS.VIRTIO_FS]

_numbers = itertools.count(1)


def new_id() -> str:
    return f"test-hotplug-{RUN}-{next(_numbers)}"


@pytest.fixture(scope="module")
def config(guest_image: Path) -> VMConfig:
    hypervisor = HypervisorConfig(
        kernel=guest_image / "vmlinuz",
        initrd=guest_image / "initrd.img",
        default_memory_mib=MEMORY_MIB,
        default_maxvcpus=4,
        default_maxmemory_mib=12 << 10,
        shared_fs=SharedFS.VIRTIO_9P,
    )
    return VMConfig(hypervisor, AgentConfig(dial_timeout_s=120, transport=AgentTransport.SERIAL))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


def changed(config: VMConfig, **hypervisor: Any) -> VMConfig:
    return VMConfig(replace(config.hypervisor, **hypervisor), config.agent)


def with_share(config: VMConfig, kind: SharedFS) -> VMConfig:
    if kind is not SharedFS.VIRTIO_FS:
        return changed(config, shared_fs=kind)
    daemons = (*virtiofsd.DAEMONS, Path("/var/cache/kata-py/daemons/bin/virtiofsd"))
    daemon = next((path for path in daemons if path.exists()), None)
    if daemon is None:
        pytest.skip("no virtiofsd here")
    return changed(config, shared_fs=kind, virtio_fs_daemon=daemon)


@pytest.fixture(scope="module")
def templates(
    config: VMConfig, tmp_path_factory: pytest.TempPathFactory, ready_templates: ReadyTemplates
) -> Iterator[dict[SharedFS, Template]]:
    """Made before the first test's look at the host, which would take them for left behind."""
    paths = {kind: tmp_path_factory.mktemp("vc") / "template" for kind in SHARES}
    try:
        yield {kind: ready_templates.put(paths[kind], with_share(config, kind)) for kind in SHARES}
    finally:
        for path in paths.values():
            asyncio.run(destroy(path))


@pytest.fixture
def template(templates: dict[SharedFS, Template]) -> Template:
    return templates[SharedFS.VIRTIO_9P]


def ignore_plan(persisted: Persisted, share_of: str | None = None) -> None:
    """These tests end their machines themselves."""


@contextlib.asynccontextmanager
async def booted(config: VMConfig, shared: Path) -> AsyncIterator[VM]:
    vm = VM.new(new_id(), config, shared_path=shared)
    await vm.start()
    try:
        yield vm
    finally:
        await vm.stop()


@contextlib.asynccontextmanager
async def cloned(template: Template, shared: Path) -> AsyncIterator[VM]:
    vm = await Factory(template).get_vm(new_id(), template.config, shared_path=shared, on_planned=ignore_plan)
    try:
        yield vm
    finally:
        await vm.stop()


async def size(vm: VM) -> tuple[int, int]:
    """vCPUs, and MemTotal in MiB, that a program in the guest finds."""
    found = await run_in_guest(vm, "busybox nproc; busybox awk '/MemTotal/ {print $2}' /proc/meminfo")
    vcpus, kib = map(int, found.split())
    return vcpus, kib >> 10


async def objects(vm: VM) -> set[str]:
    found = await vm.hypervisor.monitor.execute("qom-list", {"path": "/objects"})
    return {entry["name"] for entry in found}


async def grow(vm: VM, vcpus: int, memory_mib: int) -> None:
    await vm.add_cpus(vcpus)
    await vm.add_memory(memory_mib, TIMEOUT_S)
    await vm.online_cpu_memory(TIMEOUT_S)


# -- growing


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("clone", [False, True], ids=["booted", "cloned"])
def test_two_vcpus_and_512_mib_are_there_when_the_call_returns(
    config: VMConfig, templates: dict[SharedFS, Template], shared: Path, kind: SharedFS, clone: bool
) -> None:
    made = cloned(templates[kind], shared) if clone else booted(with_share(config, kind), shared)

    async def body() -> None:
        async with made as vm:
            vcpus, memory_mib = await size(vm)
            await grow(vm, 2, 512)
            assert await size(vm) == (vcpus + 2, memory_mib + 512)
            assert (vm.hypervisor.vcpus, vm.hypervisor.memory_mib) == (vcpus + 2, MEMORY_MIB + 512)
            assert len(set(vm.hypervisor.get_thread_ids().values())) == vcpus + 2
            backend = {"path": "/objects/memory0", "property": "share"}
            is_shared = await vm.hypervisor.monitor.execute("qom-get", backend)
            assert is_shared is (kind is SharedFS.VIRTIO_FS), "with whom needs it, and nobody else"
            # As many tasks as a machine that boots with all this has, of which some are the agent's.
            limits = "busybox cat /proc/sys/kernel/threads-max /sys/fs/cgroup/containers/pids.max"
            tasks, of_containers = map(int, (await run_in_guest(vm, limits)).split())
            assert tasks >= (memory_mib + 512) * 8 > of_containers == tasks - 256 - 16 * (vcpus + 2)
            # A pod's second container.
            await grow(vm, 1, 1)
            assert await size(vm) == (vcpus + 3, memory_mib + 512 + BLOCK_MIB)

    asyncio.run(body())


@pytest.mark.parametrize("clone", [False, True], ids=["booted", "cloned"])
def test_virtiofsd_sees_what_is_in_plugged_memory(
    config: VMConfig, templates: dict[SharedFS, Template], shared: Path, clone: bool
) -> None:
    kind = SharedFS.VIRTIO_FS
    made = cloned(templates[kind], shared) if clone else booted(with_share(config, kind), shared)

    async def body() -> None:
        async with made as vm:
            await grow(vm, 0, 512)
            await vm.agent.create_sandbox(mount_share(MOUNT_GUEST_TAG, GUEST_SHARED_DIR))
            # Linux takes new pages above 4 GiB, where the plugged ones are, first.
            data = os.urandom(8 << 20)
            for offset in range(0, len(data), 1 << 20):
                await vm.agent.copy_file(
                    agent_pb2.CopyFileRequest(
                        path=GUEST_SHARED_DIR + "data",
                        file_size=len(data),
                        file_mode=0o100644,
                        dir_mode=0o755,
                        offset=offset,
                        data=data[offset : offset + (1 << 20)],
                    )
                )
            assert (shared / "data").read_bytes() == data

    asyncio.run(body())


def test_8_gib_into_a_clone_of_256_mib(template: Template, shared: Path) -> None:
    async def body() -> None:
        async with cloned(template, shared) as vm:
            _, memory_mib = await size(vm)
            await grow(vm, 0, 8 << 10)
            assert (await size(vm))[1] == memory_mib + (8 << 10)

    asyncio.run(body())


def test_an_agent_that_does_not_tell_the_total_is_taken_at_its_word(
    template: Template, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def get_metrics(agent: KataAgent, timeout_s: float) -> str:
        raise UnimplementedError("agent: GetMetrics: not allowed by its policy")

    monkeypatch.setattr(KataAgent, "get_metrics", get_metrics)

    async def body() -> None:
        async with cloned(template, shared) as vm:
            vcpus, memory_mib = await size(vm)
            await grow(vm, 1, 1024)
            assert await size(vm) == (vcpus + 1, memory_mib + 1024)

    asyncio.run(body())


def test_virtio_mem_grows_and_shrinks(template: Template, shared: Path) -> None:
    async def body() -> None:
        async with cloned(template, shared) as vm:
            machine = vm.hypervisor
            machine.config = replace(machine.config, enable_virtio_mem=True)
            _, memory_mib = await size(vm)
            for more in (2 << 10, 10, 502):
                await grow(vm, 0, more)
            assert machine.memory_mib == MEMORY_MIB + 2048 + 12 + 504
            assert (await size(vm))[1] == memory_mib + 2048 + 12 + 504
            assert await machine.hotunplug_memory(2048, timeout_s=120) == 2048
            assert machine.memory_mib == MEMORY_MIB + 516
            # Whole blocks that go take what the kernel has kept of them along.
            assert (await size(vm))[1] <= memory_mib + 516
            await grow(vm, 0, 2048)
            assert (await size(vm))[1] == memory_mib + 516 + 2048
            with pytest.raises(AboveMaximum):
                await vm.add_memory(12 << 10)

    asyncio.run(body())


# -- refusals, after which the pod goes on


def test_the_last_slot_is_told(config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        async with booted(changed(config, memory_slots=2), shared) as vm:
            before = await size(vm)
            await grow(vm, 0, BLOCK_MIB)
            # 8 GiB are two steps, and the first was not made.
            with pytest.raises(OutOfSlots) as raised:
                await vm.add_memory(8 << 10)
            assert str(raised.value) == (
                "1 of 2 memory slots are used, and 2 are needed for 8192 MiB more "
                "(memory_slots in [hypervisor.qemu])"
            )
            assert isinstance(raised.value, FailedPreconditionError)
            await grow(vm, 0, BLOCK_MIB)
            with pytest.raises(OutOfSlots, match=r"2 of 2 memory slots .* 1 are needed for 128 MiB"):
                await vm.add_memory(1)
            assert await size(vm) == (before[0], before[1] + 2 * BLOCK_MIB)

    asyncio.run(body())


def test_the_maximum_is_told(config: VMConfig, shared: Path) -> None:
    async def body() -> None:
        async with booted(changed(config, default_maxmemory_mib=512, default_maxvcpus=2), shared) as vm:
            before = await size(vm)
            with pytest.raises(AboveMaximum) as raised:
                await vm.add_memory(300)
            assert str(raised.value) == (
                "the machine has 256 MiB, and 384 MiB more are above the 512 MiB it may have "
                "(default_maxmemory in [hypervisor.qemu])"
            )
            await grow(vm, 0, 256)
            assert await size(vm) == (before[0], before[1] + 256)

    asyncio.run(body())


def test_vcpus_above_the_maximum_are_left_out_and_logged(
    config: VMConfig, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with booted(changed(config, default_maxvcpus=2), shared) as vm:
            assert await vm.add_cpus(3) == 1
            await vm.online_cpu_memory()
            assert (await size(vm))[0] == vm.hypervisor.vcpus == 2
            assert await vm.add_cpus(1) == 0
            await vm.online_cpu_memory()

    asyncio.run(body())
    assert (
        "3 more vCPUs are wanted and 1 plugged: the machine has 1, and at most 2 "
        "(default_maxvcpus in [hypervisor.qemu])"
    ) in caplog.messages


def test_what_qemu_refuses_leaves_nothing(template: Template, shared: Path) -> None:
    async def body() -> None:
        async with cloned(template, shared) as vm:
            await grow(vm, 0, BLOCK_MIB)
            before, had = await size(vm), await objects(vm)
            taken = {
                "driver": "virtio-rng-pci",
                "id": "dimm1",
                "bus": vm.hypervisor.take_port(),
                "rng": "rng0",
            }
            await vm.hypervisor.monitor.execute("device_add", taken)
            with pytest.raises(QMPFailed, match=r"dimm1, of 512 MiB: QMP device_add: .*dimm1"):
                await vm.add_memory(512)
            assert await objects(vm) == had
            assert vm.hypervisor.memory_mib == MEMORY_MIB + BLOCK_MIB
            assert await size(vm) == before
            await vm.hypervisor.monitor.unplug("dimm1", timeout_s=60)
            await grow(vm, 1, 512)
            assert await size(vm) == (before[0] + 1, before[1] + 512)

    asyncio.run(body())


def test_vcpus_of_an_emulated_machine_stay_and_that_is_logged(
    template: Template, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with cloned(template, shared) as vm:
            if vm.hypervisor.command_line.accel.first != "tcg":
                pytest.skip("this machine is not emulated")
            await grow(vm, 2, 0)
            assert await vm.hypervisor.hotunplug_vcpus(2) == 0
            assert (await size(vm))[0] == vm.hypervisor.vcpus == 3

    asyncio.run(body())
    assert any("vCPUs stay, 2 too many" in message for message in caplog.messages)


def test_an_emulated_machine_that_has_no_room_for_another_vcpus_code_lives(
    config: VMConfig, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def free_mib(vm: VM) -> int:
        command = {"command-line": "info jit"}
        text = await vm.hypervisor.monitor.execute("human-monitor-command", command)
        found = re.search(r"gen code size +(\d+)/(\d+)", text)
        if found is None:
            pytest.skip("this machine is not emulated")
        return int(found[2]) - int(found[1]) >> 20

    async def body() -> None:
        async with booted(changed(config, default_maxvcpus=2), shared) as vm:
            # 16 regions of 8 MiB: in the last of them, but not at its end, which an idle guest may reach: all
            # is free again then. Each new process has code of its own.
            while not 2 <= await free_mib(vm) <= 7:
                await run_in_guest(vm, "busybox true")
            assert await vm.add_cpus(1) == 0
            assert (await size(vm))[0] == 1
            while await free_mib(vm) <= 10:
                await run_in_guest(vm, "busybox true")
            assert await vm.add_cpus(1) == 1
            await vm.online_cpu_memory()
            assert (await size(vm))[0] == 2

    asyncio.run(body())
    assert any("room for translated code" in message for message in caplog.messages)


def test_memory_is_taken_back_as_far_as_the_guest_lets_go_of_it(template: Template, shared: Path) -> None:
    async def body() -> None:
        async with cloned(template, shared) as vm:
            vcpus, memory_mib = await size(vm)
            await grow(vm, 0, 512)
            await grow(vm, 0, 1024)
            gone = await vm.hypervisor.hotunplug_memory(1200, timeout_s=5)
            assert gone in (0, 1024)  # a page of the kernel's may lie anywhere

            async def settled_mib() -> int:
                """A guest that is slow lets go of it later, which may be now."""
                async with asyncio.timeout(TIMEOUT_S):
                    while await size(vm) != (vcpus, memory_mib + vm.hypervisor.memory_mib - MEMORY_MIB):
                        await vm.find_size()
                return vm.hypervisor.memory_mib

            assert await settled_mib() in {MEMORY_MIB + 1536 - gone, MEMORY_MIB + 512}
            await grow(vm, 0, 256)
            assert await settled_mib() in {MEMORY_MIB + 1792 - gone, MEMORY_MIB + 768}

    asyncio.run(body())


# -- machines that fail meanwhile


def test_a_guest_that_stands_still_costs_a_timeout_and_the_pod_goes_on(
    template: Template, shared: Path
) -> None:
    async def body() -> None:
        async with cloned(template, shared) as vm:
            await grow(vm, 0, BLOCK_MIB)
            before = await size(vm)
            monitor = vm.hypervisor.monitor
            await monitor.execute("stop")
            await vm.add_memory(512)
            with pytest.raises(NotOnline) as raised:
                await vm.online_cpu_memory(timeout_s=1)
            assert isinstance(raised.value, DeadlineExceededError)
            assert "does not use 512 MiB more memory: the guest has not looked at dimm1" in str(raised.value)
            await vm.add_cpus(1)
            with pytest.raises(NotOnline, match=r"1 more vCPU and 512 MiB more memory: .* dimm1"):
                await vm.online_cpu_memory(timeout_s=1)
            await monitor.execute("cont")
            # What it had not looked at is still there for it.
            await vm.online_cpu_memory()
            assert await size(vm) == (before[0] + 1, before[1] + 512)
            assert vm.hypervisor.memory_mib == MEMORY_MIB + BLOCK_MIB + 512
            await grow(vm, 1, 512)
            assert await size(vm) == (before[0] + 2, before[1] + 1024)

    asyncio.run(body())


def test_a_guest_that_leaves_a_block_offline_is_told(
    template: Template, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Kata's agent may: what the kernel refuses it does not tell."""

    async def online_cpu_mem(agent: KataAgent, nb_cpus: int, *, cpu_only: bool, timeout_s: float) -> None:
        pass

    monkeypatch.setattr(KataAgent, "online_cpu_mem", online_cpu_mem)
    monkeypatch.setattr("virtcontainers.online._SETTLED_S", 0.5)
    monkeypatch.setattr("virtcontainers.online._TAKE_BACK_TIMEOUT_S", 120)

    async def body() -> None:
        async with cloned(template, shared) as vm:
            before = await size(vm)
            await vm.add_memory(512)
            expected = rf"its MemTotal is {before[1]} MiB, expected {before[1] + 512} MiB"
            with pytest.raises(NotOnline, match=expected):
                await vm.online_cpu_memory()
            # Nothing of it was used: it was taken back.
            assert vm.hypervisor.memory_mib == MEMORY_MIB
            assert await objects(vm) & {"memory0"} == set()

    asyncio.run(body())


def test_a_machine_that_is_killed_meanwhile_is_told(template: Template, shared: Path) -> None:
    async def body() -> None:
        async with cloned(template, shared) as vm:
            await vm.add_memory(2048)
            # It would be done too soon otherwise, once in a while.
            await vm.hypervisor.monitor.execute("stop")
            growth = asyncio.create_task(vm.online_cpu_memory())
            await asyncio.sleep(0.05)
            os.kill(vm.hypervisor.pid, signal.SIGKILL)
            async with asyncio.timeout(TIMEOUT_S):
                with pytest.raises(HypervisorError, match=r"ended while it was grown: qemu .* SIGKILL"):
                    await growth

    asyncio.run(body())


def test_a_qemu_that_hangs_costs_a_timeout_and_names_the_command(template: Template, shared: Path) -> None:
    async def body() -> None:
        async with cloned(template, shared) as vm:
            await grow(vm, 0, BLOCK_MIB)
            os.kill(vm.hypervisor.pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(60):
                    with pytest.raises(QMPFailed, match=r"QMP query-\S+: no answer within 10 s"):
                        await vm.add_cpus(1)
            finally:
                os.kill(vm.hypervisor.pid, signal.SIGCONT)

    asyncio.run(body())


def test_how_long_it_took_is_logged(
    template: Template, shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "virtcontainers.vm")

    async def body() -> None:
        async with cloned(template, shared) as vm:
            await grow(vm, 1, 512)

    asyncio.run(body())
    assert any(
        "the guest uses 1 more vCPU and 512 MiB more memory after" in message for message in caplog.messages
    )
