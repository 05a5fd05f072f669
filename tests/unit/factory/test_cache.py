"""The cache's server and client, without machines: here all of them fail to boot."""

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from virtcontainers.config import AgentConfig, HypervisorConfig
from virtcontainers.errors import FailedPreconditionError, KataError, UnavailableError
from virtcontainers.factory import cache, grpccache
from virtcontainers.factory.cache import CacheServer, end_orphans
from virtcontainers.factory.direct import Direct
from virtcontainers.factory.grpc_unary import GrpcStatusError
from virtcontainers.factory.grpccache import CacheMisfit, GrpcCache, cache_status, claim, quit_cache
from virtcontainers.hypervisor.base import Persisted
from virtcontainers.hypervisor.process import MachineProcess, find_processes
from virtcontainers.vm import VMConfig

CONFIG = VMConfig(HypervisorConfig(kernel=Path("/no/kernel"), initrd=Path("/no/initrd")), AgentConfig())


@pytest.fixture(autouse=True)
def run_vc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cache, "RUN_VC", tmp_path / "vc")
    monkeypatch.setattr(cache, "SHARED_SANDBOXES", tmp_path / "shares")
    monkeypatch.setattr(grpccache, "_CALL_TIMEOUT_S", 60.0)
    (tmp_path / "vc/vm").mkdir(parents=True)
    return tmp_path / "vc"


@pytest.fixture
def endpoint(tmp_path: Path) -> Path:
    return tmp_path / "run/cache.sock"


@contextlib.asynccontextmanager
async def serving(endpoint: Path) -> AsyncIterator[CacheServer]:
    server = CacheServer(endpoint, 2, Direct(CONFIG), CONFIG)
    task = asyncio.create_task(server.run())
    while not task.done():
        with contextlib.suppress(UnavailableError):
            await cache_status(endpoint)
            break
        await asyncio.sleep(0.01)
    try:
        if task.done():
            task.result()
        yield server
    finally:
        server.stop()
        await task
        assert not endpoint.exists()


def nothing(persisted: Persisted, share_of: str | None = None) -> None:
    raise AssertionError("nothing was to be planned")


# -- the socket


def test_the_socket_is_roots_alone(endpoint: Path) -> None:
    async def body() -> None:
        async with serving(endpoint):
            assert endpoint.stat().st_mode & 0o777 == 0o600
            assert endpoint.parent.stat().st_mode & 0o777 == 0o700

    asyncio.run(body())


def test_the_socket_of_a_server_that_was_killed_is_replaced(endpoint: Path) -> None:
    endpoint.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(endpoint))

    async def body() -> None:
        async with serving(endpoint):
            assert (await cache_status(endpoint)).pid == os.getpid()

    asyncio.run(body())


def test_there_is_one_server(endpoint: Path) -> None:
    async def body() -> None:
        async with serving(endpoint):
            expected = f"vm_cache_endpoint {endpoint}: found a server with pid {os.getpid()}, expected none"
            with pytest.raises(FailedPreconditionError, match=expected):
                await CacheServer(endpoint, 1, Direct(CONFIG), CONFIG).run()
            assert (await cache_status(endpoint)).pid == os.getpid()

    asyncio.run(body())


def test_a_file_is_not_taken_for_a_socket(endpoint: Path) -> None:
    endpoint.parent.mkdir()
    endpoint.write_text("somebody's")
    with pytest.raises(
        FailedPreconditionError, match=f"vm_cache_endpoint {endpoint}: found what is no socket"
    ):
        asyncio.run(CacheServer(endpoint, 1, Direct(CONFIG), CONFIG).run())
    assert endpoint.read_text() == "somebody's"


def test_a_socket_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for endpoint in (tmp_path / "file/cache.sock", tmp_path / ("x" * 120)):
        with pytest.raises(KataError, match=f"vm_cache_endpoint {endpoint}: "):
            asyncio.run(CacheServer(endpoint, 1, Direct(CONFIG), CONFIG).run())


# -- calls


def test_an_empty_cache_says_so_at_once(endpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        async with serving(endpoint):
            factory = await GrpcCache.fetch(endpoint, CONFIG)
            assert factory.config == CONFIG
            with pytest.raises(
                GrpcStatusError, match=f"{endpoint}: GetBaseVM: no machine is ready"
            ) as failure:
                await factory.get_base_vm("pod", CONFIG, shared_path=None, on_planned=nothing)
            assert failure.value.code == "RESOURCE_EXHAUSTED"
            status = await cache_status(endpoint)
            assert (status.pid, list(status.vmstatus)) == (os.getpid(), [])

    with caplog.at_level(logging.ERROR):
        asyncio.run(body())
    # And why.
    assert "no machine for the cache, the next try is in 1 s: /no/kernel: No such file" in caplog.text


def test_a_cache_of_other_machines_is_not_used(endpoint: Path) -> None:
    smaller = VMConfig(replace(CONFIG.hypervisor, default_memory_mib=256), CONFIG.agent)
    louder = VMConfig(CONFIG.hypervisor, replace(CONFIG.agent, enable_debug=True))

    async def body() -> None:
        async with serving(endpoint):
            expected = (
                f"the VM cache at {endpoint} does not fit: default_memory_mib: found 2048, expected 256$"
            )
            with pytest.raises(CacheMisfit, match=expected):
                await GrpcCache.fetch(endpoint, smaller)
            with pytest.raises(CacheMisfit, match="enable_debug: found False, expected True"):
                await GrpcCache.fetch(endpoint, louder)

    asyncio.run(body())


def test_no_cache_is_named(endpoint: Path) -> None:
    with pytest.raises(UnavailableError, match=f"{endpoint}: Config: nobody serves it: No such file"):
        asyncio.run(GrpcCache.fetch(endpoint, CONFIG))
    assert asyncio.run(quit_cache(endpoint, 5)) is False


SERVER = """
import asyncio, sys
from pathlib import Path
from virtcontainers.config import AgentConfig, HypervisorConfig
from virtcontainers.factory import cache
from virtcontainers.factory.direct import Direct
from virtcontainers.vm import VMConfig

endpoint, cache.RUN_VC, cache.SHARED_SANDBOXES = map(Path, sys.argv[1:])
config = VMConfig(HypervisorConfig(kernel=Path("/no/kernel"), initrd=Path("/no/initrd")), AgentConfig())
asyncio.run(cache.CacheServer(endpoint, 1, Direct(config), config).run())
"""


def test_quit_returns_when_the_server_has_ended(endpoint: Path, run_vc: Path) -> None:
    async def body() -> None:
        while not await quit_cache(endpoint, 60):
            assert process.poll() is None
            await asyncio.sleep(0.01)

    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(endpoint), str(run_vc), str(run_vc)],
        cwd=Path(cache.__file__).parents[2],
    ) as process:
        asyncio.run(body())
        assert process.poll() == 0
    assert not endpoint.exists()


# -- what a killed server leaves


def ended_process() -> str:
    with subprocess.Popen(["/bin/sleep", "600"]) as process:
        name = cache._process(process.pid)
        process.kill()
    return name


@contextlib.asynccontextmanager
async def machine_of(run_vc: Path, server: str) -> AsyncIterator[Path]:
    directory = run_vc / "vm/cache-0123456789ab"
    directory.mkdir()
    (directory / "server").write_text(server)
    process = MachineProcess.start("qemu", ["/bin/sleep", "600"], directory=directory, outlives_us=True)
    try:
        # The kernel shows a new program's environment a moment after it has begun.
        while find_processes(directory) != [process.pid]:
            assert process.running
            await asyncio.sleep(0.01)
        yield directory
    finally:
        await process.terminate()


@pytest.mark.parametrize("half_ended", [False, True], ids=["", "by one that was killed while it ended them"])
def test_machines_without_server_and_pod_are_ended(run_vc: Path, half_ended: bool) -> None:
    async def body() -> None:
        async with machine_of(run_vc, ended_process()) as directory:
            if half_ended:
                assert claim(directory, ended_process())
            assert await end_orphans() == 1
            assert find_processes(directory) == []
            assert not directory.exists()
            assert await end_orphans() == 0

    asyncio.run(body())


def test_a_machine_of_a_pod_is_left_alone(run_vc: Path) -> None:
    async def body() -> None:
        async with machine_of(run_vc, ended_process()) as directory:
            assert claim(directory, "pod")
            assert not claim(directory, "other")
            assert await end_orphans() == 0
            assert len(find_processes(directory)) == 1
            assert (directory / "owner").read_text() == "pod"

    asyncio.run(body())


def test_a_machine_of_a_living_server_is_left_alone(run_vc: Path) -> None:
    async def body() -> None:
        async with machine_of(run_vc, cache._process(os.getpid())) as directory:
            assert await end_orphans() == 0
            assert len(find_processes(directory)) == 1

    asyncio.run(body())


def test_a_machine_is_there_no_sooner_than_its_server_is_known(
    run_vc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = cache._process
    seen: list[Path] = []

    def looking(pid: int) -> str:
        seen.extend(cache._named(run_vc / "vm"))
        return process(pid)

    monkeypatch.setattr(cache, "_process", looking)
    directory = run_vc / "vm/cache-0123456789ab"
    cache._make_directory(directory)
    assert seen == []
    assert (directory / "server").read_text() == process(os.getpid())
    assert [*directory.parent.iterdir()] == [directory]


def test_a_directory_that_has_become_no_machine_goes_with_its_server(run_vc: Path) -> None:
    dead, living = (run_vc / f"vm/.cache-{number:012x}" for number in (1, 2))
    for directory, server in ((dead, ended_process()), (living, cache._process(os.getpid()))):
        directory.mkdir()
        (directory / "server").write_text(server)
    assert asyncio.run(end_orphans()) == 0
    assert [*dead.parent.iterdir()] == [living]


def test_the_pid_alone_is_no_server(run_vc: Path) -> None:
    async def body() -> None:
        async with machine_of(run_vc, f"{os.getpid()} 1"):
            assert await end_orphans() == 1

    asyncio.run(body())


def test_what_only_looks_like_a_cached_machine_is_left_alone(run_vc: Path) -> None:
    (run_vc / "vm/cache-of-mine").mkdir()
    assert asyncio.run(end_orphans()) == 0
    assert (run_vc / "vm/cache-of-mine").exists()


def test_processes_start_beside_a_grpc_server(tmp_path: Path) -> None:
    script = f"""
import asyncio, subprocess
from virtcontainers.factory import cache

async def main():
    server = cache.grpc.aio.server()
    server.add_insecure_port("unix:{tmp_path}/socket")
    await server.start()
    for _ in range(100):
        subprocess.run(["true"], preexec_fn=lambda: None, check=True)
    await server.stop(0)

asyncio.run(main())
"""
    environment = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
