"""The guest of a template and of its clones: small, awake, in the present, and nobody's twin."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guest_shell import run_in_guest
from harness import TIMEOUT_S
from host_state import RUN
from templates import ReadyTemplates

from agent_client.protocols import agent_pb2, health_pb2
from ttrpc import Code, StatusError
from virtcontainers.config import (
    GUEST_SHARED_DIR,
    MOUNT_GUEST_TAG,
    AgentConfig,
    AgentTransport,
    HypervisorConfig,
    SharedFS,
)
from virtcontainers.factory import Factory
from virtcontainers.factory.direct import Direct
from virtcontainers.factory.template import Template, destroy
from virtcontainers.hypervisor import virtiofsd
from virtcontainers.hypervisor.balloon import squeeze
from virtcontainers.hypervisor.base import Persisted, VMState
from virtcontainers.hypervisor.tsc import tsc_khz
from virtcontainers.vm import VM, VMConfig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines need root")

MEMORY_MIB = 256

_numbers = itertools.count(1)


def new_id() -> str:
    return f"test-template-guest-{RUN}-{next(_numbers)}"


@pytest.fixture(scope="module")
def config(guest_image: Path) -> VMConfig:
    hypervisor = HypervisorConfig(
        kernel=guest_image / "vmlinuz",
        initrd=guest_image / "initrd.img",
        default_memory_mib=MEMORY_MIB,
        shared_fs=SharedFS.VIRTIO_9P,
    )
    return VMConfig(hypervisor, AgentConfig(dial_timeout_s=120, transport=AgentTransport.SERIAL))


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


@pytest.fixture
def memory() -> Iterator[Path]:
    """A file for a machine's memory that costs only what is written."""
    path = Path("/dev/shm") / f"{new_id()}.memory"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def template(
    config: VMConfig, tmp_path_factory: pytest.TempPathFactory, ready_templates: ReadyTemplates
) -> Iterator[Template]:
    path = tmp_path_factory.mktemp("vc") / "template"
    yield ready_templates.put(path, config)
    asyncio.run(destroy(path))


@contextlib.asynccontextmanager
async def running(vm: VM) -> AsyncIterator[VM]:
    """Started, and connected to."""
    try:
        if vm.hypervisor.state is VMState.CREATED:
            await vm.start()
        if vm.hypervisor.state is VMState.PAUSED:
            await vm.resume()
            await vm.connect(120)
        yield vm
    finally:
        await vm.stop()


def template_machine(config: VMConfig, memory: Path, state: Path, shared: Path, **hypervisor: Any) -> VM:
    files = {"memory_path": memory, "devices_state_path": state, "boot_to_be_template": True}
    return VM.new(
        new_id(),
        VMConfig(replace(config.hypervisor, **{**files, **hypervisor}), config.agent),
        shared_path=shared,
    )


def ignore_plan(persisted: Persisted, share_of: str | None = None) -> None:
    """These tests end their machines themselves."""


async def clock_is_off_by(vm: VM) -> tuple[float, float]:
    """Bounds of how many seconds the guest's clock is ahead of the host's."""
    before = time.time()
    found = dict(
        line.split(":", 1)
        for line in (await run_in_guest(vm, "busybox adjtimex")).splitlines()
        if ":" in line
    )
    after = time.time()
    fields = {key.strip(): value.split() for key, value in found.items()}
    guest = int(fields["time.tv_sec"][0]) + int(fields["time.tv_usec"][0]) / 1e6
    return guest - after, guest - before


def allocated_mib(path: Path) -> float:
    return path.stat().st_blocks / 2048


def test_a_guest_gives_back_what_it_can_spare_and_lives_on(
    config: VMConfig, memory: Path, shared: Path, tmp_path: Path
) -> None:
    async def body() -> None:
        async with running(template_machine(config, memory, tmp_path / "state", shared)) as vm:
            monitor = vm.hypervisor.monitor
            devices = await monitor.execute("query-pci")
            booted = allocated_mib(memory)
            bus = vm.hypervisor.take_port()
            assert await squeeze(monitor, memory_mib=MEMORY_MIB, bus=bus, timeout_s=120)
            assert allocated_mib(memory) < booted - 4
            assert await monitor.execute("query-pci") == devices
            available = await run_in_guest(vm, "busybox awk '/MemAvailable/ {print $2}' /proc/meminfo")
            assert int(available) > 100 << 10
            # The port is free for another.
            assert await squeeze(monitor, memory_mib=MEMORY_MIB, bus=bus, timeout_s=120)

    asyncio.run(body())


def test_a_guest_without_a_balloon_driver_is_left_as_it_was(
    config: VMConfig, memory: Path, shared: Path, tmp_path: Path
) -> None:
    async def body() -> None:
        parameters = "module_blacklist=virtio_balloon"
        vm = template_machine(config, memory, tmp_path / "state", shared, kernel_params=parameters)
        async with running(vm):
            devices = await vm.hypervisor.monitor.execute("query-pci")
            bus = vm.hypervisor.take_port()
            assert not await squeeze(vm.hypervisor.monitor, memory_mib=MEMORY_MIB, bus=bus, timeout_s=3)
            assert await vm.hypervisor.monitor.execute("query-pci") == devices
            assert not await squeeze(vm.hypervisor.monitor, memory_mib=MEMORY_MIB, bus="nosuch", timeout_s=60)
            await vm.agent.check(health_pb2.CheckRequest())

    asyncio.run(body())


RANDOM = "/proc/sys/kernel/random"
SEEDS = (
    f"cat {RANDOM}/boot_id {RANDOM}/uuid; "
    "busybox head -c 32 /dev/urandom | busybox md5sum; busybox head -c 32 /dev/random | busybox md5sum; "
    "busybox mktemp -u XXXXXX"
)


async def forked(vm: VM) -> None:
    """Its kernel knows: it hears of it by an interrupt, and reseeds later."""
    async with asyncio.timeout(TIMEOUT_S):
        while "virtual machine fork" not in await run_in_guest(vm, "dmesg"):
            pass


@pytest.mark.parametrize("reseeded", [True, False], ids=["by the agent too", "by vmgenid alone"])
def test_clones_are_no_twins(template: Template, tmp_path: Path, reseeded: bool) -> None:
    async def clone(number: int) -> list[str]:
        share = tmp_path / str(number)
        share.mkdir()
        get = Factory(template).get_vm if reseeded else template.get_base_vm
        vm = await get(new_id(), template.config, shared_path=share, on_planned=ignore_plan)
        async with running(vm):
            if not reseeded:
                await forked(vm)
            seeds = (await run_in_guest(vm, SEEDS)).split("\n")[:-1]
            await forked(vm)
            return seeds

    async def body() -> None:
        first, second = await clone(1), await clone(2)
        assert len(first) == len(second) == 5
        assert all(one != other for one, other in zip(first, second, strict=True))

    asyncio.run(body())


def test_a_clone_has_the_drivers_of_what_it_may_be_given(template: Template, shared: Path) -> None:
    """And the share's file system, but not the one of another kind of share."""

    async def body() -> None:
        get = Factory(template).get_vm
        async with running(
            await get(new_id(), template.config, shared_path=shared, on_planned=ignore_plan)
        ) as vm:
            modules = (await run_in_guest(vm, "busybox cut -d ' ' -f 1 /proc/modules")).split()
            assert {"9p", "virtio_net", "virtio_blk", "virtio_scsi", "sd_mod", "ext4"} <= {*modules}
            assert "virtiofs" not in modules

    asyncio.run(body())


def test_a_clone_of_an_old_template_lives_in_the_present(
    config: VMConfig, memory: Path, shared: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"

    async def body() -> None:
        async with running(template_machine(config, memory, state, shared)) as vm:
            an_hour_ago = agent_pb2.SetGuestDateTimeRequest(Sec=int(time.time()) - 3600, Usec=0)
            await vm.agent.set_guest_date_time(an_hour_ago)
            await vm.disconnect()
            await vm.pause()
            await vm.save()
        clone = replace(
            config.hypervisor, memory_path=memory, devices_state_path=state, boot_from_template=True
        )
        async with running(VM.new(new_id(), VMConfig(clone, config.agent), shared_path=shared)) as vm:
            behind, _ = await clock_is_off_by(vm)
            assert behind < -3590
            await vm.sync_time()
            least, most = await clock_is_off_by(vm)
            assert least < 0.1 and most > -0.1
            # And its seconds are as long as the host's.
            await asyncio.sleep(10)
            least, most = await clock_is_off_by(vm)
            assert least < 0.1 and most > -0.1

    asyncio.run(body())


def test_a_guests_clock_goes_on_while_qemu_does_not_run(template: Template, shared: Path) -> None:
    async def body() -> None:
        get = Factory(template).get_vm
        async with running(
            await get(new_id(), template.config, shared_path=shared, on_planned=ignore_plan)
        ) as vm:
            await assert_told_the_rate(vm)
            least, most = await clock_is_off_by(vm)
            os.kill(vm.hypervisor.pid, signal.SIGSTOP)
            # The ACPI timer, which is the next best clock that it has, begins anew after 4.7 s.
            await asyncio.sleep(6)
            os.kill(vm.hypervisor.pid, signal.SIGCONT)
            least_then, most_then = await clock_is_off_by(vm)
            assert least_then < most + 0.1 and most_then > least - 0.1

    asyncio.run(body())


def test_a_machine_that_starves_as_it_boots_keeps_the_hosts_time(config: VMConfig, shared: Path) -> None:
    """One that counted its TSC's ticks itself would take several times too many in one of five such boots."""
    kernel_params = "earlyprintk=ttyS0 ignore_loglevel"
    talking = VMConfig(
        replace(config.hypervisor, kernel_params=kernel_params),
        replace(config.agent, dial_timeout_s=TIMEOUT_S),
    )

    async def starve(planned: asyncio.Future[Persisted]) -> None:
        directory = Path((await planned)["directory"])
        console = directory / "console.log"
        # QEMU writes its pid before the guest says a word.
        await until(lambda: console.exists() and "ignoring loglevel" in console.read_text(errors="replace"))
        pid = int((directory / "pid").read_text())
        while "Detected" not in console.read_text(errors="replace"):
            # As long as the PIT takes for a whole round: by it, nothing has happened.
            await asyncio.to_thread(stop_for, pid, 0x10000 / 1193182)
            await asyncio.sleep(random.uniform(0, 0.002))

    async def body() -> None:
        planned: asyncio.Future[Persisted] = asyncio.get_running_loop().create_future()

        def on_planned(persisted: Persisted, share_of: str | None = None) -> None:
            planned.set_result(persisted)

        starving = asyncio.create_task(starve(planned))
        get = Factory(Direct(talking)).get_vm
        vm = await get(new_id(), talking, shared_path=shared, on_planned=on_planned)
        async with running(vm):
            await asyncio.wait_for(starving, TIMEOUT_S)
            await assert_told_the_rate(vm)
            least, most = await clock_is_off_by(vm)
            assert least < 0.1 and most > -0.1
            await asyncio.sleep(2)
            least_then, most_then = await clock_is_off_by(vm)
            assert least_then < most + 0.1 and most_then > least - 0.1

    asyncio.run(body())


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not look():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def stop_for(pid: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds - 0.002)
        while time.monotonic() < until:
            pass
    finally:
        os.kill(pid, signal.SIGCONT)


async def assert_told_the_rate(vm: VM) -> None:
    log = await run_in_guest(vm, "dmesg")
    (mhz,) = re.findall(r"tsc: Detected (\S+) MHz processor", log)
    khz = await tsc_khz()
    assert khz is not None and abs(float(mhz) * 1000 - khz) < khz / 200
    assert "reference calibration" not in log and "calibration value" not in log


def mount_share(tag: str, point: str) -> agent_pb2.CreateSandboxRequest:
    storage = agent_pb2.Storage(driver="virtio-fs", source=tag, fstype="virtiofs", mount_point=point)
    return agent_pb2.CreateSandboxRequest(sandbox_id="pod", storages=[storage])


def test_a_share_that_comes_late_is_waited_for(config: VMConfig, shared: Path, tmp_path: Path) -> None:
    """The device is plugged into the paused clone; asked at once, its guest does not have it yet."""
    daemons = (*virtiofsd.DAEMONS, Path("/var/cache/kata-py/daemons/bin/virtiofsd"))
    daemon = next((path for path in daemons if path.exists()), None)
    if daemon is None:
        pytest.skip("no virtiofsd here")
    hypervisor = replace(config.hypervisor, shared_fs=SharedFS.VIRTIO_FS, virtio_fs_daemon=daemon)

    async def body() -> None:
        path = tmp_path / "template"
        template = await Template.new(path, VMConfig(hypervisor, config.agent))
        try:
            vm = await template.get_base_vm(
                new_id(), template.config, shared_path=shared, on_planned=ignore_plan
            )
            async with running(vm):
                assert "virtiofs" in await run_in_guest(vm, "busybox cut -d ' ' -f 1 /proc/modules")
                await vm.agent.create_sandbox(mount_share(MOUNT_GUEST_TAG, GUEST_SHARED_DIR))
                copy = agent_pb2.CopyFileRequest(
                    path=GUEST_SHARED_DIR + "from-guest", file_mode=0o100644, dir_mode=0o755
                )
                await vm.agent.copy_file(copy)
                assert (shared / "from-guest").exists()
        finally:
            await destroy(path)

    asyncio.run(body())


def test_a_share_that_never_comes_is_an_error_that_names_it(template: Template, shared: Path) -> None:
    async def body() -> None:
        get = Factory(template).get_vm
        async with running(
            await get(new_id(), template.config, shared_path=shared, on_planned=ignore_plan)
        ) as vm:
            with pytest.raises(StatusError, match="tag-of-nobody") as raised:
                await vm.agent.create_sandbox(mount_share("tag-of-nobody", "/run/nothing"))
            assert raised.value.code is Code.DEADLINE_EXCEEDED

    asyncio.run(body())
