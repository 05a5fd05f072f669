"""The VM cache: real machines, kept ready by real servers, handed to pods."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from harness import TIMEOUT_S, Ctr, new_id, wait_for
from private_containerd import REPO, Settings, write_kata_config
from processes import runs, wait_gone
from templates import Pods, ReadyTemplates
from test_hypervisor import answers, changed, daemon
from test_sandbox import run, sandbox_config, spec

from virtcontainers.config import (
    RUN_VC,
    SHARED_SANDBOXES,
    AgentConfig,
    AgentTransport,
    HypervisorConfig,
    SharedFS,
)
from virtcontainers.errors import KataError, UnavailableError
from virtcontainers.factory import Factory, grpccache
from virtcontainers.factory.base import FactoryBase
from virtcontainers.factory.cache import CacheServer, end_orphans
from virtcontainers.factory.direct import Direct
from virtcontainers.factory.grpc_unary import GrpcStatusError
from virtcontainers.factory.grpccache import MACHINE_ID, GrpcCache, cache_status, quit_cache
from virtcontainers.factory.template import Template, destroy
from virtcontainers.fs_share import FilesystemShare
from virtcontainers.hypervisor import qemu, vhost_vsock, virtiofsd
from virtcontainers.hypervisor.base import Persisted, VMState
from virtcontainers.hypervisor.process import MARK, find_processes
from virtcontainers.hypervisor.qemu import Qemu
from virtcontainers.sandbox import create_sandbox
from virtcontainers.vm import VM, VMConfig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines need root")


@pytest.fixture(scope="module")
def config(guest_image: Path) -> VMConfig:
    hypervisor = HypervisorConfig(
        kernel=guest_image / "vmlinuz",
        initrd=guest_image / "initrd.img",
        default_memory_mib=256,
        shared_fs=SharedFS.VIRTIO_9P,
    )
    return VMConfig(hypervisor, AgentConfig(dial_timeout_s=120, transport=AgentTransport.SERIAL))


@pytest.fixture(scope="module")
def template(config: VMConfig, ready_templates: ReadyTemplates) -> Iterator[Template]:
    """For tests to which it is all the same how the cache's machines are made. None changes it."""
    yield from _template_of(config, ready_templates)


@pytest.fixture(scope="module")
def virtio_fs_template(config: VMConfig, ready_templates: ReadyTemplates) -> Iterator[Template]:
    yield from _template_of(virtio_fs(config), ready_templates)


def _template_of(config: VMConfig, ready_templates: ReadyTemplates) -> Iterator[Template]:
    path = RUN_VC / "vm" / new_id("template")
    try:
        yield ready_templates.put(path, config)
    finally:
        asyncio.run(destroy(path))


@pytest.fixture
def victim(config: VMConfig, ready_templates: ReadyTemplates) -> Iterator[Template]:
    """One that the test may spoil."""
    yield from _template_of(config, ready_templates)


@pytest.fixture(autouse=True)
def _time_to_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a server in this process, which may have other things to do."""
    for name in ("_CALL_TIMEOUT_S", "_ATTACH_TIMEOUT_S"):
        monkeypatch.setattr(grpccache, name, TIMEOUT_S)


@pytest.fixture
def endpoint(tmp_path: Path) -> Path:
    return tmp_path / "cache.sock"


@pytest.fixture(autouse=True)
def servers() -> Iterator[list[int]]:
    """The pids of this test's servers. At its end nothing is left of what they have made."""
    pids = [os.getpid()]
    yield pids
    deadline = time.monotonic() + TIMEOUT_S
    while left := left_by(pids):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def left_by(pids: list[int]) -> list[str]:
    """Cached machines, their shares and their processes, but for those that others have made."""
    others = set()
    found = []
    for directory in (RUN_VC / "vm").glob("cache-*"):
        with contextlib.suppress(OSError, IndexError):
            maker = int((directory / "server").read_text().split()[0])
            if maker in pids:
                found.append(str(directory))
            else:
                others.add(directory.name)
    found += [str(root) for root in SHARED_SANDBOXES.glob("cache-*") if root.name not in others]
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            match = re.search(rf"\b{MARK}=/run/vc/vm/(cache-[^\0]*)", (process / "environ").read_text())
            if match and match[1] not in others:
                found.append(f"{process.name}: {(process / 'cmdline').read_text()[:100]}")
    return found


@dataclass
class Serving:
    """A server in this process."""

    server: CacheServer
    ready: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    async def filled(self) -> None:
        """Return when there are as many machines as wanted."""
        async with asyncio.timeout(TIMEOUT_S):
            while await self.ready.get() < self.server.number:
                pass


@contextlib.asynccontextmanager
async def serving(
    endpoint: Path, base: FactoryBase, config: VMConfig, number: int = 1, **options: Any
) -> AsyncIterator[Serving]:
    server = CacheServer(endpoint, number, base, config, **options)
    serving = Serving(server)
    server._on_ready = serving.ready.put_nowait
    task = asyncio.create_task(server.run())
    try:
        yield serving
    finally:
        server.stop()
        await task
        assert not endpoint.exists()


@contextlib.contextmanager
def no_share_left(vm_id: str) -> Iterator[None]:
    try:
        yield
    finally:
        FilesystemShare(vm_id).cleanup()


def takes_share(vm_id: str, seen: list[Persisted] | None = None) -> Callable[..., None]:
    """As a sandbox does it."""

    def on_planned(persisted: Persisted, share_of: str | None = None) -> None:
        if seen is not None:
            seen.append(persisted)
        assert share_of is not None
        FilesystemShare(vm_id).take_over(share_of)

    return on_planned


@contextlib.asynccontextmanager
async def handed_out(endpoint: Path, config: VMConfig, vm_id: str) -> AsyncIterator[VM]:
    """A machine from the cache whose agent has answered. Nothing of it is left afterwards."""
    with no_share_left(vm_id):
        factory = Factory(await GrpcCache.fetch(endpoint, config))
        vm = await factory.get_vm(
            vm_id,
            config,
            shared_path=FilesystemShare(vm_id).shared_path,
            on_planned=takes_share(vm_id),
        )
        try:
            assert await answers(vm)
            yield vm
        finally:
            pids = vm.hypervisor.get_pids()
            await vm.stop()
            assert vm.hypervisor.state is VMState.STOPPED
            assert find_processes(vm.hypervisor.directory) == []
            assert not vm.hypervisor.directory.exists()
            assert not (RUN_VC / "vm" / vm_id).is_symlink()
            wait_gone(pids)


def virtio_fs(config: VMConfig) -> VMConfig:
    daemon("virtiofsd", *virtiofsd.DAEMONS)
    return changed(config, shared_fs=SharedFS.VIRTIO_FS)


def hvsock(config: VMConfig, monkeypatch: pytest.MonkeyPatch) -> VMConfig:
    program = daemon("vhost-device-vsock", *vhost_vsock.VHOST_DEVICE_VSOCK)
    monkeypatch.setattr(qemu, "VHOST_DEVICE_VSOCK", (program,))
    return changed(config, agent={"transport": AgentTransport.HVSOCK})


@pytest.mark.parametrize("kind", ["virtio-9p", "virtio-fs", "hvsock"])
def test_machines_are_ready_handed_out_and_made_anew(
    endpoint: Path,
    config: VMConfig,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    template: Template,
    virtio_fs_template: Template,
) -> None:
    bases: dict[str, Callable[[], FactoryBase]] = {
        "virtio-9p": lambda: template,
        "virtio-fs": lambda: virtio_fs_template,
        "hvsock": lambda: Direct(hvsock(config, monkeypatch)),
    }
    base = bases[kind]()
    config = base.config

    async def body() -> None:
        async with serving(endpoint, base, config) as serving_:
            await serving_.filled()
            status = await cache_status(endpoint)
            (ready,) = status.vmstatus
            assert (status.pid, ready.cpu, ready.memory) == (os.getpid(), 1, 256)
            vm_id = new_id("pod")
            async with handed_out(endpoint, config, vm_id) as vm:
                assert vm.hypervisor.pid == ready.pid
                assert MACHINE_ID.fullmatch(vm.id)
                assert (RUN_VC / "vm" / vm_id).resolve() == vm.hypervisor.directory
                assert (vm.hypervisor.directory / "owner").read_text() == vm_id
                assert len(vm.hypervisor.get_pids()) == (1 if kind == "virtio-9p" else 2)
                await serving_.filled()
                (next_one,) = (await cache_status(endpoint)).vmstatus
                assert next_one.pid != ready.pid
                assert await answers(vm)

    asyncio.run(body())


def test_hvsock_answers_whenever_a_machine_goes_on(config: VMConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """vhost-device-vsock is lost when it is dialled too soon: without waiting, once in some eight times."""
    config = hvsock(config, monkeypatch)

    async def body() -> None:
        vm = VM.new(new_id("goes-on"), config, shared_path=None, outlives_us=True)
        try:
            await vm.start()
            for _ in range(25):
                await vm.disconnect()
                await vm.unplug_hvsock()
                await vm.pause()
                await vm.detach()
                vm = VM.from_grpc(vm.to_grpc(), config, shared_path=None)
                await vm.attach(TIMEOUT_S)
                await vm.resume()
                await vm.connect(TIMEOUT_S)
        finally:
            await vm.stop()

    asyncio.run(body())


def test_an_empty_cache_costs_a_pod_no_time(
    endpoint: Path, config: VMConfig, template: Template, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It stays empty.
    monkeypatch.setattr("virtcontainers.factory.cache._GIVEN_PAUSE_S", 3600)

    async def body() -> None:
        async with serving(endpoint, template, config) as serving_:
            await serving_.filled()
            async with handed_out(endpoint, config, new_id("pod")):
                cache = await GrpcCache.fetch(endpoint, config)
                with pytest.raises(GrpcStatusError, match="GetBaseVM: no machine is ready"):
                    await cache.get_base_vm("pod", config, shared_path=None, on_planned=takes_share("pod"))
                # And the pod has another way.
                other = Factory(Direct(config))
                vm_id = new_id("pod")

                async def otherwise() -> Factory:
                    return other

                share = FilesystemShare(vm_id)
                with no_share_left(vm_id):
                    vm = await Factory(cache, otherwise=otherwise).get_vm(
                        vm_id,
                        config,
                        shared_path=share.shared_path,
                        on_planned=lambda persisted, share_of=None: share.prepare(),
                    )
                    try:
                        assert vm.id == vm_id
                        assert await answers(vm)
                    finally:
                        await vm.stop()

    asyncio.run(body())


def test_quit_ends_the_machines_that_nobody_has(endpoint: Path, config: VMConfig, template: Template) -> None:
    async def body() -> None:
        async with serving(endpoint, template, config, number=2) as serving_:
            await serving_.filled()
            pids = [machine.pid for machine in (await cache_status(endpoint)).vmstatus]
            assert len(pids) == 2 and all(runs(pid) for pid in pids)
            async with handed_out(endpoint, config, new_id("pod")) as vm:
                await asyncio.to_thread(
                    lambda: subprocess.run([sys.executable, "-c", QUIT, str(endpoint)], cwd=REPO, check=True)
                )
                await asyncio.to_thread(wait_gone, [pid for pid in pids if pid != vm.hypervisor.pid])
                assert await answers(vm)

    asyncio.run(body())


QUIT = """
import asyncio, sys
from pathlib import Path
from virtcontainers.factory.grpc_unary import call_unary
asyncio.run(call_unary(Path(sys.argv[1]), "/cache.CacheService/Quit", timeout_s=600))
"""


def test_a_server_that_stops_while_it_makes_a_machine_leaves_nothing(
    endpoint: Path, config: VMConfig
) -> None:
    async def body() -> None:
        async with serving(endpoint, Direct(config), config):
            await asyncio.to_thread(
                wait_for, "QEMU", lambda: any("qemu" in line for line in left_by([os.getpid()]))
            )
        assert left_by([os.getpid()]) == []

    asyncio.run(body())


def test_what_nobody_comes_for_is_ended(endpoint: Path, config: VMConfig, template: Template) -> None:
    async def body() -> None:
        async with serving(endpoint, template, config, claim_timeout_s=10) as serving_:
            await serving_.filled()
            (ready,) = (await cache_status(endpoint)).vmstatus
            cache = await GrpcCache.fetch(endpoint, config)

            def dies(persisted: Persisted, share_of: str | None = None) -> None:
                raise KataError("the pod is killed now")

            with pytest.raises(KataError, match="killed now"):
                await cache.get_base_vm("pod", config, shared_path=None, on_planned=dies)
            assert runs(ready.pid)
            await asyncio.to_thread(wait_gone, [ready.pid])

    asyncio.run(body())


def test_a_pod_that_comes_too_late_is_told(endpoint: Path, config: VMConfig, template: Template) -> None:
    async def body() -> None:
        async with serving(endpoint, template, config) as serving_:
            await serving_.filled()
            (ready,) = (await cache_status(endpoint)).vmstatus
            cache = await GrpcCache.fetch(endpoint, config)

            def is_late(persisted: Persisted, share_of: str | None = None) -> None:
                (Path(persisted["directory"]) / "owner").write_text("123 456")

            with pytest.raises(UnavailableError, match=f"{endpoint}: machine cache-.* was taken back"):
                await cache.get_base_vm("pod", config, shared_path=None, on_planned=is_late)
            assert runs(ready.pid), "whoever has it ends it"
            assert await end_orphans() == 0, "its server lives"
            (directory,) = (RUN_VC / "vm").glob(f"{cache_machine_of(ready.pid)}")
            await Qemu.cleanup({"directory": str(directory)})
            FilesystemShare(directory.name).cleanup()

    asyncio.run(body())


def cache_machine_of(pid: int) -> str:
    match = re.search(rf"\b{MARK}=/run/vc/vm/(cache-[0-9a-f]*)", Path(f"/proc/{pid}/environ").read_text())
    assert match is not None
    return match[1]


def test_a_ready_machine_that_dies_is_made_anew(endpoint: Path, config: VMConfig, template: Template) -> None:
    async def body() -> None:
        async with serving(endpoint, template, config) as serving_:
            await serving_.filled()
            (ready,) = (await cache_status(endpoint)).vmstatus
            os.kill(ready.pid, signal.SIGKILL)
            await serving_.filled()
            async with handed_out(endpoint, config, new_id("pod")) as vm:
                assert vm.hypervisor.pid != ready.pid

    asyncio.run(body())


def test_a_machine_of_an_old_initrd_is_not_handed_out(
    endpoint: Path, config: VMConfig, tmp_path: Path
) -> None:
    initrd = shutil.copy(config.hypervisor.initrd or "", tmp_path / "initrd.img")
    config = changed(config, initrd=initrd)

    async def body() -> None:
        async with serving(endpoint, Direct(config), config) as serving_:
            await serving_.filled()
            (old,) = (await cache_status(endpoint)).vmstatus
            os.utime(initrd)
            cache = await GrpcCache.fetch(endpoint, config)
            with pytest.raises(GrpcStatusError, match="no machine is ready"):
                await cache.get_base_vm("pod", config, shared_path=None, on_planned=takes_share("pod"))
            await asyncio.to_thread(wait_gone, [old.pid])
            await serving_.filled()
            async with handed_out(endpoint, config, new_id("pod")) as vm:
                assert vm.hypervisor.pid != old.pid

    asyncio.run(body())


def test_another_process_cleans_up_after_a_pod(endpoint: Path, virtio_fs_template: Template) -> None:
    """As containerd's delete does after the shim has died."""
    config = virtio_fs_template.config

    async def body() -> None:
        async with serving(endpoint, virtio_fs_template, config) as serving_:
            await serving_.filled()
            vm_id, seen = new_id("pod"), list[Persisted]()
            with no_share_left(vm_id):
                cache = await GrpcCache.fetch(endpoint, config)
                vm = await cache.get_base_vm(
                    vm_id,
                    config,
                    shared_path=FilesystemShare(vm_id).shared_path,
                    on_planned=takes_share(vm_id, seen),
                )
                assert vm.hypervisor.state is VMState.PAUSED
                (persisted,) = seen
                code = "import asyncio, json, sys; from virtcontainers.hypervisor.qemu import Qemu; " + (
                    "asyncio.run(Qemu.cleanup(json.loads(sys.argv[1])))"
                )
                command = [sys.executable, "-c", code, json.dumps(persisted)]
                for _ in range(2):
                    await asyncio.to_thread(lambda: subprocess.run(command, cwd=REPO, check=True))
                assert find_processes(vm.hypervisor.directory) == []
                assert not vm.hypervisor.directory.exists()
                assert not (RUN_VC / "vm" / vm_id).is_symlink()
                await vm.stop()

    asyncio.run(body())


# -- pods


@pytest.mark.parametrize("of", ["direct", "template"])
@pytest.mark.parametrize("shared_fs", list(SharedFS)[:2])
def test_a_pod_runs_in_a_cached_machine(
    tmp_path: Path,
    guest_image: Path,
    endpoint: Path,
    of: str,
    shared_fs: SharedFS,
    cloning: Pods,
) -> None:
    if shared_fs is SharedFS.VIRTIO_FS:
        daemon("virtiofsd", *virtiofsd.DAEMONS)

    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            ids = [new_id("pod"), new_id("pod")]
            configs = [
                sandbox_config(
                    tmp_path / id_,
                    guest_image,
                    id_,
                    spec(
                        "sh", "-c", "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/hostname; echo x > /f"
                    ),
                    shared_fs=shared_fs,
                )
                for id_ in ids
            ]
            config = VMConfig(configs[0].hypervisor, configs[0].agent)
            base = Direct(config) if of == "direct" else cloning(configs[0]).base
            serving_ = await stack.enter_async_context(serving(endpoint, base, config, number=2))
            await serving_.filled()
            outputs = set()
            for given in configs:
                given = replace(given, hostname="pod")
                factory = Factory(await GrpcCache.fetch(endpoint, config))
                sandbox = await create_sandbox(given, factory)
                try:
                    vm = sandbox._vm
                    assert vm is not None and MACHINE_ID.fullmatch(vm.id)
                    status, output = await run(sandbox.containers[given.id])
                    assert status == 0
                    uuid, hostname = output.decode().splitlines()
                    assert hostname == "pod"
                    outputs.add(uuid)
                    assert (tmp_path / given.id / given.id / "rootfs/f").read_text() == "x\n"
                finally:
                    await sandbox.delete()
                assert not FilesystemShare(given.id).root.exists()
            assert len(outputs) == 2

    asyncio.run(body())


@pytest.mark.parametrize("sandbox_cgroup_only", [True, False])
def test_a_cached_machine_is_held_to_its_pods_cgroups(
    tmp_path: Path, guest_image: Path, endpoint: Path, template: Template, sandbox_cgroup_only: bool
) -> None:
    """Its processes were born in those of the server."""
    id_ = new_id("pod")
    given = sandbox_config(tmp_path / id_, guest_image, id_, spec("true"))
    config = template.config
    given = replace(
        given, sandbox_cgroup_only=sandbox_cgroup_only, hypervisor=config.hypervisor, agent=config.agent
    )

    async def body() -> None:
        async with serving(endpoint, template, config) as serving_:
            await serving_.filled()
            sandbox = await create_sandbox(given, Factory(await GrpcCache.fetch(endpoint, config)))
            try:
                vm = sandbox._vm
                assert vm is not None and MACHINE_ID.fullmatch(vm.id)
                of_pod, *overhead = sandbox._cgroups.paths
                for pid in find_processes(vm.hypervisor.directory):
                    assert (overhead or [of_pod])[0] in Path(f"/proc/{pid}/cgroup").read_text()
                for thread in vm.hypervisor.get_thread_ids().values():
                    assert of_pod in Path(f"/proc/{thread}/cgroup").read_text()
            finally:
                await sandbox.delete()

    asyncio.run(body())


def test_a_template_that_is_gone_is_made_anew_for_the_next_machine(
    endpoint: Path, config: VMConfig, victim: Template
) -> None:
    async def body() -> None:
        template = victim
        async with serving(endpoint, template, config) as serving_:
            await serving_.filled()
            await destroy(template.path)
            async with handed_out(endpoint, config, new_id("pod")) as vm:
                await serving_.filled()
                assert (template.path / "memory").exists()
                assert await answers(vm)
            async with handed_out(endpoint, config, new_id("pod")):
                pass

    asyncio.run(body())


# -- servers that end


SERVER = """
import asyncio, pickle, signal, sys
from virtcontainers.factory.cache import CacheServer
from virtcontainers.factory.template import Template

async def body():
    endpoint, number, path, config = pickle.loads(bytes.fromhex(sys.argv[1]))
    ready = lambda number: print(number, flush=True)
    server = CacheServer(endpoint, number, Template.fetch(path, config), config, on_ready=ready)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
    await server.run()

asyncio.run(body())
"""


@contextlib.contextmanager
def server_process(
    endpoint: Path, template: Template, number: int, servers: list[int]
) -> Iterator[subprocess.Popen[str]]:
    """A server whose machines are ready."""
    import pickle

    argument = pickle.dumps((endpoint, number, template.path, template.config)).hex()
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, argument], stdout=subprocess.PIPE, text=True, cwd=REPO
    ) as process:
        servers.append(process.pid)
        try:
            assert process.stdout is not None
            while int(process.stdout.readline()) < number:
                pass
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_machine_of_a_pod_outlives_the_server_and_the_others_go(
    endpoint: Path, virtio_fs_template: Template, servers: list[int], number: signal.Signals
) -> None:
    config = virtio_fs_template.config

    async def body(process: subprocess.Popen[str]) -> None:
        pids = [machine.pid for machine in (await cache_status(endpoint)).vmstatus]
        async with handed_out(endpoint, config, new_id("pod")) as vm:
            (other,) = (pid for pid in pids if pid != vm.hypervisor.pid)
            process.send_signal(number)
            await asyncio.to_thread(process.wait)
            if number is signal.SIGKILL:
                assert runs(other)
                with pytest.raises(UnavailableError):
                    await GrpcCache.fetch(endpoint, config)
                # The next one may be there, or be begun.
                assert await end_orphans() in (1, 2)
                endpoint.unlink()
            assert not runs(other) and not endpoint.exists()
            assert await end_orphans() == 0
            assert await answers(vm)
            assert all(runs(pid) for pid in vm.hypervisor.get_pids())

    with server_process(endpoint, virtio_fs_template, 2, servers) as process:
        asyncio.run(body(process))


def test_the_next_server_ends_what_a_killed_one_has_left(
    endpoint: Path, template: Template, servers: list[int]
) -> None:
    with server_process(endpoint, template, 1, servers) as process:
        (left,) = asyncio.run(cache_status(endpoint)).vmstatus
        process.kill()
        process.wait()
        assert runs(left.pid)
        with server_process(endpoint, template, 1, servers):
            assert not runs(left.pid)
            assert asyncio.run(quit_cache(endpoint, 60))


# -- for a user


@pytest.mark.parametrize(
    ("template", "shared_fs"), [(False, "virtio-fs"), (True, "virtio-9p"), (True, "virtio-fs")]
)
def test_ctr_runs_pods_from_a_cache_and_they_outlive_it(
    ctr: Ctr, container_id: str, tmp_path: Path, servers: list[int], template: bool, shared_fs: str
) -> None:
    path = RUN_VC / "vm" / new_id("template")
    settings: Settings = {
        "hypervisor.qemu": {"shared_fs": shared_fs},
        "factory": {
            "vm_cache_number": 1,
            "vm_cache_endpoint": str(tmp_path / "cache.sock"),
            "enable_template": template,
            "template_path": str(path),
        },
    }
    file = write_kata_config(tmp_path / "configuration.toml", settings)
    options = ("--runtime-config-path", str(file))
    boot_id = ("cat", "/proc/sys/kernel/random/boot_id")

    def factory(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(REPO / ".venv/bin/kata-py"), "factory", *arguments, "--config", str(file)]
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)

    def machines() -> list[int]:
        return [each["pid"] for each in json.loads(factory("status", "--json").stdout)["cache"]["machines"]]

    command = [str(REPO / ".venv/bin/kata-py"), "factory", "init", "--config", str(file)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
            servers.append(server.pid)
            try:
                assert server.stdout is not None
                assert any(line.startswith(b"The VM cache is at ") for line in server.stdout)
                ready = machines()
                with ctr.detached(container_id, "sleep", "1000", options=options):
                    name = cache_machine_of(ready[0])
                    assert (RUN_VC / "vm" / container_id).readlink() == Path(name)
                    machine = ctr.exec(container_id, *boot_id).stdout
                    server.kill()
                    server.wait()
                    assert ctr.exec(container_id, *boot_id).stdout == machine
                    # No cache any more, and still a pod.
                    other = ctr.run(f"{container_id}-two", *boot_id, options=options)
                    assert other.returncode == 0 and len(other.stdout) == len(machine)
                    factory("destroy")
                    assert ctr.exec(container_id, *boot_id).stdout == machine
                    assert runs(ready[0])
                wait_gone(ready)
            finally:
                server.kill()
    finally:
        factory("destroy")
