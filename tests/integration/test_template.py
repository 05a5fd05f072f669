"""The template factory on real machines, below containerd: made, cloned, spoiled, given up, and removed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guest_shell import run_in_guest
from harness import TIMEOUT_S, new_id
from host_state import RUN
from processes import runs, wait_gone
from templates import ReadyTemplates, builders_lock
from test_hypervisor import REPO, daemon
from test_sandbox import container_config, run, sandbox_config, spec
from test_template_guest import clock_is_off_by, ignore_plan, running, template_machine

from agent_client.protocols import agent_pb2
from katautils.config import RuntimeConfig
from katautils.factory import handle_factory
from virtcontainers import mount
from virtcontainers.config import (
    RUN_VC,
    AgentConfig,
    AgentTransport,
    FactoryConfig,
    HypervisorConfig,
    SandboxConfig,
    SharedFS,
)
from virtcontainers.errors import FailedPreconditionError, KataError
from virtcontainers.factory import Factory
from virtcontainers.factory.direct import Direct
from virtcontainers.factory.template import (
    Template,
    TemplateInfo,
    TemplateMisfit,
    TemplateMissing,
    destroy,
    read_template,
)
from virtcontainers.hypervisor import qemu, vhost_vsock, virtiofsd
from virtcontainers.hypervisor.process import find_processes
from virtcontainers.hypervisor.qemu import Qemu
from virtcontainers.hypervisor.qemu_cmdline import QemuCommandLine, plan
from virtcontainers.sandbox import Sandbox, create_sandbox
from virtcontainers.vm import VM, VMConfig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines need root")

MEMORY_MIB = 256
STEPS = [
    "making room",
    "booting the machine",
    "giving memory back",
    "saving the machine",
    "punching out zero pages",
]

_numbers = itertools.count(1)


def new_path() -> Path:
    return RUN_VC / f"vm/template-test-{RUN}-{next(_numbers)}"


@pytest.fixture(autouse=True)
def _time_to_squeeze(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a guest on a busy host, of which there is a warning else."""
    monkeypatch.setattr("virtcontainers.factory.template._SQUEEZE_TIMEOUT_S", TIMEOUT_S)


@pytest.fixture(scope="module")
def config(guest_image: Path, tmp_path_factory: pytest.TempPathFactory) -> VMConfig:
    """Of files that nobody else replaces meanwhile."""
    files = tmp_path_factory.mktemp("guest")
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(guest_image / name, files / name)
    hypervisor = HypervisorConfig(
        kernel=files / "vmlinuz",
        initrd=files / "initrd.img",
        default_memory_mib=MEMORY_MIB,
        default_maxvcpus=2,
        shared_fs=SharedFS.VIRTIO_9P,
    )
    return VMConfig(hypervisor, AgentConfig(dial_timeout_s=120, transport=AgentTransport.SERIAL))


@pytest.fixture(scope="module")
def the_template(config: VMConfig, ready_templates: ReadyTemplates) -> Iterator[Template]:
    """One that no test changes."""
    path = new_path()
    yield ready_templates.put(path, config)
    asyncio.run(destroy(path))


@pytest.fixture
def victim(path: Path, config: VMConfig, ready_templates: ReadyTemplates) -> Template:
    """One that the test may spoil."""
    return ready_templates.put(path, config)


@pytest.fixture
def path() -> Iterator[Path]:
    """For a template that the test makes."""
    path = new_path()
    yield path
    asyncio.run(destroy(path))


@pytest.fixture
def memory() -> Iterator[Path]:
    """A file for a machine's memory that costs only what is written."""
    path = Path("/dev/shm") / new_id("memory")
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shared"
    directory.mkdir()
    return directory


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What the log has told so far, but that machines are emulated here."""
    caplog.set_level(logging.WARNING)

    def messages() -> list[str]:
        told = [record.getMessage() for record in caplog.records]
        return [message for message in told if "emulated (TCG)" not in message]

    return messages


Warnings = Callable[[], list[str]]


def changed(config: VMConfig, *, agent: dict[str, Any] | None = None, **hypervisor: Any) -> VMConfig:
    return VMConfig(replace(config.hypervisor, **hypervisor), replace(config.agent, **agent or {}))


async def handle(path: Path, vm: VMConfig) -> Factory:
    """As for a pod, with [factory] enable_template."""
    factory = FactoryConfig(enable_template=True, template_path=path)
    return await handle_factory(
        RuntimeConfig(
            path=Path("configuration.toml"),
            drop_ins=(),
            warnings=(),
            hypervisor=vm.hypervisor,
            agent=vm.agent,
            factory=factory,
        )
    )


@contextlib.asynccontextmanager
async def machine(factory: Factory, config: VMConfig, shared: Path) -> AsyncIterator[VM]:
    vm = await factory.get_vm(new_id("clone"), config, shared_path=shared, on_planned=ignore_plan)
    directory = vm.hypervisor.directory
    async with running(vm):
        yield vm
    assert find_processes(directory) == []
    assert not directory.exists()


def arguments(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def is_clone(vm: VM) -> bool:
    return "-incoming" in arguments(vm.hypervisor.pid)


def memory_of(vm: VM) -> str:
    (memory,) = (word for word in arguments(vm.hypervisor.pid) if word.startswith("memory-backend"))
    return memory


def machines_of(*builds: str) -> list[Path]:
    """The directories of machines that were booted to be these templates."""
    return [path for name in builds if (path := RUN_VC / f"vm/template-{name}").exists()]


def assert_only(path: Path, info: TemplateInfo) -> None:
    """Nothing of another build is there."""
    assert sorted(entry.name for entry in path.iterdir()) == [
        "builds",
        "current",
        "memory",
        "state",
        "template.json",
    ]
    assert list((path / "builds").iterdir()) == [info.directory]
    assert sorted(entry.name for entry in info.directory.iterdir()) == ["memory", "state", "template.json"]


# -- making


def test_a_template_is_made_in_steps_and_its_files_are_roots_alone(path: Path, config: VMConfig) -> None:
    steps: list[str] = []
    before = time.time()
    made = asyncio.run(Template.new(path, config, on_progress=steps.append))
    assert steps == STEPS
    info = made.info
    assert read_template(path) == info
    assert_only(path, info)
    assert os.path.ismount(path)
    for folder in (path, path / "builds", info.directory):
        assert folder.stat().st_mode & 0o7777 == 0o700
    for name in ("memory", "state", "template.json"):
        assert (info.directory / name).stat().st_mode & 0o7777 == 0o600
        assert (path / name).resolve() == info.directory / name
    assert machines_of(info.directory.name) == []

    assert before <= info.created <= time.time()
    assert info.memory_bytes == MEMORY_MIB << 20 == info.memory.stat().st_size
    assert info.memory_allocated_bytes == info.memory.stat().st_blocks * 512
    assert info.state_bytes == info.state.stat().st_size < 4 << 20
    # What the guest holds when it has booted, less what it gave back, less zero pages, is what there is. But
    # for what it has written meanwhile.
    spared = info.given_back_bytes + info.zero_bytes
    assert info.given_back_bytes > 1 << 20 and info.zero_bytes > 1 << 20
    assert abs(info.booted_bytes - spared - info.memory_allocated_bytes) < 8 << 20

    # Once more: it is there.
    again = asyncio.run(Template.new(path, config, on_progress=steps.append))
    assert again.info == info and steps == STEPS
    # By force, and no second mount of it.
    forced = asyncio.run(Template.new(path, config, force=True))
    assert forced.info.directory != info.directory
    assert_only(path, forced.info)
    assert list(mount.mounts_below(path)) == [path]

    assert asyncio.run(destroy(path))
    assert not asyncio.run(destroy(path))
    assert not path.exists()
    assert list(path.parent.glob(f".{path.name}.*")) == []


def test_no_template_is_made_but_on_a_tmpfs_of_its_own(path: Path, config: VMConfig) -> None:
    path.mkdir(parents=True)
    (path / "diary").write_text("dear")
    with pytest.raises(FailedPreconditionError, match=f"{path} is a folder with files in it, expected a tm"):
        asyncio.run(Template.new(path, config))
    with pytest.raises(FailedPreconditionError, match="found diary, expected a template alone"):
        asyncio.run(destroy(path))
    assert [entry.name for entry in path.iterdir()] == ["diary"]
    (path / "diary").unlink()
    mount.mount("something", path, "ramfs")
    try:
        with pytest.raises(FailedPreconditionError, match=f"{path} is on ramfs, expected tmpfs"):
            asyncio.run(Template.new(path, config, force=True))
        assert list(path.iterdir()) == []
    finally:
        mount.unmount(path)


BUILDER = """
import asyncio, os, pickle, signal, sys
from virtcontainers.factory import template
from virtcontainers.hypervisor.qmp import QMP

path, config, point, force = pickle.loads(bytes.fromhex(sys.argv[1]))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def on_progress(step):
    print(step, flush=True)
    if step == "making room" and point == "before the mount":
        die()
    if step == "booting the machine" and point == "while it boots":
        asyncio.get_running_loop().call_later(1, die)
    if step == "giving memory back" and point == "when the agent has answered":
        die()

if point == "while it saves":
    migrate = QMP.migrate
    async def dying(self, *arguments, **more):
        asyncio.get_running_loop().call_later(0.01, die)
        await migrate(self, *arguments, **more)
    QMP.migrate = dying
if point == "before the exchange":
    write = template._write
    def dying(file, text):
        write(file, text)
        die()
    template._write = dying
if point == "after the exchange":
    sweep = template.sweep
    calls = iter((sweep, lambda path: die()))
    template.sweep = lambda path: next(calls)(path)

async def body():
    made = await template.Template.new(path, config, force=force, on_progress=on_progress)
    print(made.info.directory, flush=True)

asyncio.run(body())
"""


def builder(path: Path, config: VMConfig, *, point: str = "", force: bool = False) -> subprocess.Popen[str]:
    argument = pickle.dumps((path, config, point, force)).hex()
    command = [sys.executable, "-c", BUILDER, argument]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)


@pytest.mark.parametrize(
    "point",
    [
        "before the mount",
        "while it boots",
        "when the agent has answered",
        "while it saves",
        "before the exchange",
        "after the exchange",
    ],
)
def test_a_builder_that_is_killed_leaves_nothing_that_blocks_or_misleads_the_next(
    path: Path, config: VMConfig, point: str
) -> None:
    def killed(*, force: bool) -> list[str]:
        """Its builds, that are left."""
        with builder(path, config, point=point, force=force) as process:
            process.communicate(timeout=180)
        assert process.returncode == -signal.SIGKILL
        builds = [build.name for build in (path / "builds").glob("*")]
        for directory in machines_of(*builds):
            wait_gone(find_processes(directory))
        return builds

    left = killed(force=False)
    assert len(left) == (0 if point == "before the mount" else 1)
    if point != "after the exchange":
        with pytest.raises(TemplateMissing):
            Template.fetch(path, config)
    old = asyncio.run(Template.new(path, config))
    assert (old.info.directory.name in left) is (point == "after the exchange")
    assert_only(path, old.info)
    assert machines_of(*left) == []

    left = killed(force=True)
    assert len(left) == (1 if point == "before the mount" else 2)
    found = Template.fetch(path, config)
    assert (found.info == old.info) is (point != "after the exchange")
    taken = asyncio.run(Template.new(path, config))
    assert taken.info == found.info
    assert_only(path, taken.info)
    assert machines_of(*left) == []


def test_two_builders_at_once_make_one_template(path: Path, config: VMConfig, shared: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with builders_lock(path) as lock, builder(path, config) as one, builder(path, config) as other:
        for process in (one, other):
            assert process.stdout and process.stdout.readline() == "waiting for another builder\n"
        lock.close()
        outputs = [process.communicate(timeout=180)[0].splitlines() for process in (one, other)]
    built, taken = sorted(outputs, key=len, reverse=True)
    assert built[:-1] == STEPS
    assert taken == [built[-1]]
    assert_only(path, Template.fetch(path, config).info)


# -- clones


def test_a_clone_is_one_by_its_arguments_and_never_changes_its_template(
    the_template: Template, config: VMConfig, shared: Path, warnings: Warnings
) -> None:
    def look() -> int:
        with (
            the_template.info.memory.open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory,
        ):
            return zlib.crc32(memory)

    before = look()

    async def body() -> None:
        factory = await handle(the_template.path, config)
        async with machine(factory, config, shared) as vm:
            words = arguments(vm.hypervisor.pid)
            assert words[words.index("-incoming") + 1] == "defer"
            assert f"mem-path={the_template.info.memory},share=off" in memory_of(vm)
            # It writes memory: its own.
            await run_in_guest(vm, "busybox dd if=/dev/urandom of=/run/junk bs=1M count=8 2>&1")
            maps = Path(f"/proc/{vm.hypervisor.pid}/maps").read_text().splitlines()
            (modes,) = (line.split()[1] for line in maps if str(the_template.info.memory) in line)
            assert modes == "rw-p"

    asyncio.run(body())
    assert look() == before
    assert Template.fetch(the_template.path, config).info == the_template.info
    assert warnings() == []


def volume(directory: Path) -> list[dict[str, Any]]:
    return [{"destination": "/data", "type": "bind", "source": str(directory), "options": ["rbind"]}]


@contextlib.asynccontextmanager
async def sandbox_of(
    factory: Factory, config: VMConfig, directory: Path, guest_image: Path
) -> AsyncIterator[Sandbox]:
    pod = new_id("pod")
    base: SandboxConfig = sandbox_config(directory, guest_image, pod, spec("sleep", "1000"))
    given = replace(base, hypervisor=config.hypervisor, agent=config.agent)
    sandbox = await create_sandbox(given, factory)
    try:
        await sandbox.containers[pod].start()
        yield sandbox
    finally:
        await sandbox.delete()


TRANSPORTS = [AgentTransport.SERIAL, AgentTransport.HVSOCK, AgentTransport.VSOCK]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("shared_fs", [SharedFS.VIRTIO_9P, SharedFS.VIRTIO_FS])
def test_a_pod_on_a_clone_shares_files_both_ways(
    path: Path,
    config: VMConfig,
    guest_image: Path,
    ready_templates: ReadyTemplates,
    tmp_path: Path,
    warnings: Warnings,
    monkeypatch: pytest.MonkeyPatch,
    transport: AgentTransport,
    shared_fs: SharedFS,
) -> None:
    if transport is AgentTransport.VSOCK and not vhost_vsock.VHOST_VSOCK_DEVICE.exists():
        pytest.skip("no vhost-vsock on this host")
    if transport is AgentTransport.HVSOCK:
        program = daemon("vhost-device-vsock", *vhost_vsock.VHOST_DEVICE_VSOCK)
        monkeypatch.setattr(qemu, "VHOST_DEVICE_VSOCK", (program,))
    wanted = changed(config, shared_fs=shared_fs, agent={"transport": transport})
    if shared_fs is SharedFS.VIRTIO_FS:
        wanted = changed(wanted, virtio_fs_daemon=daemon("virtiofsd", *virtiofsd.DAEMONS))
    made = ready_templates.put(path, wanted)
    copies = shared_fs is SharedFS.VIRTIO_FS or transport is AgentTransport.HVSOCK

    async def body() -> None:
        factory = await handle(path, wanted)
        assert isinstance(factory.base, Template)
        async with sandbox_of(factory, wanted, tmp_path, guest_image) as sandbox:
            (tmp_path / "volume").mkdir()
            (tmp_path / "volume/from-host").write_bytes(data := os.urandom(3 << 20))
            command = "cat /data/from-host > /data/from-guest; cat /proc/sys/kernel/hostname"
            given_spec = spec("sh", "-c", command, mounts=volume(tmp_path / "volume"))
            container = await sandbox.create_container(container_config(tmp_path, "one", given_spec))
            assert await run(container) == (0, b"pod\n")
            assert (tmp_path / "volume/from-guest").read_bytes() == data
            (tmp_path / "volume/from-host").write_text("changed\n")
            given_spec = spec("cat", "/data/from-host", mounts=volume(tmp_path / "volume"))
            container = await sandbox.create_container(container_config(tmp_path, "two", given_spec))
            assert await run(container) == (0, b"changed\n")

            pid = sandbox.hypervisor_pid
            words = arguments(pid)
            assert words[words.index("-incoming") + 1] == "defer"
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert ("/memfd:kata-py-memory" in maps) is copies
            assert (str(made.info.memory) in maps) is not copies
            (memory,) = (word for word in words if word.startswith("memory-backend-file"))
            assert memory.endswith("share=on" if copies else "share=off")
        assert Template.fetch(path, wanted).info == made.info

    asyncio.run(body())
    assert warnings() == []


def test_a_pods_own_words_for_virtiofsd_reach_it(
    config: VMConfig, shared: Path, path: Path, ready_templates: ReadyTemplates
) -> None:
    """They are no part of the template, whose configuration has others."""
    virtio_fs = changed(
        config,
        shared_fs=SharedFS.VIRTIO_FS,
        virtio_fs_daemon=daemon("virtiofsd", *virtiofsd.DAEMONS),
        virtio_fs_extra_args=("--thread-pool-size=1",),
    )
    pods = changed(virtio_fs, virtio_fs_extra_args=("--thread-pool-size=7",), virtio_fs_cache="never")

    ready_templates.put(path, virtio_fs)

    async def body() -> None:
        factory = await handle(path, virtio_fs)
        async with machine(factory, pods, shared) as vm:
            assert is_clone(vm)
            others = [pid for pid in vm.hypervisor.get_pids() if pid != vm.hypervisor.pid]
            words = " ".join(word for pid in others for word in arguments(pid))
            assert "--thread-pool-size=7" in words and "--thread-pool-size=1" not in words
            # In the C flavour, and in Rust's.
            assert "cache=none" in words or "cache=never" in words

    asyncio.run(body())


# -- misfits


def another_copy(file: Path) -> None:
    """The same bytes, as after an upgrade of a package."""
    copy = file.with_name(f"{file.name}.new")
    shutil.copy(file, copy)
    copy.rename(file)


def test_a_template_of_another_machine_is_rebuilt_and_the_new_one_used(
    path: Path, guest_image: Path, config: VMConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("vmlinuz", "initrd.img"):
        shutil.copy(guest_image / name, tmp_path)
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd.img"
    wanted = changed(config, kernel=kernel, initrd=initrd)

    async def rebuilt(old: TemplateInfo, *parts: str) -> tuple[TemplateInfo, dict[str, str]]:
        """For other `parts`; the new template, and what its clone sees."""
        with pytest.raises(TemplateMisfit) as raised:
            Template.fetch(path, wanted)
        found = [difference.part for difference in raised.value.differences]
        assert found[0] in parts and set(parts) <= set(found)
        caplog.clear()
        factory = await handle(path, wanted)
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert told[0].startswith(f"a new template is made: the template in {path} does not fit: ")
        assert all(f" {part}: found " in told[0] for part in parts)
        assert isinstance(factory.base, Template)
        info = factory.base.info
        assert info.directory != old.directory
        assert_only(path, info)
        assert Template.fetch(path, wanted).info == info
        (share := tmp_path / parts[0]).mkdir()
        async with machine(factory, wanted, share) as vm:
            assert is_clone(vm) and f"mem-path={info.memory}," in memory_of(vm)
            command = "cat /proc/cmdline; busybox nproc; busybox awk '/MemTotal/ {print $2}' /proc/meminfo"
            seen = (await run_in_guest(vm, command)).splitlines()
        return info, dict(zip(("kernel_params", "vcpus", "memory"), seen, strict=True))

    async def body() -> None:
        nonlocal wanted
        info = (await Template.new(path, wanted)).info
        for file, part in ((kernel, "kernel"), (initrd, "initrd")):
            another_copy(file)
            info, seen = await rebuilt(info, part)
        assert "kata.test" not in seen["kernel_params"]
        assert seen["vcpus"] == "1" and int(seen["memory"]) < MEMORY_MIB << 10
        wanted = changed(
            wanted, default_memory_mib=MEMORY_MIB + 64, default_vcpus=2, kernel_params="kata.test=1"
        )
        _, seen = await rebuilt(info, "memory", "vcpus", "kernel_params")
        assert int(seen["memory"]) > MEMORY_MIB << 10
        assert seen["vcpus"] == "2"
        assert "kata.test=1" in seen["kernel_params"].split()

    asyncio.run(body())


# -- broken ones


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    file.write_bytes(data)


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated memory": (lambda b: os.truncate(b / "memory", 100 << 20), "/memory: found 104857600 bytes"),
    "truncated state": (lambda b: os.truncate(b / "state", 1000), "/state: found 1000 bytes"),
    "a flipped bit of the state": (lambda b: flip(b / "state"), "/state: found"),
    "an unreadable template.json": (lambda b: os.truncate(b / "template.json", 77), "template.json is not"),
    "no memory": (lambda b: (b / "memory").unlink(), "No such file or directory"),
    "no build": (lambda b: shutil.rmtree(b), "No such file or directory"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_template_is_rebuilt_and_the_log_says_what_was_wrong(
    victim: Template, config: VMConfig, shared: Path, warnings: Warnings, name: str
) -> None:
    break_it, reason = BREAKAGES[name]
    break_it(victim.info.directory)

    async def body() -> None:
        factory = await handle(victim.path, config)
        assert isinstance(factory.base, Template)
        assert_only(victim.path, factory.base.info)
        async with machine(factory, config, shared) as vm:
            assert is_clone(vm)

    asyncio.run(body())
    (warning,) = warnings()
    assert warning.startswith("a new template is made: ")
    assert reason in warning and str(victim.info.directory) in warning


def rewrite(info: TemplateInfo) -> None:
    """As if the files had always been as they are."""
    file = info.directory / "template.json"
    state, memory = info.state.read_bytes(), info.memory.stat()
    found = json.loads(file.read_text())
    found |= {"state_bytes": len(state), "state_crc32": zlib.crc32(state)}
    found |= {"memory_bytes": memory.st_size, "memory_mtime_ns": memory.st_mtime_ns}
    file.write_text(json.dumps(found))


def zero(file: Path) -> None:
    size = file.stat().st_size
    os.truncate(file, 0)
    os.truncate(file, size)


DECEITS: dict[str, Callable[[Path], object]] = {
    "a state that is none": lambda b: (b / "state").write_bytes(os.urandom(400_000)),
    "half a state": lambda b: os.truncate(b / "state", (b / "state").stat().st_size // 2),
    "an empty memory": lambda b: zero(b / "memory"),
}


@pytest.mark.parametrize("name", DECEITS)
def test_a_template_whose_clones_do_not_live_is_given_up(
    victim: Template, config: VMConfig, shared: Path, warnings: Warnings, name: str
) -> None:
    DECEITS[name](victim.info.directory)
    rewrite(victim.info)
    path = victim.path

    async def body() -> None:
        factory = await handle(path, config)
        assert isinstance(factory.base, Template)
        async with machine(factory, config, shared) as vm:
            assert not is_clone(vm)
        told = warnings()
        assert told[0].startswith(f"the template {victim.info.directory} is not used any more: ")
        assert told[1].startswith("no machine from Template: ")
        assert len(told) == 2
        failed = path.with_name(f".{path.name}.failed")
        found = json.loads(failed.read_text())
        assert found["at"] <= time.time()
        # For a minute pods boot: they would all wait for a template that may be like this one.
        failed.write_text(json.dumps(found | {"at": time.time()}))
        factory = await handle(path, config)
        assert isinstance(factory.base, Direct)
        assert re.match(r"no template can be made, the machine is booted: tried \d+ s ago: ", warnings()[-1])
        failed.write_text(json.dumps(found | {"at": time.time() - 61}))
        factory = await handle(path, config)
        assert isinstance(factory.base, Template)
        assert_only(path, factory.base.info)
        assert not failed.exists()
        async with machine(factory, config, shared) as vm:
            assert is_clone(vm)

    asyncio.run(body())


def test_a_template_that_cannot_be_made_costs_a_pod_its_shortcut_only(
    path: Path, config: VMConfig, shared: Path, warnings: Warnings
) -> None:
    """A QEMU that does not know a device: the pod fails by its own machine, and nothing stays."""
    wrong = changed(config, machine_accelerators="nonsense=on")

    async def body() -> None:
        factory = await handle(path, wrong)
        assert isinstance(factory.base, Direct)
        assert "no template can be made, the machine is booted: " in warnings()[-1]
        assert "nonsense" in warnings()[-1]
        assert list((path / "builds").iterdir()) == []
        with pytest.raises(KataError, match="nonsense"):
            await factory.get_vm(new_id("clone"), wrong, shared_path=shared, on_planned=ignore_plan)
        # The right configuration is not held up by it.
        factory = await handle(path, config)
        assert isinstance(factory.base, Template)

    asyncio.run(body())


# -- nobody's twin, and in the present


def without_vmgenid(*arguments: Any, **more: Any) -> QemuCommandLine:
    line = plan(*arguments, **more)
    return replace(line, devices=tuple(device for device in line.devices if device.first != "vmgenid"))


UUIDS = "; ".join(["cat /proc/sys/kernel/random/uuid"] * 2)


def test_clones_would_be_twins_but_for_the_agents_call(
    config: VMConfig, shared: Path, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without vmgenid; so that it is known that tests of twins can fail."""
    monkeypatch.setattr(qemu, "plan", without_vmgenid)
    state = tmp_path / "state"
    saved = changed(config, memory_path=memory, devices_state_path=state, boot_from_template=True)

    async def clones(*, reseeded: bool) -> list[str]:
        uuids = []
        for _ in range(3):
            async with running(VM.new(new_id("clone"), saved, shared_path=shared)) as vm:
                if reseeded:
                    await vm.reseed_rng()
                uuids += (await run_in_guest(vm, UUIDS)).split()
        return uuids

    async def body() -> None:
        async with running(template_machine(config, memory, state, shared)) as vm:
            # From time to time the kernel takes something new, and the less often the longer it has been up:
            # twins are those who have read before it does.
            for _ in range(20):
                await run_in_guest(vm, UUIDS)
                await vm.disconnect()
                await vm.pause()
                await vm.save()
                twins = await clones(reseeded=False)
                if len(set(twins)) < len(twins):
                    break
                await vm.resume()
                await vm.connect(120)
            assert len(set(twins)) < len(twins)
            others = await clones(reseeded=True)
            assert len(set(others) - set(twins)) == len(others)

    asyncio.run(body())


def test_a_clone_of_a_template_of_the_past_has_the_hosts_time(
    path: Path, config: VMConfig, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disconnect = VM.disconnect

    async def setting_the_clock_back(vm: VM) -> None:
        if not vm.config.hypervisor.boot_from_template and not vm.agent.closed:
            request = agent_pb2.SetGuestDateTimeRequest(Sec=int(time.time()) - 3600, Usec=0)
            await vm.agent.set_guest_date_time(request)
        await disconnect(vm)

    async def body() -> None:
        made = await Template.new(path, config)
        monkeypatch.setattr(VM, "disconnect", disconnect)
        vm = await made.get_base_vm(new_id("clone"), config, shared_path=shared, on_planned=ignore_plan)
        async with running(vm):
            # As it would be.
            _, most = await clock_is_off_by(vm)
            assert most < -3500
        async with machine(Factory(made), config, shared) as vm:
            least, most = await clock_is_off_by(vm)
            assert least < 0.1 and most > -0.1

    monkeypatch.setattr(VM, "disconnect", setting_the_clock_back)
    asyncio.run(body())


# -- ends


def test_clones_outlive_their_template(
    victim: Template, config: VMConfig, guest_image: Path, tmp_path: Path, warnings: Warnings
) -> None:
    path = victim.path

    async def body() -> None:
        factory = await handle(path, config)
        async with sandbox_of(factory, config, tmp_path, guest_image) as sandbox:
            async with sandbox_of(factory, config, tmp_path / "other", guest_image) as other:
                assert await destroy(path)
                assert not path.exists()
                assert not await destroy(path)
                for each in (sandbox, other):
                    # Pages that it has never touched are still to be read.
                    command = spec("sh", "-c", "cat /proc/kallsyms > /dev/null; echo alive")
                    alive = container_config(tmp_path / f"in-{each.id}", "alive", command)
                    assert await run(await each.create_container(alive)) == (0, b"alive\n")
            # Who has found it just before it went: there is none, so it is booted.
            async with machine(factory, config, tmp_path) as vm:
                assert not is_clone(vm)
        assert warnings() == [
            f"no machine from Template: there is no template in {path}: No such file or directory"
        ]

    asyncio.run(body())


def test_a_clones_death_is_its_own(the_template: Template, config: VMConfig, tmp_path: Path) -> None:
    async def body() -> None:
        shares = [tmp_path / "1", tmp_path / "2"]
        for share in shares:
            share.mkdir()
        async with machine(Factory(the_template), config, shares[0]) as one:
            async with machine(Factory(the_template), config, shares[1]) as other:
                watch = asyncio.create_task(other.hypervisor.wait_dead())
                await asyncio.sleep(0)
                os.kill(other.hypervisor.pid, signal.SIGKILL)
                assert "was killed by SIGKILL" in await asyncio.wait_for(watch, 60)
            assert await run_in_guest(one, "echo alive") == "alive\n"

    asyncio.run(body())
    assert Template.fetch(the_template.path, config).info == the_template.info


OWNER = """
import asyncio, json, pickle, sys
from virtcontainers.factory import Factory
from virtcontainers.factory.template import Template

async def body():
    path, config, vm_id, shared = pickle.loads(bytes.fromhex(sys.argv[1]))
    planned = []
    def on_planned(persisted, share_of=None):
        planned.append(persisted)

    factory = Factory(Template.fetch(path, config))
    vm = await factory.get_vm(vm_id, config, shared_path=shared, on_planned=on_planned)
    print(json.dumps([planned, vm.hypervisor.get_pids()]), flush=True)
    await asyncio.sleep(600)

asyncio.run(body())
"""


def test_a_clone_dies_with_its_owner(the_template: Template, config: VMConfig, shared: Path) -> None:
    argument = pickle.dumps((the_template.path, config, new_id("clone"), shared)).hex()
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, argument], stdout=subprocess.PIPE, text=True, cwd=REPO
    ) as process:
        assert process.stdout is not None
        (persisted,), pids = json.loads(process.stdout.readline())
        assert all(runs(pid) for pid in pids)
        process.kill()
    wait_gone(pids)
    directory = Path(persisted["directory"])
    assert directory.exists()
    asyncio.run(Qemu.cleanup(persisted))
    assert not directory.exists()
    assert Template.fetch(the_template.path, config).info == the_template.info


def test_who_is_about_to_clone_keeps_the_template_it_has_found(
    victim: Template, config: VMConfig, shared: Path
) -> None:
    """It is exchanged between the look and the machine: either will do, and none is an error."""

    async def body() -> None:
        factory = await handle(victim.path, config)
        newer = await Template.new(victim.path, config, force=True)
        async with machine(factory, config, shared) as vm:
            assert is_clone(vm) and f"mem-path={newer.info.memory}," in memory_of(vm)

    asyncio.run(body())
