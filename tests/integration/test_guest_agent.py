"""The guest's agent with real crun and real containers, on this host instead of in a machine: in mount, PID,
IPC and UTS namespaces of its own, so that nothing it does is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import TIMEOUT_S, loop, put_busybox, remove_cgroups, wait_for

from agent_client.protocols import agent_pb2, health_pb2, oci_json
from ttrpc import Client, Code, StatusError

REPO = Path(__file__).resolve().parents[2]
APPLETS = (
    "sh cat echo sleep dd md5sum stty tty id env hostname head true false kill ps ls touch seq test wc mkdir"
)

# A cgroup v2 hierarchy where a guest has it, whatever the host has there, and the guest's busybox.
SET_UP = """
mount -t overlay -o "lowerdir=$1:/bin" overlay /bin
shift
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /sys/fs/cgroup/containers
mount -t tmpfs tmpfs /run
exec "$@"
"""

_ids = itertools.count()

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("crun") is None, reason="needs root and crun"
)


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rootfs")
    for directory in ("bin", "proc", "sys", "dev", "tmp", "etc", "mnt"):
        (root / directory).mkdir()
    put_busybox(root / "bin/busybox")
    for applet in APPLETS.split():
        (root / "bin" / applet).symlink_to("busybox")
    root.chmod(0o755)
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\n")
    return root


class Server:
    """The agent's process, by the pid of the first process of its PID namespace's parent."""

    def __init__(self, address: Path, process: subprocess.Popen[bytes], log: Path) -> None:
        self.address = address
        self.process = process
        self.log = log

    def processes(self) -> list[tuple[int, str, str]]:
        """(pid, state, command) of all in the agent's PID namespace but the agent itself."""
        namespace = Path(f"/proc/{self.process.pid}/ns/pid_for_children").readlink()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                status = dict(
                    line.split(":\t", 1)
                    for line in (entry / "status").read_text().splitlines()
                    if ":\t" in line
                )
                inner = status["NSpid"].split()
                parent_namespace = (entry / "ns/pid").readlink()
            except (OSError, KeyError):
                continue
            if len(inner) > 1 and (len(inner) > 2 or (parent_namespace == namespace and inner[-1] != "1")):
                found.append((int(entry.name), status["State"][0], status["Name"]))
        return found


def _cgroup2() -> Path:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, fstype, *_ = line.split()
        if fstype == "cgroup2":
            return Path(point)
    raise AssertionError("no cgroup2 is mounted")


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[Server]:
    programs = directory / "bin"
    programs.mkdir()
    put_busybox(programs / "busybox")
    address, log = directory / "agent.sock", directory / "agent.log"
    command = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command += ["sh", "-ec", SET_UP, "sh", str(programs), sys.executable, "-m", "guest.agent.main"]
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--listen", f"unix:{address}"], cwd=REPO, stderr=output)
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while not _listens(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        yield Server(address, process, log)
        assert process.poll() is None, log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def _listens(address: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(address)) == 0


@pytest.fixture(scope="module", autouse=True)
def _cgroups_go() -> Iterator[None]:
    yield
    remove_cgroups(_cgroup2() / "containers")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("agent")) as server:
        yield server


class Agent:
    """One connection to the agent, and the container's life in few words."""

    def __init__(self, client: Client, rootfs: Path) -> None:
        self.client = client
        self.rootfs = rootfs
        self.created: list[str] = []
        self.rpc: Any = client.service(agent_pb2.DESCRIPTOR.services_by_name["AgentService"])
        self.health: Any = client.service(health_pb2.DESCRIPTOR.services_by_name["Health"])

    def spec(self, args: list[str] | str, **process: Any) -> dict[str, Any]:
        if isinstance(args, str):
            args = ["/bin/sh", "-c", args]
        return {
            "ociVersion": "1.0.2",
            "process": self.process_spec(args, **process),
            "root": {"path": str(self.rootfs), "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {
                    "destination": "/dev",
                    "type": "tmpfs",
                    "source": "tmpfs",
                    "options": ["nosuid", "mode=755"],
                },
                {
                    "destination": "/dev/pts",
                    "type": "devpts",
                    "source": "devpts",
                    "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
                },
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
            ],
            "linux": {
                "cgroupsPath": "/host/path",
                # Any other rule is an eBPF program, which needs more of root than a host may have.
                "resources": {"devices": [{"allow": True, "type": "a", "access": "rwm"}]},
                "namespaces": [{"type": "mount"}, {"type": "uts"}, {"type": "ipc"}],
                "maskedPaths": ["/proc/kcore"],
                "readonlyPaths": ["/proc/sys"],
            },
        }

    @staticmethod
    def process_spec(args: list[str] | str, **process: Any) -> dict[str, Any]:
        if isinstance(args, str):
            args = ["/bin/sh", "-c", args]
        capabilities = ["CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE"]
        return {
            "args": args,
            "cwd": "/",
            "env": ["PATH=/bin", "HOME=/"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        } | process

    async def create(
        self,
        args: list[str] | str,
        *,
        change: Callable[[dict[str, Any]], None] = lambda spec: None,
        storages: list[agent_pb2.Storage] | None = None,
        sandbox_pidns: bool = False,
        **process: Any,
    ) -> str:
        container_id = f"c{next(_ids)}"
        self.created.append(container_id)
        spec = self.spec(args, **process)
        change(spec)
        await self.rpc.create_container(
            agent_pb2.CreateContainerRequest(
                container_id=container_id,
                exec_id=container_id,
                OCI=oci_json.spec_from_json(spec),
                storages=storages or [],
                sandbox_pidns=sandbox_pidns,
            )
        )
        return container_id

    async def start(self, args: list[str] | str, **options: Any) -> str:
        container_id = await self.create(args, **options)
        await self.rpc.start_container(agent_pb2.StartContainerRequest(container_id=container_id))
        return container_id

    async def run(self, args: list[str] | str, **options: Any) -> tuple[int, str, str]:
        """A container from start to end: status, stdout, stderr."""
        container_id = await self.start(args, **options)
        result = await self.finish(container_id)
        await self.remove(container_id)
        return result

    async def finish(self, container_id: str, exec_id: str = "") -> tuple[int, str, str]:
        await self.rpc.close_stdin(
            agent_pb2.CloseStdinRequest(container_id=container_id, exec_id=exec_id or container_id)
        )
        out, err, status = await asyncio.gather(
            self.read_all(container_id, exec_id),
            self.read_all(container_id, exec_id, stderr=True),
            self.wait(container_id, exec_id),
        )
        return status, out.decode(), err.decode()

    async def exec(self, container_id: str, exec_id: str, args: list[str] | str, **process: Any) -> None:
        await self.rpc.exec_process(
            agent_pb2.ExecProcessRequest(
                container_id=container_id,
                exec_id=exec_id,
                process=oci_json.process_from_json(self.process_spec(args, **process)),
            )
        )

    async def read(
        self, container_id: str, exec_id: str = "", size: int = 65536, *, stderr: bool = False
    ) -> bytes:
        call = self.rpc.read_stderr if stderr else self.rpc.read_stdout
        request = agent_pb2.ReadStreamRequest(
            container_id=container_id, exec_id=exec_id or container_id, len=size
        )
        data: bytes = (await call(request)).data
        return data

    async def read_all(self, container_id: str, exec_id: str = "", *, stderr: bool = False) -> bytes:
        pieces = []
        while piece := await self.read(container_id, exec_id, stderr=stderr):
            pieces.append(piece)
        return b"".join(pieces)

    async def read_until(self, container_id: str, text: str, exec_id: str = "") -> str:
        seen = ""
        while text not in seen:
            piece = await self.read(container_id, exec_id)
            assert piece, f"the stream ended, {text!r} not in {seen!r}"
            seen += piece.decode()
        return seen

    async def write(self, container_id: str, data: bytes, exec_id: str = "") -> None:
        response = await self.rpc.write_stdin(
            agent_pb2.WriteStreamRequest(
                container_id=container_id, exec_id=exec_id or container_id, data=data
            )
        )
        assert response.len == len(data)

    async def close_stdin(self, container_id: str, exec_id: str = "") -> None:
        await self.rpc.close_stdin(
            agent_pb2.CloseStdinRequest(container_id=container_id, exec_id=exec_id or container_id)
        )

    async def wait(self, container_id: str, exec_id: str = "") -> int:
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id or container_id)
        status: int = (await self.rpc.wait_process(request)).status
        return status

    async def signal(self, container_id: str, number: int, exec_id: str) -> None:
        await self.rpc.signal_process(
            agent_pb2.SignalProcessRequest(container_id=container_id, exec_id=exec_id, signal=number)
        )

    async def remove(self, container_id: str) -> None:
        await self.rpc.remove_container(agent_pb2.RemoveContainerRequest(container_id=container_id))

    async def cpu_usage(self, container_id: str) -> int:
        """In ns."""
        request = agent_pb2.StatsContainerRequest(container_id=container_id)
        usage: int = (await self.rpc.stats_container(request)).cgroup_stats.cpu_stats.cpu_usage.total_usage
        return usage

    async def check(self) -> None:
        response = await self.health.check(health_pb2.CheckRequest())
        assert response.status == health_pb2.HealthCheckResponse.SERVING

    async def has_heard(self) -> None:
        """All that the tasks which there are ask for: calls of one connection begin in their order."""
        await asyncio.sleep(0)
        await self.check()


@contextlib.asynccontextmanager
async def connected(server: Server, rootfs: Path) -> AsyncIterator[Agent]:
    client = await Client.connect(server.address)
    try:
        yield Agent(client, rootfs)
    finally:
        await client.close()


def container_files(server: Server) -> list[str]:
    """What the agent has of containers, in its /run. It may be at work there."""
    tree = os.walk(f"/proc/{_first_process(server)}/root/run/kata-agent")
    return [
        f"{directory}/{name}"
        for directory, *names in tree
        for name in itertools.chain(*names)
        if name not in ("crun", "bundles")
    ]


Body = Callable[[Agent], Coroutine[Any, Any, None]]


@pytest.fixture
def run(server: Server, rootfs: Path) -> Iterator[Callable[[Body], None]]:
    """Run a test's body with a connection. Afterwards no process, cgroup or file of a container is left."""

    def runner(body: Body) -> None:
        async def whole() -> None:
            async with asyncio.timeout(TIMEOUT_S), connected(server, rootfs) as agent:
                try:
                    await body(agent)
                except BaseException:
                    for container_id in agent.created:
                        with contextlib.suppress(StatusError):
                            await agent.remove(container_id)
                    raise

        asyncio.run(whole())

    yield runner
    assert container_files(server) == [], "files of containers are left"
    cgroups = _cgroup2() / "containers"
    assert not cgroups.exists() or [p for p in cgroups.iterdir() if p.is_dir()] == []
    deadline = time.monotonic() + TIMEOUT_S
    while (processes := server.processes()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes == [], server.log.read_text()


def _first_process(server: Server) -> int:
    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
    return int(children[0])


Run = Callable[[Body], None]


class Hook:
    """Of a container: it says that it runs, and goes on when it is told."""

    def __init__(self, kind: str, directory: Path) -> None:
        self._kind = kind
        self._directory = directory

    def put(self, spec: dict[str, Any]) -> None:
        name = f"/run/{self._directory.name}"
        script = f"> {name}/runs; until [ -e {name}/told ]; do /bin/sleep 0.05; done"
        spec["hooks"] = {self._kind: [{"path": "/bin/sh", "args": ["sh", "-c", script]}]}

    async def runs(self) -> None:
        while not (self._directory / "runs").exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    def go_on(self) -> None:
        (self._directory / "told").touch()


@contextlib.contextmanager
def hook(server: Server, kind: str) -> Iterator[Hook]:
    directory = Path(f"/proc/{_first_process(server)}/root/run/hook-{next(_ids)}")
    directory.mkdir()
    hook = Hook(kind, directory)
    try:
        yield hook
    finally:
        hook.go_on()


@contextlib.contextmanager
def without_tasks(server: Server) -> Iterator[None]:
    """As when a container's processes have taken all the tasks of the machine: the agent can start no other
    process or thread."""
    v1 = Path("/sys/fs/cgroup/pids")
    cgroup = (v1 if v1.is_dir() else _cgroup2()) / f"kata-py-no-tasks-{os.getpid()}"
    try:
        cgroup.mkdir()
        (cgroup / "pids.max").write_text("0")
    except OSError as error:
        pytest.skip(f"no limit of tasks: {error}")
    pid = str(_first_process(server))
    before = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    kind = "pids" if v1.is_dir() else ""
    own = next(path for _, name, path in (line.split(":", 2) for line in before) if name == kind)
    try:
        (cgroup / "cgroup.procs").write_text(pid)
        yield
    finally:
        (cgroup.parent / own.lstrip("/") / "cgroup.procs").write_text(pid)
        cgroup.rmdir()


@contextlib.contextmanager
def disk(path: Path) -> Iterator[str]:
    """A block device with an ext4 in it."""
    with path.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", str(path)], check=True)
    with loop(path) as device:
        yield device


def test_an_agent_warms_up_when_its_first_host_has_gone_and_no_sooner(tmp_path: Path, rootfs: Path) -> None:
    def has_crun(server: Server) -> bool:
        for fd in Path(f"/proc/{_first_process(server)}/fd").iterdir():
            # It may be a connection that ends.
            with contextlib.suppress(FileNotFoundError):
                if "memfd:crun" in str(fd.readlink()):
                    return True
        return False

    async def call(server: Server) -> None:
        async with asyncio.timeout(TIMEOUT_S), connected(server, rootfs) as agent:
            await agent.check()
            assert not has_crun(server)

    with serving(tmp_path) as server:
        # Who has not asked anything is no host: as who has found out that it listens.
        assert _listens(server.address)
        asyncio.run(call(server))
        wait_for("the first container's crun", lambda: has_crun(server))


def test_exit_statuses(run: Run) -> None:
    async def body(agent: Agent) -> None:
        assert await agent.run("echo out; echo err >&2") == (0, "out\n", "err\n")
        assert (await agent.run("exit 7"))[0] == 7
        assert (await agent.run("kill -9 $$; sleep 1; exit 3"))[0] == 3  # an init is deaf to its own kill
        assert (await agent.run(["/bin/sh", "-c", "(kill -9 $$); nosuch"]))[0] == 127

    run(body)


def test_a_killed_container_reports_128_and_the_signal(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["sleep", "1000"])
        await agent.signal(container_id, signal.SIGKILL, container_id)
        assert await agent.wait(container_id) == 137
        assert await agent.wait(container_id) == 137
        with pytest.raises(StatusError, match="ESRCH: No such process") as raised:
            await agent.signal(container_id, signal.SIGKILL, container_id)
        assert raised.value.code == Code.NOT_FOUND
        await agent.remove(container_id)

    run(body)


def test_a_container_may_be_removed_by_two_at_once(run: Run, server: Server) -> None:
    """A host that has lost its patience with the first call asks again."""

    async def body(agent: Agent) -> None:
        with hook(server, "poststop") as end:
            container_id = await agent.start(["sleep", "1000"], change=end.put)
            removals = [asyncio.ensure_future(agent.remove(container_id)) for _ in range(2)]
            await end.runs()
            await agent.has_heard()
            assert not any(removal.done() for removal in removals)
            end.go_on()
            await asyncio.gather(*removals)
        with pytest.raises(StatusError) as raised:
            await agent.remove(container_id)
        assert raised.value.code == Code.NOT_FOUND

    run(body)


def test_sigterm_ends_an_init_without_handler_and_runs_the_handler_of_one_that_has_it(run: Run) -> None:
    async def body(agent: Agent) -> None:
        deaf = await agent.start(["sleep", "1000"])
        await agent.signal(deaf, signal.SIGTERM, deaf)
        assert await agent.wait(deaf) == 137
        polite = await agent.start("trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done")
        await agent.read_until(polite, "ready")
        await agent.signal(polite, signal.SIGTERM, polite)
        assert await agent.finish(polite) == (5, "bye\n", "")
        await agent.remove(deaf)
        await agent.remove(polite)

    run(body)


def test_signal_to_all_processes(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start("trap 'exit 9' USR1; echo ready; while :; do sleep 0.1; done")
        await agent.read_until(container_id, "ready")
        await agent.exec(container_id, "e", "trap 'exit 8' USR1; echo ready; while :; do sleep 0.1; done")
        await agent.read_until(container_id, "ready", "e")
        await agent.signal(container_id, signal.SIGUSR1, "")
        assert await agent.wait(container_id, "e") in (8, 137)  # the init may end first, and end it
        assert await agent.wait(container_id) == 9
        await agent.remove(container_id)

    run(body)


def test_a_missing_binary_is_named(run: Run) -> None:
    async def body(agent: Agent) -> None:
        with pytest.raises(StatusError, match="executable file `nosuch` not found"):
            await agent.create(["nosuch"])
        with pytest.raises(StatusError, match="/no/such/file"):
            await agent.create(["/no/such/file"])
        container_id = await agent.start(["sleep", "1000"])
        with pytest.raises(StatusError, match="executable file `nosuch` not found"):
            await agent.exec(container_id, "e", ["nosuch"])
        await agent.remove(container_id)

    run(body)


def test_a_bad_spec_is_an_error_and_leaves_nothing(run: Run) -> None:
    async def body(agent: Agent) -> None:
        def bad_mount(spec: dict[str, Any]) -> None:
            spec["mounts"].append(
                {"destination": "/mnt", "type": "bind", "source": "/no/such", "options": ["bind"]}
            )

        with pytest.raises(StatusError, match="/no/such"):
            await agent.create(["true"], change=bad_mount)
        with pytest.raises(StatusError) as raised:
            await agent.rpc.create_container(agent_pb2.CreateContainerRequest(container_id="x"))
        assert raised.value.code == Code.INVALID_ARGUMENT
        with pytest.raises(StatusError) as raised:
            await agent.rpc.create_container(agent_pb2.CreateContainerRequest(container_id="../x"))
        assert raised.value.code == Code.INVALID_ARGUMENT

    run(body)


def test_unknown_containers_and_processes_are_not_found(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.create(["true"])
        for call in (agent.wait("nosuch"), agent.wait(container_id, "nosuch"), agent.remove("nosuch")):
            with pytest.raises(StatusError) as raised:
                await call
            assert raised.value.code == Code.NOT_FOUND
        await agent.remove(container_id)

    run(body)


def test_ten_megabytes_of_stdin_arrive_whole(run: Run) -> None:
    async def body(agent: Agent) -> None:
        data = os.urandom(10_000_000)
        container_id = await agent.start(["md5sum"])
        for start in range(0, len(data), 1 << 16):
            await agent.write(container_id, data[start : start + (1 << 16)])
        status, out, _ = await agent.finish(container_id)
        assert (status, out.split()[0]) == (0, hashlib.md5(data).hexdigest())
        await agent.remove(container_id)

    run(body)


def test_stdin_through_cat_comes_back_whole(run: Run) -> None:
    async def body(agent: Agent) -> None:
        data = os.urandom(10_000_000)
        container_id = await agent.start(["cat"])

        async def feed() -> None:
            for start in range(0, len(data), 100_000):
                await agent.write(container_id, data[start : start + 100_000])
            await agent.close_stdin(container_id)

        _, back = await asyncio.gather(feed(), agent.read_all(container_id))
        assert back == data
        assert await agent.wait(container_id) == 0
        await agent.remove(container_id)

    run(body)


def test_a_container_that_does_not_read_stops_its_writer_and_nobody_else(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["sleep", "1000"])
        writing = asyncio.ensure_future(agent.write(container_id, bytes(1_000_000)))
        await asyncio.sleep(0.1)
        await agent.close_stdin(container_id)
        await agent.exec(container_id, "e", "echo works")
        assert await agent.finish(container_id, "e") == (0, "works\n", "")
        assert not writing.done()
        await agent.signal(container_id, signal.SIGKILL, "")
        with pytest.raises(StatusError):
            await writing
        await agent.remove(container_id)

    run(body)


def test_two_outputs_of_fifty_megabytes_at_once(run: Run) -> None:
    async def body(agent: Agent) -> None:
        command = "dd if=/dev/urandom of=/tmp/f bs=1M count=50 2>/dev/null; md5sum /tmp/f >&2; cat /tmp/f"

        async def one() -> None:
            container_id = await agent.start(command)
            digest, out, err = (
                hashlib.md5(),
                0,
                asyncio.ensure_future(agent.read_all(container_id, stderr=True)),
            )
            while piece := await agent.read(container_id):
                digest.update(piece)
                out += len(piece)
            assert out == 50 << 20
            assert (await err).decode().split()[0] == digest.hexdigest()
            assert await agent.wait(container_id) == 0
            await agent.remove(container_id)

        await asyncio.gather(one(), one())

    run(body)


def test_unread_output_stops_the_container_and_nobody_else(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start("head -c 1000000 /dev/zero; echo end >&2")
        await asyncio.sleep(0.3)
        assert (await agent.run("echo works"))[1] == "works\n"
        waiting = asyncio.ensure_future(agent.wait(container_id))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert len(await agent.read_all(container_id)) == 1_000_000
        assert await agent.read_all(container_id, stderr=True) == b"end\n"
        assert await waiting == 0
        await agent.remove(container_id)

    run(body)


def test_output_can_be_read_after_the_exit(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start("echo late; echo err >&2")
        assert await agent.wait(container_id) == 0
        assert await agent.read_all(container_id) == b"late\n"
        assert await agent.read_all(container_id, stderr=True) == b"err\n"
        await agent.remove(container_id)

    run(body)


def test_a_process_left_in_the_background_holds_nobody_up(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["sleep", "1000"])
        await agent.exec(container_id, "e", "sleep 1000 & echo started; exit 4")
        assert await agent.finish(container_id, "e") == (4, "started\n", "")
        await agent.remove(container_id)

    run(body)


def test_terminal(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["/bin/sh"], terminal=True, consoleSize={"height": 30, "width": 90})
        await agent.write(container_id, b"PS1=; stty -echo; echo go\n")
        await agent.read_until(container_id, "go\r\n")
        await agent.write(container_id, b"tty; stty size\n")
        assert "/dev/" in await agent.read_until(container_id, "30 90")
        await agent.rpc.tty_win_resize(
            agent_pb2.TtyWinResizeRequest(container_id=container_id, exec_id=container_id, row=50, column=120)
        )
        await agent.write(container_id, b"stty size\n")
        await agent.read_until(container_id, "50 120")
        await agent.write(container_id, b"exit 6\n")
        assert await agent.wait(container_id) == 6
        await agent.read_all(container_id)
        assert await agent.read_all(container_id, stderr=True) == b""
        await agent.remove(container_id)

    run(body)


def test_terminal_output_is_whole(run: Run) -> None:
    async def body(agent: Agent) -> None:
        status, out, _ = await agent.run("stty -opost; seq 1 100000", terminal=True)
        assert status == 0
        assert out == "".join(f"{n}\n" for n in range(1, 100001))

    run(body)


def test_exec(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["sleep", "1000"])
        await agent.exec(container_id, "who", "id -u; id -g; echo $WHAT; exit 3", env=["PATH=/bin", "WHAT=x"],
                         user={"uid": 1000, "gid": 1000}, cwd="/tmp")  # fmt: skip
        assert await agent.finish(container_id, "who") == (3, "1000\n1000\nx\n", "")
        await agent.exec(container_id, "cat", ["cat"])
        with pytest.raises(StatusError) as raised:
            await agent.exec(container_id, "cat", ["cat"])
        assert raised.value.code == Code.ALREADY_EXISTS
        await agent.write(container_id, b"hello", "cat")
        assert await agent.finish(container_id, "cat") == (0, "hello", "")
        # crun lets the program run, and sets the size then.
        script = "until stty size 2>/dev/null; do :; done"
        await agent.exec(container_id, "tty", script, terminal=True, consoleSize={"height": 7, "width": 9})
        assert await agent.finish(container_id, "tty") == (0, "7 9\r\n", "")
        await agent.exec(container_id, "killed", ["sleep", "1000"])
        await agent.signal(container_id, signal.SIGTERM, "killed")
        assert await agent.wait(container_id, "killed") == 143
        await agent.exec(container_id, "left", ["sleep", "1000"])
        await agent.signal(container_id, signal.SIGKILL, container_id)
        assert await agent.wait(container_id, "left") == 137
        with pytest.raises(StatusError) as raised:
            await agent.exec(container_id, "late", ["true"])
        assert raised.value.code == Code.FAILED_PRECONDITION
        await agent.remove(container_id)

    run(body)


def test_twenty_execs_at_once(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["sleep", "1000"])

        async def one(number: int) -> None:
            await agent.exec(container_id, f"e{number}", f"echo {number}; exit {number}")
            assert await agent.finish(container_id, f"e{number}") == (number, f"{number}\n", "")

        await asyncio.gather(*(one(number) for number in range(20)))
        await agent.remove(container_id)

    run(body)


def test_the_user_may_open_its_own_stdout(run: Run) -> None:
    async def body(agent: Agent) -> None:
        user = {"uid": 1000, "gid": 1000}
        assert await agent.run("echo a > /proc/self/fd/1", user=user) == (0, "a\n", "")
        container_id = await agent.start(["sleep", "1000"])
        await agent.exec(container_id, "e", "echo b > /proc/self/fd/1", user=user)
        assert await agent.finish(container_id, "e") == (0, "b\n", "")
        await agent.remove(container_id)

    run(body)


def test_pause_and_resume(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start("while :; do echo tick; sleep 0.05; done")
        await agent.read_until(container_id, "tick")
        await agent.rpc.pause_container(agent_pb2.PauseContainerRequest(container_id=container_id))
        # Who is on a CPU when he is frozen is counted when he leaves it.
        used = -1
        while used != (used := await agent.cpu_usage(container_id)):  # noqa: ASYNC110
            await asyncio.sleep(0.5)
        with pytest.raises(StatusError) as raised:
            await agent.exec(container_id, "e", ["true"])
        assert raised.value.code == Code.FAILED_PRECONDITION
        await agent.rpc.resume_container(agent_pb2.ResumeContainerRequest(container_id=container_id))
        while await agent.cpu_usage(container_id) == used:
            await agent.read_until(container_id, "tick")
        await agent.rpc.pause_container(agent_pb2.PauseContainerRequest(container_id=container_id))
        await agent.remove(container_id)

    run(body)


def test_stats(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(
            "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo; sleep 1000; :"
        )
        await agent.read_until(container_id, "\n")
        stats = (
            await agent.rpc.stats_container(agent_pb2.StatsContainerRequest(container_id=container_id))
        ).cgroup_stats
        assert stats.pids_stats.current >= 1
        assert stats.cpu_stats.cpu_usage.total_usage > 1_000_000
        await agent.remove(container_id)

    run(body)


def test_removing_a_container_ends_whatever_runs(run: Run) -> None:
    async def body(agent: Agent) -> None:
        created = await agent.create(["true"])
        await agent.remove(created)
        running = await agent.start("sleep 1000 & sleep 1000 & wait")
        waiting = asyncio.ensure_future(agent.wait(running))
        await asyncio.sleep(0.1)
        await agent.remove(running)
        assert await waiting == 137

    run(body)


def test_a_container_that_is_removed_while_it_is_created_is_gone(run: Run, server: Server) -> None:
    """As a host does that has waited for it as long as it would."""

    async def body(agent: Agent) -> None:
        with hook(server, "prestart") as slow:
            creation = asyncio.ensure_future(agent.create(["sleep", "1000"], change=slow.put))
            await slow.runs()
            creation.cancel()
            removal = asyncio.ensure_future(agent.remove(agent.created[0]))
            await agent.has_heard()
            slow.go_on()
            with contextlib.suppress(StatusError):
                await removal
        with pytest.raises(StatusError) as raised:
            await agent.remove(agent.created[0])
        assert raised.value.code == Code.NOT_FOUND

    run(body)


def test_a_container_is_removed_and_its_disk_written_when_nothing_can_be_started(
    run: Run, server: Server, tmp_path: Path
) -> None:
    def with_disk(spec: dict[str, Any]) -> None:
        spec["mounts"].append(
            {"destination": "/mnt", "type": "bind", "source": "/run/t/disk", "options": ["rbind"]}
        )
        spec["hooks"] = {"poststop": [{"path": "/bin/true"}]}

    with disk(tmp_path / "image") as device:

        async def body(agent: Agent) -> None:
            volume = agent_pb2.Storage(driver="blk", source=device, fstype="ext4", mount_point="/run/t/disk")
            command = "echo written > /mnt/file; echo; sleep 1000"
            container_id = await agent.start(command, change=with_disk, storages=[volume])
            await agent.read_until(container_id, "\n")
            with without_tasks(server):
                with pytest.raises(StatusError, match="crun create cannot be started"):
                    await agent.create(["true"])
                await agent.remove(container_id)
                assert device not in Path(f"/proc/{_first_process(server)}/mounts").read_text()
            assert (await agent.run("echo again"))[1] == "again\n"

        run(body)
        look = ["debugfs", "-R", "cat /file", str(tmp_path / "image")]
        assert subprocess.run(look, check=True, capture_output=True).stdout == b"written\n"


def test_a_container_starts_once(run: Run) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["sleep", "1000"])
        with pytest.raises(StatusError) as raised:
            await agent.rpc.start_container(agent_pb2.StartContainerRequest(container_id=container_id))
        assert raised.value.code == Code.FAILED_PRECONDITION
        await agent.remove(container_id)

    run(body)


def test_orphans_are_reaped(run: Run, server: Server) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["sleep", "1000"])
        await agent.exec(container_id, "e", "for i in 1 2 3; do (sleep 0.1 & ); done; sleep 0.5")
        assert (await agent.finish(container_id, "e"))[0] == 0
        await agent.remove(container_id)

    run(body)
    wait_for("their end", lambda: not [p for p in server.processes() if p[1] == "Z"])


def test_containers_see_each_other_in_a_shared_pid_namespace(run: Run, server: Server) -> None:
    async def body(agent: Agent) -> None:
        await agent.rpc.create_sandbox(agent_pb2.CreateSandboxRequest(sandbox_id="s", sandbox_pidns=True))
        first = await agent.start("sleep 1234 & echo; sleep 1000", sandbox_pidns=True)
        await agent.read_until(first, "\n")
        status, out, _ = await agent.run("ps -o args", sandbox_pidns=True)
        assert status == 0 and "sleep 1234" in out
        alone = (await agent.run("ps -o args"))[1]
        assert "sleep 1234" not in alone
        # The others of the container are not left when its init ends, though its namespace lives on.
        await agent.signal(first, signal.SIGTERM, first)
        assert await agent.wait(first) == 143
        while "sleep 1234" in (await agent.run("ps -o args", sandbox_pidns=True))[1]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        await agent.remove(first)
        await agent.rpc.destroy_sandbox(agent_pb2.DestroySandboxRequest())
        assert "busybox" not in [name for *_, name in server.processes()], "what held it has ended, too"

    run(body)


async def without_pause(agent: Agent) -> None:
    """Who shares a PID namespace shares the first container's."""
    await agent.rpc.destroy_sandbox(agent_pb2.DestroySandboxRequest())
    await agent.rpc.create_sandbox(agent_pb2.CreateSandboxRequest(sandbox_id="s"))


def test_who_comes_while_the_owner_of_the_pid_namespace_is_removed_is_the_next(
    run: Run, server: Server
) -> None:
    async def body(agent: Agent) -> None:
        await without_pause(agent)
        with hook(server, "poststop") as end:
            owner = await agent.start(["sleep", "1000"], change=end.put, sandbox_pidns=True)
            assert (await agent.run("echo $$", sandbox_pidns=True))[1] != "1\n"
            removal = asyncio.ensure_future(agent.remove(owner))
            await end.runs()
            script = "echo $$; sleep 1000"
            coming = [asyncio.ensure_future(agent.start(script, sandbox_pidns=True)) for _ in "ab"]
            await agent.has_heard()
            assert not removal.done()
            end.go_on()
            first, second = [await each for each in coming]
            assert removal.done()
        pids = [await agent.read_until(container_id, "\n") for container_id in (first, second)]
        assert pids[0] == "1\n"
        assert pids[1] != "1\n"
        await agent.remove(first)
        assert await agent.wait(second) == 137
        with pytest.raises(StatusError, match="no PID namespace to share") as raised:
            await agent.create(["true"], sandbox_pidns=True)
        assert raised.value.code == Code.FAILED_PRECONDITION
        await agent.remove(second)

    run(body)


def test_a_pid_namespace_that_ends_while_it_is_joined_is_named(run: Run, server: Server) -> None:
    async def body(agent: Agent) -> None:
        await without_pause(agent)
        owner = await agent.start(["sleep", "1000"], sandbox_pidns=True)
        with hook(server, "prestart") as slow:
            joining = asyncio.ensure_future(
                agent.create(["sleep", "1000"], change=slow.put, sandbox_pidns=True)
            )
            await slow.runs()
            await agent.signal(owner, signal.SIGKILL, owner)
            # The kernel has ended all that were in it by then.
            assert await agent.wait(owner) == 137
            slow.go_on()
            with pytest.raises(
                StatusError, match=r"PID namespace that container c[0-9]+ was to share has ended"
            ) as raised:
                await joining
        assert raised.value.code == Code.FAILED_PRECONDITION
        await agent.remove(owner)

    run(body)


def test_hostname_of_the_sandbox(run: Run) -> None:
    async def body(agent: Agent) -> None:
        await agent.rpc.create_sandbox(agent_pb2.CreateSandboxRequest(sandbox_id="s", hostname="guest-host"))
        assert (await agent.run(["hostname"]))[1] == "guest-host\n"

        def named(spec: dict[str, Any]) -> None:
            spec["hostname"] = "of-the-spec"

        assert (await agent.run(["hostname"], change=named))[1] == "of-the-spec\n"

    run(body)


def test_network_sysctls_of_the_spec(run: Run) -> None:
    async def body(agent: Agent) -> None:
        path = "/proc/sys/net/ipv4/ip_default_ttl"
        before = Path(path).read_text().strip()

        def sysctl(spec: dict[str, Any]) -> None:
            spec["linux"]["sysctl"] = {"net.ipv4.ip_default_ttl": before}

        assert (await agent.run(["cat", path], change=sysctl))[:2] == (0, f"{before}\n")

    run(body)


def test_storages(run: Run, tmp_path: Path) -> None:
    async def body(agent: Agent) -> None:
        (tmp_path / "file").write_text("from the host\n")
        shm = ["noexec", "nosuid", "nodev", "mode=1777", "size=1048576"]
        storages = [
            agent_pb2.Storage(
                driver="ephemeral", source="shm", fstype="tmpfs", mount_point="/run/t/shm", options=shm
            ),
            agent_pb2.Storage(driver="bind", source=str(tmp_path), mount_point="/run/t/bind"),
            agent_pb2.Storage(driver="local", mount_point="/run/t/local", options=["mode=0700"]),
        ]

        def mounts(spec: dict[str, Any]) -> None:
            for source, target, options in (
                ("/run/t/shm", "/dev/shm", ["rbind"]),
                ("/run/t/bind", "/mnt", ["rbind", "ro"]),
                ("/run/t/local", "/etc", ["rbind"]),
            ):
                spec["mounts"].append(
                    {"destination": target, "type": "bind", "source": source, "options": options}
                )

        command = "cat /mnt/file; touch /mnt/x || echo ro; >/dev/shm/f && echo shm; >/etc/x && echo local"
        status, out, _ = await agent.run(command, change=mounts, storages=storages)
        assert (status, out) == (0, "from the host\nro\nshm\nlocal\n")
        with pytest.raises(StatusError, match="no handler for driver 'tape'"):
            await agent.create(["true"], storages=[agent_pb2.Storage(driver="tape", mount_point="/run/t/x")])

    run(body)


def test_copy_file(run: Run, server: Server) -> None:
    async def body(agent: Agent) -> None:
        base = "/run/kata-containers/shared/containers"
        for offset, data in ((0, b"abc"), (3, b"def")):
            await agent.rpc.copy_file(
                agent_pb2.CopyFileRequest(
                    path=f"{base}/d/file",
                    file_size=6,
                    file_mode=0o100640,
                    dir_mode=0o755,
                    offset=offset,
                    data=data,
                    uid=5,
                    gid=6,
                )
            )
        copied = Path(f"/proc/{_first_process(server)}/root{base}/d/file")
        assert copied.read_bytes() == b"abcdef"
        assert (copied.stat().st_mode, copied.stat().st_uid, copied.stat().st_gid) == (0o100640, 5, 6)
        with pytest.raises(StatusError) as raised:
            await agent.rpc.copy_file(agent_pb2.CopyFileRequest(path=f"{base}/../../x", file_mode=0o100600))
        assert raised.value.code == Code.INVALID_ARGUMENT

    run(body)


def test_a_client_that_disconnects_leaves_containers_and_output_to_the_next(
    run: Run, server: Server, rootfs: Path
) -> None:
    async def body(agent: Agent) -> None:
        async with connected(server, rootfs) as first:
            talking = await first.start("head -c 300000 /dev/zero; exit 5")
            listening = await first.start(["md5sum"])
            await first.write(listening, b"first,")
            pending = [
                asyncio.ensure_future(first.wait(talking)),
                asyncio.ensure_future(first.read(listening)),
                asyncio.ensure_future(first.rpc.get_oom_event(agent_pb2.GetOOMEventRequest())),
                asyncio.ensure_future(first.create(["sleep", "1000"])),
            ]
            await asyncio.sleep(0)
            half_made = f"c{next(_ids) - 1}"
            await asyncio.sleep(0.01)
        await asyncio.gather(*pending, return_exceptions=True)
        await agent.check()
        assert len(await agent.read_all(talking)) == 300_000
        assert await agent.wait(talking) == 5
        await agent.write(listening, b"second")
        status, out, _ = await agent.finish(listening)
        assert (status, out.split()[0]) == (0, hashlib.md5(b"first,second").hexdigest())
        await agent.remove(talking)
        await agent.remove(listening)
        # Where its creation has begun it goes on, and until it ends there is no container to remove.
        while container_files(server):
            with contextlib.suppress(StatusError):
                await agent.remove(half_made)
            await asyncio.sleep(0.05)

    run(body)


def test_nonsense_on_the_wire_ends_that_connection_only(run: Run, server: Server) -> None:
    async def body(agent: Agent) -> None:
        container_id = await agent.start(["cat"])
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"", os.urandom(4096)):
            _, writer = await asyncio.open_unix_connection(server.address)
            writer.write(nonsense)
            with contextlib.suppress(OSError):
                await writer.drain()
            await asyncio.sleep(0.05)
            writer.close()
        await agent.check()
        await agent.write(container_id, b"still here")
        assert await agent.finish(container_id) == (0, "still here", "")
        await agent.remove(container_id)

    run(body)


def test_what_the_agent_does_not_have_is_unimplemented(run: Run) -> None:
    async def body(agent: Agent) -> None:
        with pytest.raises(StatusError) as raised:
            await agent.rpc.set_policy(agent_pb2.SetPolicyRequest(policy="package agent_policy"))
        assert raised.value.code == Code.UNIMPLEMENTED

    run(body)


def test_guest_details_and_version(run: Run) -> None:
    async def body(agent: Agent) -> None:
        details = await agent.rpc.get_guest_details(agent_pb2.GuestDetailsRequest(mem_block_size=True))
        assert details.agent_details.supports_seccomp
        assert "virtio-fs" in details.agent_details.storage_handlers
        assert (await agent.health.version(health_pb2.CheckRequest())).agent_version

    run(body)
