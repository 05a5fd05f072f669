"""The network between a pod and its host, beside runc's: the same CNI plugin has set both namespaces up.

By HTTP: the host fetches a file of zeros from the container's httpd, which sends it without looking at it,
and the container fetches as many from the host. Seconds are from a request to the last byte. The round trip
is that of the host's pings, which the pod's kernel answers.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import struct
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bench_common import MIB, Progress, grouped_bars
from bench_ctr import RUNC, Bench
from bench_factory import NotMeasured, Ready
from private_containerd import RUNTIME, TEST_IMAGE, ContainerdError
from private_cri import CNI_DIRECTORIES, Network

FILE_MIB = 48
"""What fits into a container's /dev/shm: the zeros of a hole would be made while they are sent."""
PINGS = 100
TIMEOUT_S = 180.0
WAYS = {"template": ("clone", "tcfilter"), "runc": ("runc", "veth")}

_SERVE = f"head -c {FILE_MIB}m /dev/zero >/dev/shm/file && httpd -h /dev/shm"
_FETCH = "wget -q -O /dev/null http://{host}:{port}/"
_ECHO_REQUEST = 8
_ECHO_REPLY = 0

Result = dict[str, Any]


@dataclass(frozen=True)
class Namespace:
    """A pod's, with an eth0 on the bridge."""

    name: str
    address: str
    host: str

    @classmethod
    @contextlib.contextmanager
    def made(cls, name: str, network: Network) -> Iterator[Namespace]:
        """By CNI's bridge plugin. Raises NotMeasured."""
        subprocess.run(["ip", "netns", "add", name], check=True)
        try:
            plugins = json.loads(network.conflist)
            config = {"cniVersion": plugins["cniVersion"], "name": plugins["name"], **plugins["plugins"][0]}
            found = _cni("ADD", name, config)
            try:
                yield cls(name, found["ips"][0]["address"].partition("/")[0], f"{network.prefix}.1")
            finally:
                _cni("DEL", name, config)
        finally:
            subprocess.run(["ip", "netns", "delete", name], check=True)


def _cni(command: str, name: str, config: dict[str, Any]) -> Any:
    directory = next((path for path in CNI_DIRECTORIES if path.exists()), CNI_DIRECTORIES[0])
    environment = {
        **os.environ,
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": name,
        "CNI_NETNS": f"/run/netns/{name}",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": str(directory),
    }
    try:
        result = subprocess.run(
            [directory / config["type"]],
            env=environment,
            input=json.dumps(config),
            capture_output=True,
            text=True,
        )
    except OSError as error:
        raise NotMeasured(f"CNI: {error}") from error
    if result.returncode:
        raise NotMeasured(f"CNI {command}: {result.stdout.strip() or result.stderr.strip()}")
    return json.loads(result.stdout or "{}")


def measure(bench: Bench, runs: int, progress: Progress) -> Result:
    results: dict[str, Result] = {}
    network = bench.containerd.network
    network.create()
    try:
        for name in WAYS:
            progress.say(f"network: {name}")
            try:
                results[name] = _measure_way(bench, name, network, runs, progress)
            except (NotMeasured, ContainerdError, OSError, subprocess.SubprocessError) as error:
                results[name] = {"failure": str(error)}
    finally:
        network.delete()
    return {"ways": results}


def _measure_way(bench: Bench, name: str, network: Network, runs: int, progress: Progress) -> Result:
    container_id = bench.new_id()
    with contextlib.ExitStack() as stack:
        if name != "runc":
            ready = Ready(name, bench.directory)
            stack.enter_context(ready.set_up(bench.directory / f"{name}.log"))
            bench.configure(ready.settings)
        namespace = stack.enter_context(Namespace.made(container_id, network))
        stack.callback(bench.remove, container_id)
        bench.containerd.ctr(
            *("run", "-d", "--runtime", RUNC if name == "runc" else RUNTIME),
            *("--with-ns", f"network:/run/netns/{container_id}"),
            *(TEST_IMAGE, container_id, "sleep", "86400"),
            check=True,
            timeout_s=TIMEOUT_S,
        )
        _exec(bench, container_id, _SERVE)
        found: dict[str, list[float]] = {"sent_s": [], "received_s": []}
        for number in range(runs + 1):
            times = {
                "sent_s": _send(namespace.address),
                "received_s": _receive(bench, container_id, namespace.host),
            }
            if number:  # the first has the emulated processor's code translated
                for key, seconds in times.items():
                    found[key].append(seconds)
            speed = FILE_MIB / times["sent_s"]
            progress.say(f"network: {name} run {number} of {runs}: {speed:.0f} MiB/s out")
        round_trips = ping(namespace.address, PINGS)
    medians = {key: statistics.median(each) for key, each in found.items()}
    return {**medians, "ping_s": statistics.median(round_trips), "pings_s": round_trips}


def _exec(bench: Bench, container_id: str, script: str) -> None:
    bench.containerd.ctr(
        *("tasks", "exec", "--exec-id", f"e{os.urandom(4).hex()}", container_id, "sh", "-c", script),
        check=True,
        timeout_s=TIMEOUT_S,
    )


def _send(address: str) -> float:
    """Seconds of a file from the pod."""
    began = time.monotonic()
    with urllib.request.urlopen(f"http://{address}/file", timeout=TIMEOUT_S) as response:
        arrived = 0
        while data := response.read(1 << 20):
            arrived += len(data)
    if arrived != FILE_MIB * MIB:
        raise NotMeasured(f"{arrived} of {FILE_MIB * MIB} bytes arrived")
    return time.monotonic() - began


def _receive(bench: Bench, container_id: str, host: str) -> float:
    """Seconds of as much into the pod."""
    with socket.create_server((host, 0)) as server, ThreadPoolExecutor(1) as pool:
        server.settimeout(TIMEOUT_S)
        served = pool.submit(_serve_once, server)
        _exec(bench, container_id, _FETCH.format(host=host, port=server.getsockname()[1]))
        return served.result()


def _serve_once(server: socket.socket) -> float:
    connection, _ = server.accept()
    with connection:
        connection.settimeout(TIMEOUT_S)
        began = time.monotonic()
        request = b""
        while b"\r\n\r\n" not in request:
            request += connection.recv(4096)
        connection.sendall(f"HTTP/1.0 200 OK\r\nContent-Length: {FILE_MIB * MIB}\r\n\r\n".encode())
        for _ in range(FILE_MIB):
            connection.sendall(bytes(MIB))
        connection.shutdown(socket.SHUT_WR)
        # The other end closes when it has read all.
        connection.recv(1)
        return time.monotonic() - began


def ping(address: str, count: int) -> list[float]:
    """Seconds of each round trip. Raises NotMeasured when one is lost."""
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(5.0)
        identifier = os.getpid() & 0xFFFF
        for number in range(count):
            body = struct.pack("!BBHHH", _ECHO_REQUEST, 0, 0, identifier, number) + bytes(48)
            packet = body[:2] + struct.pack("!H", _checksum(body)) + body[4:]
            began = time.monotonic()
            sock.sendto(packet, (address, 0))
            try:
                while not _answers(sock.recv(1500), identifier, number):
                    pass
            except TimeoutError:
                raise NotMeasured(f"{address} does not answer a ping") from None
            times.append(time.monotonic() - began)
            time.sleep(0.01)
    return times


def _answers(packet: bytes, identifier: int, number: int) -> bool:
    header = (packet[0] & 0xF) * 4  # the IP header comes along
    kind, _, _, found, sequence = struct.unpack_from("!BBHHH", packet, header)
    return (kind, found, sequence) == (_ECHO_REPLY, identifier, number)


def _checksum(data: bytes) -> int:
    """RFC 1071's, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


# -- telling


def rows(result: Result) -> list[list[str]]:
    ways: dict[str, Result] = result["ways"]
    rows = [["network", *(WAYS[name][0] for name in ways)], ["", *(WAYS[name][1] for name in ways)]]
    for key, title in (("sent_s", "pod to host, TCP"), ("received_s", "host to pod, TCP")):
        cells = [f"{FILE_MIB / way[key]:.0f} MiB/s" if key in way else "" for way in ways.values()]
        rows.append([title, *cells])
    rows.append(
        ["round trip", *(f"{1e6 * way['ping_s']:.0f} us" if "ping_s" in way else "" for way in ways.values())]
    )
    return rows


def plot(result: Result, throughput: Any, latency: Any) -> None:
    """On two of matplotlib's axes."""
    ways = {name: way for name, way in result["ways"].items() if "failure" not in way}
    labels = [", ".join(WAYS[name]) for name in ways]
    series = {
        title: [FILE_MIB / way[key] for way in ways.values()]
        for key, title in (("sent_s", "pod to host"), ("received_s", "host to pod"))
    }
    grouped_bars(throughput, labels, series)
    throughput.set_ylabel("MiB/s")
    throughput.set_title("TCP between a pod and its host")
    if ways:
        throughput.margins(y=0.2)  # for the legend
        throughput.legend(fontsize="small")
        latency.set_yscale("log")
        latency.boxplot([[1e6 * one for one in way["pings_s"]] for way in ways.values()], showfliers=False)
    latency.set_xticks(range(1, len(ways) + 1), labels)
    latency.set_ylabel("microseconds")
    latency.set_title("round trip of a ping")
