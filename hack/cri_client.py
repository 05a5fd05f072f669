"""crictl's commands over the gRPC API of the Container Runtime Interface, where crictl itself cannot be had.

Run as `cri_client.py --runtime-endpoint unix://SOCKET COMMAND ...` in the development environment. Commands,
options and what is printed are crictl's, as far as they are there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cri_pb2 as cri
import cri_streaming
import grpc  # type: ignore[import-untyped]
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

_IMAGES = frozenset(("ListImages",))


class CriError(Exception):
    """What containerd refused, in its words."""


class Client:
    """The runtime and the image service behind one socket."""

    def __init__(self, endpoint: str, timeout_s: float) -> None:
        self._channel = grpc.insecure_channel(endpoint)
        self._timeout_s = timeout_s

    def call(self, method: str, request: Message, answer: type[M]) -> M:
        """Raises CriError."""
        service = "ImageService" if method in _IMAGES else "RuntimeService"
        call = self._channel.unary_unary(
            f"/runtime.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        try:
            found: M = call(request, timeout=self._timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            code = "".join(part.capitalize() for part in error.code().name.split("_"))  # as Go has them
            raise CriError(f"rpc error: code = {code} desc = {error.details()}") from None
        return found

    # Ids may be shortened, as everywhere in crictl.

    def container_id(self, prefix: str) -> str:
        answer = self.call("ListContainers", cri.ListContainersRequest(), cri.ListContainersResponse)
        return _only("container", prefix, [container.id for container in answer.containers])

    def pod_id(self, prefix: str) -> str:
        answer = self.call("ListPodSandbox", cri.ListPodSandboxRequest(), cri.ListPodSandboxResponse)
        return _only("pod", prefix, [pod.id for pod in answer.items])


def _only(what: str, prefix: str, ids: list[str]) -> str:
    found = [each for each in ids if each.startswith(prefix)]
    if prefix in found:
        return prefix
    if len(found) > 1:
        raise CriError(f"{what} id {prefix}: found {len(found)} of them, expected one")
    # An unknown one is containerd's to refuse.
    return found[0] if found else prefix


def _load(path: str, message: M) -> M:
    """A pod's or a container's configuration, as crictl's own JSON files."""
    text = sys.stdin.read() if path == "-" else Path(path).read_text()
    return ParseDict(json.loads(text), message)


def _json(message: Message) -> Any:
    return MessageToDict(message, always_print_fields_with_no_presence=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _with_info(status: Message, info: Any) -> Any:
    """containerd's verbose part is JSON in a string."""
    parts = {key: json.loads(text) for key, text in info.items()}
    return {"info": parts.get("info", parts), "status": _json(status)}


def version(client: Client, args: argparse.Namespace) -> int:
    found = client.call("Version", cri.VersionRequest(version="v1"), cri.VersionResponse)
    print(f"Version:  {found.version}\nRuntimeName:  {found.runtime_name}")
    print(f"RuntimeVersion:  {found.runtime_version}\nRuntimeApiVersion:  {found.runtime_api_version}")
    return 0


def info(client: Client, args: argparse.Namespace) -> int:
    found = client.call("Status", cri.StatusRequest(verbose=True), cri.StatusResponse)
    parts = {}
    for key, text in found.info.items():
        try:
            parts[key] = json.loads(text)
        except ValueError:
            parts[key] = text
    _print_json({"status": _json(found.status), **parts})
    return 0


def runp(client: Client, args: argparse.Namespace) -> int:
    request = cri.RunPodSandboxRequest(
        config=_load(args.pod_config, cri.PodSandboxConfig()), runtime_handler=args.runtime
    )
    print(client.call("RunPodSandbox", request, cri.RunPodSandboxResponse).pod_sandbox_id)
    return 0


def stopp(client: Client, args: argparse.Namespace) -> int:
    for pod in map(client.pod_id, args.ids):
        client.call(
            "StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=pod), cri.StopPodSandboxResponse
        )
        print(f"Stopped sandbox {pod}")
    return 0


def rmp(client: Client, args: argparse.Namespace) -> int:
    for pod in map(client.pod_id, args.ids):
        if args.force:
            client.call(
                "StopPodSandbox", cri.StopPodSandboxRequest(pod_sandbox_id=pod), cri.StopPodSandboxResponse
            )
        elif _pod_status(client, pod).status.state == cri.SANDBOX_READY:
            raise CriError(f"sandbox {pod} is running, please stop it first")
        client.call(
            "RemovePodSandbox", cri.RemovePodSandboxRequest(pod_sandbox_id=pod), cri.RemovePodSandboxResponse
        )
        print(f"Removed sandbox {pod}")
    return 0


def inspectp(client: Client, args: argparse.Namespace) -> int:
    for pod in map(client.pod_id, args.ids):
        found = _pod_status(client, pod)
        _print_json(_with_info(found.status, found.info))
    return 0


def _pod_status(client: Client, pod: str) -> cri.PodSandboxStatusResponse:
    request = cri.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    return client.call("PodSandboxStatus", request, cri.PodSandboxStatusResponse)


def pods(client: Client, args: argparse.Namespace) -> int:
    found = client.call("ListPodSandbox", cri.ListPodSandboxRequest(), cri.ListPodSandboxResponse)
    if args.output == "json":
        _print_json(_json(found))
    elif args.quiet:
        print(*(pod.id for pod in found.items), sep="\n", end="\n" if found.items else "")
    else:
        rows = [
            (
                pod.id[:13],
                _age(pod.created_at),
                cri.PodSandboxState.Name(pod.state).removeprefix("SANDBOX_").capitalize(),
                pod.metadata.name,
                pod.metadata.namespace,
                str(pod.metadata.attempt),
                pod.runtime_handler or "(default)",
            )
            for pod in found.items
        ]
        _table(("POD ID", "CREATED", "STATE", "NAME", "NAMESPACE", "ATTEMPT", "RUNTIME"), rows)
    return 0


def create(client: Client, args: argparse.Namespace) -> int:
    request = cri.CreateContainerRequest(
        pod_sandbox_id=client.pod_id(args.pod),
        config=_load(args.container_config, cri.ContainerConfig()),
        sandbox_config=_load(args.pod_config, cri.PodSandboxConfig()),
    )
    print(client.call("CreateContainer", request, cri.CreateContainerResponse).container_id)
    return 0


def start(client: Client, args: argparse.Namespace) -> int:
    for container in map(client.container_id, args.ids):
        request = cri.StartContainerRequest(container_id=container)
        client.call("StartContainer", request, cri.StartContainerResponse)
        print(container)
    return 0


def stop(client: Client, args: argparse.Namespace) -> int:
    for container in map(client.container_id, args.ids):
        request = cri.StopContainerRequest(container_id=container, timeout=args.timeout)
        client.call("StopContainer", request, cri.StopContainerResponse)
        print(container)
    return 0


def rm(client: Client, args: argparse.Namespace) -> int:
    for container in map(client.container_id, args.ids):
        if args.force:
            request = cri.StopContainerRequest(container_id=container)
            client.call("StopContainer", request, cri.StopContainerResponse)
        elif _container_status(client, container).status.state == cri.CONTAINER_RUNNING:
            raise CriError(f"container {container} is running, please stop it first")
        client.call(
            "RemoveContainer",
            cri.RemoveContainerRequest(container_id=container),
            cri.RemoveContainerResponse,
        )
        print(container)
    return 0


def inspect(client: Client, args: argparse.Namespace) -> int:
    for container in map(client.container_id, args.ids):
        found = _container_status(client, container)
        _print_json(_with_info(found.status, found.info))
    return 0


def _container_status(client: Client, container: str) -> cri.ContainerStatusResponse:
    request = cri.ContainerStatusRequest(container_id=container, verbose=True)
    return client.call("ContainerStatus", request, cri.ContainerStatusResponse)


def ps(client: Client, args: argparse.Namespace) -> int:
    request = cri.ListContainersRequest(
        filter=cri.ContainerFilter(pod_sandbox_id=client.pod_id(args.pod) if args.pod else "")
    )
    found = client.call("ListContainers", request, cri.ListContainersResponse)
    shown = [each for each in found.containers if args.all or each.state == cri.CONTAINER_RUNNING]
    if args.output == "json":
        _print_json({"containers": [_json(each) for each in shown]})
    elif args.quiet:
        print(*(each.id for each in shown), sep="\n", end="\n" if shown else "")
    else:
        rows = [
            (
                each.id[:13],
                each.image.image,
                _age(each.created_at),
                cri.ContainerState.Name(each.state).removeprefix("CONTAINER_").capitalize(),
                each.metadata.name,
                str(each.metadata.attempt),
                each.pod_sandbox_id[:13],
            )
            for each in shown
        ]
        _table(("CONTAINER", "IMAGE", "CREATED", "STATE", "NAME", "ATTEMPT", "POD ID"), rows)
    return 0


def exec_(client: Client, args: argparse.Namespace) -> int:
    container = client.container_id(args.container)
    if args.sync:
        request = cri.ExecSyncRequest(container_id=container, cmd=args.command_line, timeout=args.timeout)
        found = client.call("ExecSync", request, cri.ExecSyncResponse)
        if found.exit_code:
            said = found.stderr.decode(errors="replace")
            command = " ".join(args.command_line)
            raise CriError(f"command '{command}' exited with {found.exit_code}: {said}")
        sys.stdout.buffer.write(found.stdout + b"\n" + found.stderr + b"\n")
        return 0
    answer = client.call(
        "Exec",
        cri.ExecRequest(
            container_id=container,
            cmd=args.command_line,
            tty=args.tty,
            stdin=args.interactive,
            stdout=True,
            stderr=not args.tty,
        ),
        cri.ExecResponse,
    )
    if status := cri_streaming.run(answer.url, stdin=args.interactive, tty=args.tty):
        raise CriError(f"command terminated with exit code {status}")
    return 0


def attach(client: Client, args: argparse.Namespace) -> int:
    request = cri.AttachRequest(
        container_id=client.container_id(args.container),
        tty=args.tty,
        stdin=args.stdin,
        stdout=True,
        stderr=not args.tty,
    )
    answer = client.call("Attach", request, cri.AttachResponse)
    return cri_streaming.run(answer.url, stdin=args.stdin, tty=args.tty)


def port_forward(client: Client, args: argparse.Namespace) -> int:
    ports = {}
    for text in args.ports:
        local, has_remote, remote = text.rpartition(":")
        ports[int(remote)] = int(local) if has_remote and local else 0 if has_remote else int(remote)
    request = cri.PortForwardRequest(pod_sandbox_id=client.pod_id(args.pod))
    answer = client.call("PortForward", request, cri.PortForwardResponse)
    cri_streaming.forward(answer.url, ports)
    return 0


def logs(client: Client, args: argparse.Namespace) -> int:
    """From the file, whose lines are "TIME STREAM F|P TEXT" (P: the line goes on)."""
    container = client.container_id(args.container)
    path = Path(_container_status(client, container).status.log_path)
    with path.open("rb") as file:
        lines = file.readlines()
        for line in lines[len(lines) - args.tail if 0 <= args.tail < len(lines) else 0 :]:
            _show_log(line)
        has_ended = False
        while args.follow:
            if line := file.readline():
                _show_log(line)
            elif has_ended:
                break
            else:
                # What it has written until then is still to be read.
                has_ended = _container_status(client, container).status.state == cri.CONTAINER_EXITED
                time.sleep(0 if has_ended else 0.2)
    return 0


def _show_log(line: bytes) -> None:
    _, stream, tag, text = line.split(b" ", 3)
    out = sys.stderr if stream == b"stderr" else sys.stdout
    out.buffer.write(text if tag.startswith(b"F") else text.removesuffix(b"\n"))
    out.flush()


def update(client: Client, args: argparse.Namespace) -> int:
    for container in map(client.container_id, args.ids):
        request = cri.UpdateContainerResourcesRequest(
            container_id=container,
            linux=cri.LinuxContainerResources(
                cpu_period=args.cpu_period,
                cpu_quota=args.cpu_quota,
                cpu_shares=args.cpu_share,
                memory_limit_in_bytes=args.memory,
                cpuset_cpus=args.cpuset_cpus,
                cpuset_mems=args.cpuset_mems,
            ),
        )
        client.call("UpdateContainerResources", request, cri.UpdateContainerResourcesResponse)
        print(container)
    return 0


def stats(client: Client, args: argparse.Namespace) -> int:
    request = cri.ListContainerStatsRequest(
        filter=cri.ContainerStatsFilter(
            id=client.container_id(wanted) if (wanted := args.id or args.only) else "",
            pod_sandbox_id=client.pod_id(args.pod) if args.pod else "",
        )
    )
    found = client.call("ListContainerStats", request, cri.ListContainerStatsResponse)
    if args.output == "json":
        _print_json(_json(found))
    else:
        _table(
            ("CONTAINER", "NAME", "CPU", "MEM"),
            [
                (each.attributes.id[:13], each.attributes.metadata.name, *_usage(each.cpu, each.memory))
                for each in found.stats
            ],
        )
    return 0


def statsp(client: Client, args: argparse.Namespace) -> int:
    wanted = args.id or args.only
    request = cri.ListPodSandboxStatsRequest(
        filter=cri.PodSandboxStatsFilter(id=client.pod_id(wanted) if wanted else "")
    )
    found = client.call("ListPodSandboxStats", request, cri.ListPodSandboxStatsResponse)
    if args.output == "json":
        _print_json(_json(found))
    else:
        _table(
            ("POD", "NAME", "CPU", "MEM"),
            [
                (
                    each.attributes.id[:13],
                    each.attributes.metadata.name,
                    *_usage(each.linux.cpu, each.linux.memory),
                )
                for each in found.stats
            ],
        )
    return 0


def _usage(cpu: cri.CpuUsage, memory: cri.MemoryUsage) -> tuple[str, str]:
    seconds = cpu.usage_core_nano_seconds.value / 1e9
    return f"{seconds:.2f}s", f"{memory.working_set_bytes.value / (1 << 20):.1f}MiB"


def images(client: Client, args: argparse.Namespace) -> int:
    found = client.call("ListImages", cri.ListImagesRequest(), cri.ListImagesResponse)
    if args.output == "json":
        _print_json(_json(found))
    elif args.quiet:
        print(*(image.id for image in found.images), sep="\n")
    else:
        rows = [
            (*tag.rsplit(":", 1), image.id.removeprefix("sha256:")[:13], f"{image.size / 1e6:.1f}MB")
            for image in found.images
            for tag in image.repo_tags or ["<none>:<none>"]
        ]
        _table(("IMAGE", "TAG", "IMAGE ID", "SIZE"), rows)
    return 0


def _age(created_ns: int) -> str:
    seconds = int(time.time() - created_ns / 1e9)
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} seconds ago"


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[n]) for row in (titles, *rows)) for n in range(len(titles))]
    for row in (titles, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="crictl", description="Client of the Container Runtime Interface.")
    parser.add_argument("--runtime-endpoint", "-r", required=True)
    for ignored in ("--config", "--image-endpoint"):
        parser.add_argument(ignored, f"-{ignored[2]}", help="accepted: --runtime-endpoint says it all")
    parser.add_argument(
        "--timeout", "-t", dest="rpc_timeout_s", type=lambda text: float(text.removesuffix("s")), default=180
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, act: Callable[[Client, argparse.Namespace], int], help: str, ids: str = "") -> Any:
        added = commands.add_parser(name, help=help)
        added.set_defaults(act=act)
        if ids:
            added.add_argument("ids", nargs="+", metavar=ids)
        return added

    command("version", version, "versions of the runtime")
    command("info", info, "state and configuration of the runtime")
    sub = command("runp", runp, "run a pod")
    sub.add_argument("--runtime", "-r", default="")
    sub.add_argument("pod_config")
    command("stopp", stopp, "stop pods", "POD")
    sub = command("rmp", rmp, "remove pods", "POD")
    sub.add_argument("--force", "-f", action="store_true")
    command("inspectp", inspectp, "state of pods", "POD")
    sub = command("create", create, "create a container")
    sub.add_argument("pod")
    sub.add_argument("container_config")
    sub.add_argument("pod_config")
    command("start", start, "start containers", "CONTAINER")
    sub = command("stop", stop, "stop containers", "CONTAINER")
    sub.add_argument("--timeout", "-t", type=int, default=0)
    sub = command("rm", rm, "remove containers", "CONTAINER")
    sub.add_argument("--force", "-f", action="store_true")
    command("inspect", inspect, "state of containers", "CONTAINER")
    sub = command("exec", exec_, "run a command in a container")
    sub.add_argument("--sync", "-s", action="store_true")
    sub.add_argument("--timeout", type=int, default=0)
    sub.add_argument("--interactive", "-i", action="store_true")
    sub.add_argument("--tty", "-t", action="store_true")
    sub.add_argument("container")
    sub.add_argument("command_line", nargs=argparse.REMAINDER, metavar="COMMAND...")
    sub = command("attach", attach, "join a container's streams")
    sub.add_argument("--stdin", "-i", action="store_true")
    sub.add_argument("--tty", "-t", action="store_true")
    sub.add_argument("container")
    sub = command("port-forward", port_forward, "forward local ports to a pod, until interrupted")
    sub.add_argument("pod")
    sub.add_argument("ports", nargs="+", metavar="[LOCAL]:REMOTE", help="without LOCAL: any free port")
    sub = command("logs", logs, "what a container has said")
    sub.add_argument("--follow", "-f", action="store_true")
    sub.add_argument("--tail", type=int, default=-1)
    sub.add_argument("container")
    sub = command("update", update, "change the limits of containers", "CONTAINER")
    for option in ("--cpu-period", "--cpu-quota", "--cpu-share", "--memory"):
        sub.add_argument(option, type=int, default=0)
    for option in ("--cpuset-cpus", "--cpuset-mems"):
        sub.add_argument(option, default="")
    sub = command("stats", stats, "what containers use")
    sub.add_argument("only", nargs="?", default="", metavar="CONTAINER")
    sub.add_argument("--id", default="")
    sub.add_argument("--pod", "-p", default="")
    sub.add_argument("--output", "-o", choices=("json", "table"), default="table")
    sub = command("statsp", statsp, "what pods use")
    sub.add_argument("only", nargs="?", default="", metavar="POD")
    sub.add_argument("--id", default="")
    sub.add_argument("--output", "-o", choices=("json", "table"), default="table")
    for name, act, what in (("ps", ps, "containers"), ("pods", pods, "pods"), ("images", images, "images")):
        sub = command(name, act, f"list {what}")
        sub.add_argument("--quiet", "-q", action="store_true")
        sub.add_argument("--output", "-o", choices=("json", "table"), default="table")
        if name == "ps":
            sub.add_argument("--all", "-a", action="store_true")
            sub.add_argument("--pod", "-p", default="")
    return parser


def main() -> int:
    args = _parser().parse_args()
    try:
        found: int = args.act(Client(args.runtime_endpoint, args.rpc_timeout_s), args)
        sys.stdout.flush()
        return found
    except KeyboardInterrupt:
        return 130
    except (CriError, cri_streaming.StreamingError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
