"""`start` and `delete` as processes, and the shim that `start` leaves behind."""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from processes import wait_gone

from katautils.oci import CONTAINER_TYPE_ANNOTATIONS, SANDBOX_ID_ANNOTATIONS
from shim.main import NAME, Flags
from shim.protocols import task_v2_pb2 as api
from shim.protocols.bootstrap_pb2 import BootstrapParams, BootstrapResult, LogLevel
from shim.protocols.runtimeoptions_pb2 import Options
from shim.protocols.types_pb2 import RuntimeInfo
from shim.start import _POD_KEYS, Bootstrap, socket_path
from ttrpc import Client

TIMEOUT_S = 120
NAMESPACE = "k8s.io"
FLAGS = ("-namespace", NAMESPACE, "-address", "/run/c.sock", "-publish-binary", "/usr/bin/containerd")
LAUNCHER = f"import sys; sys.path += {sys.path!r}\nfrom shim.main import main; sys.exit(main())\n"


class Containerd:
    """What containerd does to make shims: bundles, and calls of the binary in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.sockets = directory / "s"
        # Under its name: a shim is known by it.
        self.launcher = directory / NAME
        self.launcher.write_text(LAUNCHER)

    def bundle(self, container_id: str, annotations: dict[str, str] | None = None) -> Path:
        path = self.directory / container_id
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({"annotations": annotations or {}}))
        return path

    def call(
        self, container_id: str, *arguments: str, input: bytes = b"", **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Returns when stdout and stderr have ended, as containerd does."""
        return subprocess.run(
            [sys.executable, "-IS", self.launcher, *FLAGS, "-id", container_id, *arguments],
            cwd=self.directory / container_id,
            env={key: value for key, value in os.environ.items() if key != "MAX_SHIM_VERSION"} | environment,
            input=input,
            capture_output=True,
            timeout=TIMEOUT_S,
        )

    def start(self, container_id: str, **params: Any) -> str:
        """With containerd 2.3's message, for it can name a directory for the socket; returns its path."""
        message = BootstrapParams(
            instance_id=container_id, namespace=NAMESPACE, socket_dir=str(self.sockets), **params
        )
        result = self.call(container_id, "start", input=message.SerializeToString())
        assert result.returncode == 0, result.stderr
        answer = BootstrapResult.FromString(result.stdout)
        assert (answer.version, answer.protocol) == (3, "ttrpc")
        return answer.address.removeprefix("unix://")

    def pid(self, container_id: str) -> int:
        return int((self.directory / container_id / "shim.pid").read_text())

    def kill(self, container_id: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(container_id), number)
        self.wait_end(container_id)

    def wait_end(self, container_id: str) -> None:
        wait_gone([self.pid(container_id)])


@pytest.fixture
def containerd() -> Iterator[Containerd]:
    # A socket's path is short, pytest's own directories are not.
    directory = Path(tempfile.mkdtemp(prefix="shim"))
    containerd = Containerd(directory)
    try:
        yield containerd
        for path in directory.glob("*/shim.pid"):
            with contextlib.suppress(OSError):  # it has ended
                if NAMESPACE.encode() in Path(f"/proc/{path.read_text()}/cmdline").read_bytes():
                    containerd.kill(path.parent.name)
    finally:
        shutil.rmtree(directory)


def ask(path: str, *requests: Any) -> list[Any]:
    """The answers of a shim."""

    async def main() -> list[Any]:
        async with asyncio.timeout(TIMEOUT_S):
            client = await Client.connect(path)
            task: Any = client.service(api.DESCRIPTOR.services_by_name["Task"])
            methods = {api.ConnectRequest: task.connect, api.ShutdownRequest: task.shutdown}
            answers = [await methods[type(request)](request) for request in requests]
            await client.close()
            return answers

    return asyncio.run(main())


def test_the_life_of_a_shim(containerd: Containerd) -> None:
    bundle = containerd.bundle("c1")
    path = containerd.start("c1")
    assert (bundle / "address").read_text() == f"unix://{path}"
    assert Path(path).stat().st_mode & 0o777 == 0o600
    assert Path(path).parent.stat().st_mode & 0o777 == 0o700
    (connected,) = ask(path, api.ConnectRequest(id="c1"))
    assert (connected.shim_pid, connected.task_pid) == (containerd.pid("c1"), 0)
    assert os.getsid(connected.shim_pid) == connected.shim_pid
    ask(path, api.ShutdownRequest(id="c1"))
    assert not Path(path).exists()
    containerd.wait_end("c1")


def test_a_repeated_start_finds_the_shim_and_a_dead_one_is_replaced(containerd: Containerd) -> None:
    containerd.bundle("c1")
    path = containerd.start("c1")
    pid = containerd.pid("c1")
    assert containerd.start("c1") == path
    assert containerd.pid("c1") == pid
    containerd.kill("c1")
    assert Path(path).exists()
    assert containerd.start("c1") == path
    assert ask(path, api.ConnectRequest())[0].shim_pid == containerd.pid("c1") != pid


def test_the_shim_keeps_nothing_open_of_who_called_start(containerd: Containerd) -> None:
    reading, writing = os.pipe()
    containerd.bundle("pod")
    message = BootstrapParams(instance_id="pod", namespace=NAMESPACE, socket_dir=str(containerd.sockets))
    subprocess.run(
        [sys.executable, "-IS", containerd.launcher, *FLAGS, "-id", "pod", "start"],
        cwd=containerd.directory / "pod",
        input=message.SerializeToString(),
        stdout=subprocess.DEVNULL,
        pass_fds=[writing],
        timeout=TIMEOUT_S,
        check=True,
    )
    os.close(writing)
    os.set_blocking(reading, False)
    # The end comes as soon as the child has closed it: it may not have been there yet.
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            assert os.read(reading, 1) == b""
            break
        except BlockingIOError:
            assert time.monotonic() < deadline, "the shim holds the pipe"
            time.sleep(0.01)
    os.close(reading)


@pytest.mark.parametrize("keys", _POD_KEYS)
def test_one_shim_serves_a_pod(containerd: Containerd, keys: tuple[str, str, str]) -> None:
    type_key, _, sandbox_key = keys
    sandbox_type = "podsandbox" if "docker" in type_key else "sandbox"
    containerd.bundle("pod", {type_key: sandbox_type, sandbox_key: "pod"})
    member = containerd.bundle("member", {type_key: "container", sandbox_key: "pod"})
    path = containerd.start("pod")
    assert containerd.start("member") == path
    assert (member / "address").read_text() == f"unix://{path}"
    assert not (member / "shim.pid").exists()
    containerd.kill("pod")
    result = containerd.call(
        "member",
        "start",
        input=BootstrapParams(
            instance_id="member", namespace=NAMESPACE, socket_dir=str(containerd.sockets)
        ).SerializeToString(),
    )
    assert result.returncode == 1
    assert b"sandbox pod has no shim" in result.stderr


def test_pods_are_known_by_the_annotations_that_katautils_knows() -> None:
    assert tuple(key for key, _, _ in _POD_KEYS) == CONTAINER_TYPE_ANNOTATIONS
    assert tuple(key for _, _, key in _POD_KEYS) == SANDBOX_ID_ANNOTATIONS


def test_a_signal_ends_the_shim_and_its_socket(containerd: Containerd) -> None:
    containerd.bundle("c1")
    path = containerd.start("c1")
    ask(path, api.ConnectRequest())
    containerd.kill("c1", signal.SIGTERM)
    assert not Path(path).exists()


def test_the_log_goes_to_containerds_fifo_and_is_not_missed(containerd: Containerd) -> None:
    bundle = containerd.bundle("c1")
    os.mkfifo(bundle / "log")
    reader = os.open(bundle / "log", os.O_RDONLY | os.O_NONBLOCK)
    path = containerd.start("c1", log_level=LogLevel.LOG_LEVEL_DEBUG)
    ask(path, api.ConnectRequest())
    assert b"serving c1" in os.read(reader, 65536)
    os.close(reader)
    ask(path, api.ConnectRequest(), api.ShutdownRequest())
    containerd.wait_end("c1")


def result_of(containerd_version: str, stdin: bytes = b"") -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAX_SHIM_VERSION", containerd_version)
        flags = Flags()
        flags.id, flags.namespace = "c1", NAMESPACE
        return Bootstrap(flags, stdin).result("unix:///s")


def test_every_containerd_gets_the_answer_it_reads() -> None:
    options = AnyMessage(
        type_url="runtimeoptions.v1.Options", value=Options(config_path="/x").SerializeToString()
    )
    # 1.6 says nothing, 1.7 and 2.0 to 2.2 say 2; what they send on stdin are the runtime's options.
    for stdin in (b"", options.SerializeToString()):
        assert result_of("", stdin) == b"unix:///s"
        assert json.loads(result_of("2", stdin)) == {
            "version": 2,
            "address": "unix:///s",
            "protocol": "ttrpc",
        }
        assert json.loads(result_of("3", stdin))["version"] == 3
    params = BootstrapParams(instance_id="c1", namespace=NAMESPACE).SerializeToString()
    result = BootstrapResult.FromString(result_of("2", params))
    assert result == BootstrapResult(version=3, address="unix:///s", protocol="ttrpc")
    stranger = BootstrapParams(instance_id="c2", namespace=NAMESPACE).SerializeToString()
    assert result_of("", stranger) == b"unix:///s"


def test_what_containerd_2_3_says_on_stdin_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTRPC_ADDRESS", "/old.ttrpc")
    monkeypatch.setenv("GRPC_ADDRESS", "/old")
    flags = Flags()
    flags.id, flags.namespace, flags.address = "c1", NAMESPACE, "/old"
    params = BootstrapParams(
        instance_id="c1",
        namespace=NAMESPACE,
        log_level=LogLevel.LOG_LEVEL_TRACE,
        containerd_ttrpc_address="/new.ttrpc",
        containerd_grpc_address="/new",
        containerd_binary="/usr/bin/new",
        socket_dir="/run/sockets",
    )
    bootstrap = Bootstrap(flags, params.SerializeToString())
    assert (bootstrap.address, bootstrap.socket_directory) == ("/new", "/run/sockets")
    assert (flags.debug, flags.publish_binary) == (True, "/usr/bin/new")
    assert (os.environ["TTRPC_ADDRESS"], os.environ["GRPC_ADDRESS"]) == ("/new.ttrpc", "/new")


def test_the_sockets_name_is_containerds_own_rule() -> None:
    flags = Flags()
    flags.id, flags.namespace, flags.address = "c1", "default", "/run/containerd/containerd.sock"
    digest = hashlib.sha256(b"/run/containerd/containerd.sock/default/c1").hexdigest()
    assert socket_path(Bootstrap(flags, b""), "default", "c1") == f"/run/containerd/s/{digest}"


def test_a_bundle_without_a_spec_is_an_error(containerd: Containerd) -> None:
    bundle = containerd.bundle("c1")
    for content in (None, '{"annotations": {"io.kubernetes.cri.sandbox-id"'):
        (bundle / "config.json").unlink()
        if content:
            (bundle / "config.json").write_text(content)
        result = containerd.call("c1", "start")
        assert result.returncode == 1
        assert b"config.json" in result.stderr
        assert b"Traceback" not in result.stderr
        (bundle / "config.json").touch()


def test_a_path_that_is_too_long_for_a_socket_is_an_error(containerd: Containerd) -> None:
    containerd.bundle("c1")
    containerd.sockets = containerd.directory / ("d" * 50)
    message = BootstrapParams(instance_id="c1", namespace=NAMESPACE, socket_dir=str(containerd.sockets))
    result = containerd.call("c1", "start", input=message.SerializeToString())
    assert result.returncode == 1
    assert b"longer than the 106 bytes" in result.stderr


def test_delete_with_nothing_left_answers_that_it_was_killed(containerd: Containerd) -> None:
    bundle = containerd.bundle("c1")
    containerd.start("c1")
    containerd.kill("c1")
    path = Path((bundle / "address").read_text().removeprefix("unix://"))
    assert path.exists()
    result = containerd.call("c1", "-bundle", str(bundle), "delete")
    assert (result.returncode, result.stderr) == (0, b"")
    response = api.DeleteResponse.FromString(result.stdout)
    assert response.exit_status == 137
    assert abs(response.exited_at.ToSeconds() - time.time()) < 60
    assert not path.exists()


@pytest.mark.parametrize("hangs", [False, True])
def test_delete_ends_a_shim_that_containerd_has_given_up(
    containerd: Containerd, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    bundle = containerd.bundle("c1")
    path = containerd.start("c1")
    ask(path, api.ConnectRequest())
    if hangs:
        os.kill(containerd.pid("c1"), signal.SIGSTOP)
    assert containerd.call("c1", "-bundle", str(bundle), "delete").returncode == 0
    containerd.wait_end("c1")


def test_delete_of_one_container_leaves_the_pods_shim_alone(containerd: Containerd) -> None:
    annotations = {"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"}
    containerd.bundle("pod", annotations | {"io.kubernetes.cri.container-type": "sandbox"})
    bundle = containerd.bundle("member", annotations)
    path = containerd.start("pod")
    containerd.start("member")
    assert containerd.call("member", "-bundle", str(bundle), "delete").returncode == 0
    assert ask(path, api.ConnectRequest())[0].shim_pid == containerd.pid("pod")


def test_delete_of_a_bundle_that_was_never_whole(containerd: Containerd) -> None:
    bundle = containerd.bundle("c1")
    (bundle / "config.json").unlink()
    result = containerd.call("c1", "delete")
    assert result.returncode == 0
    assert api.DeleteResponse.FromString(result.stdout).exit_status == 137


def test_start_and_an_empty_delete_import_next_to_nothing(containerd: Containerd) -> None:
    containerd.bundle("c1")
    for action in ("start", "delete"):
        message = BootstrapParams(instance_id="c1", namespace=NAMESPACE, socket_dir=str(containerd.sockets))
        result = subprocess.run(
            [sys.executable, "-IS", "-X", "importtime", containerd.launcher, *FLAGS, "-id", "c1", action],
            cwd=containerd.directory / "c1",
            input=message.SerializeToString(),
            capture_output=True,
            timeout=TIMEOUT_S,
        )
        assert result.returncode == 0
        imported = {line.rpartition(b"|")[2].strip().decode() for line in result.stderr.splitlines()}
        expensive = {"re", "json", "socket", "enum", "typing", "pathlib", "logging", "asyncio", "google"}
        assert "shim.start" in imported
        assert not imported & expensive


def test_version_and_info(containerd: Containerd) -> None:
    containerd.bundle("c1")
    for flag in ("-v", "--version"):
        assert containerd.call("c1", flag).stdout.startswith(b"containerd-shim-kata-py-v2:\n  Version:  0")
    options = AnyMessage(type_url="runtimeoptions.v1.Options", value=b"x")
    result = containerd.call("c1", "-info", input=options.SerializeToString())
    info = RuntimeInfo.FromString(result.stdout)
    assert (info.name, info.version.version, info.options) == ("containerd-shim-kata-py-v2", "0.1.0", options)


def test_a_name_that_is_a_path_is_refused(containerd: Containerd) -> None:
    containerd.bundle("c1")
    for name in ("", "..", "a/b"):
        result = containerd.call("c1", "-id", name, "start")
        assert result.returncode == 1
        assert b"expected a name" in result.stderr
