"""Port-forward to what listens in a pod's machine, by crictl and as containerd does it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from cri import Crictl, Pod
from harness import TIMEOUT_S, wait_for

BODY = os.urandom(1 << 20) * 5

# Also on loopback alone, which is how many databases listen.
SERVE = """
dd if=/dev/zero of=/tmp/zeros bs=1M count=5 2>/dev/null
echo found >/tmp/page
busybox httpd -p 127.0.0.1:8080 -h /tmp
busybox httpd -p [::1]:8081 -h /tmp
busybox nc -ll -p 7000 -e cat &
busybox nc -ll -p 7001 -e md5sum &
until [ "$(netstat -ltn | grep -c ":700[01] ")" = 2 ]; do :; done
echo ready
sleep 100000
"""

# In the pod's network namespace: what comes in goes to the port, until both have ended.
CONNECT = """
import socket, sys, threading
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=600)
data = sys.stdin.buffer.read()
def send():
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
threading.Thread(target=send).start()
while piece := sock.recv(1 << 16):
    sys.stdout.buffer.write(piece)
"""


def serving_pod(stack: contextlib.ExitStack, crictl: Crictl) -> Pod:
    pod = stack.enter_context(crictl.pod("port-forward"))
    container = pod.start("server", "sh", "-c", SERVE)
    wait_for("its servers", lambda: "ready" in crictl("logs", container).stdout)
    return pod


@pytest.fixture(scope="module")
def pod(crictl: Crictl) -> Iterator[Pod]:
    with contextlib.ExitStack() as stack:
        yield serving_pod(stack, crictl)


@contextlib.contextmanager
def forwarded(pod: Pod, *ports: int) -> Iterator[list[int]]:
    """`crictl port-forward`, with any free ports of ours, which are yielded."""
    command = pod.crictl.containerd.crictl_command("port-forward", pod.id, *(f":{port}" for port in ports))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ours: dict[int, int] = {}
        while len(ours) < len(ports):
            line = process.stdout.readline()
            found = re.fullmatch(r"Forwarding from (127\.0\.0\.1|\[::1\]):(\d+) -> (\d+)\n", line)
            assert found, line
            if found[1] != "[::1]":  # which crictl itself has as well
                ours[int(found[3])] = int(found[2])
        yield [ours[port] for port in ports]
    finally:
        process.terminate()
        process.communicate(timeout=TIMEOUT_S)


def get(port: int, path: str) -> bytes:
    """By HTTP/1.0; b"" when the connection ends without an answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        data = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            while piece := connection.recv(1 << 16):
                data += piece
    return data.partition(b"\r\n\r\n")[2]


def connect_inside(pod: Pod, address: str, port: int, data: bytes) -> subprocess.CompletedProcess[bytes]:
    namespaces = pod.crictl.inspectp(pod.id)["info"]["runtimeSpec"]["linux"]["namespaces"]
    path = next(each["path"] for each in namespaces if each["type"] == "network")
    command = ["nsenter", f"--net={path}", sys.executable, "-c", CONNECT, address, str(port)]
    return subprocess.run(command, input=data, capture_output=True, timeout=TIMEOUT_S)


def test_crictl_reaches_what_listens_on_loopback_alone(pod: Pod) -> None:
    with forwarded(pod, 8080, 8081) as (ipv4, ipv6):
        assert get(ipv4, "/page") == b"found\n"
        assert get(ipv6, "/page") == b"found\n"
        with ThreadPoolExecutor(8) as pool:
            bodies = list(pool.map(lambda _: get(ipv4, "/zeros"), range(8)))
        assert [(len(body), set(body)) for body in bodies] == [(5 << 20, {0})] * 8


def test_a_port_where_nobody_listens_closes_the_connection(pod: Pod) -> None:
    # crictl itself gives up then; containerd and the pod do not.
    with forwarded(pod, 9) as (nobody,):
        assert get(nobody, "/page") == b""
    with forwarded(pod, 8080) as (somebody,):
        assert get(somebody, "/page") == b"found\n"
    reason = "port-forward to port 9: unavailable: nobody listens on port 9 in the pod (127.0.0.1: "
    log = pod.crictl.containerd.log
    wait_for("the reason in the log", lambda: reason in log.read_text(errors="replace"))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_all_bytes_arrive_both_ways_and_each_end_ends_alone(pod: Pod, address: str) -> None:
    echoed = connect_inside(pod, address, 7000, BODY)
    assert (echoed.returncode, echoed.stderr) == (0, b"")
    assert hashlib.sha256(echoed.stdout).digest() == hashlib.sha256(BODY).digest()
    # It answers once it has seen the end.
    summed = connect_inside(pod, address, 7001, BODY)
    assert summed.stdout.split()[0].decode() == hashlib.md5(BODY).hexdigest()


def test_the_pods_own_address_is_not_touched(pod: Pod) -> None:
    ip = pod.crictl.inspectp(pod.id)["status"]["network"]["ip"]
    assert b"ConnectionRefusedError" in connect_inside(pod, ip, 7000, b"").stderr

    def connected() -> socket.socket | None:
        # A guest that stands still for a moment answers no ARP.
        with contextlib.suppress(OSError):
            return socket.create_connection((ip, 7000), timeout=TIMEOUT_S)
        return None

    with wait_for("a connection", connected) as connection:
        connection.sendall(b"from the host")
        assert connection.recv(100) == b"from the host"


def test_a_slow_reader_holds_up_its_own_connection_alone(pod: Pod) -> None:
    # By clients of their own: one would itself read nothing for either.
    with (
        forwarded(pod, 8080) as (one,),
        forwarded(pod, 8080) as (other,),
        socket.create_connection(("127.0.0.1", one)) as slow,
    ):
        slow.settimeout(TIMEOUT_S)
        slow.sendall(b"GET /zeros HTTP/1.0\r\n\r\n")
        assert len(get(other, "/zeros")) == 5 << 20
        data = 0
        while piece := slow.recv(1 << 20):
            data += len(piece)
        assert data > 5 << 20


def test_every_containerd_forwards(newer_crictl: Crictl) -> None:
    with contextlib.ExitStack() as stack:
        pod = serving_pod(stack, newer_crictl)
        with forwarded(pod, 8080) as (port,):
            assert get(port, "/page") == b"found\n"
