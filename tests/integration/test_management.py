"""A pod's management socket: as kata-py uses it, and as Kata's own tools would."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import TIMEOUT_S, Ctr, new_id
from private_containerd import REPO

KATA_PY = REPO / ".venv/bin/kata-py"
RULES = """*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p tcp -m tcp --dport 81 -j DROP
COMMIT
"""


@pytest.fixture(scope="module")
def pod(ctr: Ctr) -> Iterator[str]:
    with ctr.detached(new_id("management"), "sleep", "1000") as container_id:
        yield container_id


def kata_py(*arguments: str, input: str = "") -> subprocess.CompletedProcess[str]:
    command = [str(KATA_PY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, input=input, timeout=TIMEOUT_S)


def monitor(pod: str) -> Path:
    return Path("/run/vc/sbs", pod, "shim-monitor.sock")


def ask(pod: str, request: str) -> tuple[str, str]:
    """First line and body of the answer, which ends with the connection."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(monitor(pod)))
        connection.sendall(request.encode())
        answer = b""
        while piece := connection.recv(1 << 16):
            answer += piece
    head, _, body = answer.decode().partition("\r\n\r\n")
    return head.partition("\r\n")[0], body


def get(pod: str, path: str) -> tuple[str, str]:
    # The words of Go's client, which Kata's tools are written with.
    agent = "User-Agent: Go-http-client/1.1\r\nAccept-Encoding: gzip\r\nConnection: close"
    return ask(pod, f"GET {path} HTTP/1.1\r\nHost: shim\r\n{agent}\r\n\r\n")


def test_kata_py_sets_and_gets_a_pods_packet_filters(pod: str, tmp_path: Path) -> None:
    file = tmp_path / "rules"
    file.write_text(RULES)
    for more, port in (((), "81"), (("--v6",), "82")):
        before = kata_py("iptables", "get", "--sandbox-id", pod, *more)
        assert (before.returncode, before.stdout, before.stderr) == (0, "", "")
        file.write_text(RULES.replace("81", port))
        done = kata_py("iptables", "set", "--sandbox-id", pod, *more, str(file))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        found = kata_py("iptables", "get", "--sandbox-id", pod, *more)
        assert f"-A INPUT -p tcp -m tcp --dport {port} -j DROP\n" in found.stdout
        assert ":FORWARD DROP " in found.stdout
        # What it prints can be set again.
        again = kata_py("iptables", "set", "--sandbox-id", pod, *more, "-", input=found.stdout)
        assert (again.returncode, again.stderr) == (0, "")
    refused = kata_py(
        "iptables", "set", "--sandbox-id", pod, "-", input="*filter\n-A NOWHERE -j DROP\nCOMMIT\n"
    )
    assert refused.returncode == 1
    asked = f"kata-py: sandbox {pod}: PUT /iptables: agent: SetIPTables: iptables-restore: "
    assert refused.stderr == f"{asked}line 2 failed: No chain/target/match by that name.\n"
    assert "--dport 81" in kata_py("iptables", "get", "--sandbox-id", pod).stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("get", "--sandbox-id", "nosuch"), "sandbox nosuch: nobody serves /run/vc/sbs/nosuch/"),
        (("get", "--sandbox-id", "../x"), "sandbox id '../x': expected the id of a pod"),
        (("set", "--sandbox-id", "nosuch", "/nowhere/rules"), "/nowhere/rules: No such file"),
    ],
)
def test_what_kata_py_is_not_given_is_named(arguments: tuple[str, ...], sentence: str) -> None:
    found = kata_py("iptables", *arguments)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"kata-py: {sentence}")


def test_metrics_and_the_agents_address_are_told(pod: str) -> None:
    status, body = get(pod, "/metrics")
    assert status == "HTTP/1.1 200 OK"
    assert re.search(r'^kata_guest_meminfo\{item="mem_total"\} \d+$', body, re.MULTILINE)
    assert get(pod, "/agent-url") == ("HTTP/1.1 200 OK", f"serial:///run/vc/vm/{pod}/agent.sock")


@pytest.mark.parametrize(
    ("request_", "status", "sentence"),
    [
        ("GET /nosuch HTTP/1.1\r\n\r\n", "404 Not Found", "/nosuch: expected one of /metrics, "),
        ("DELETE /iptables HTTP/1.1\r\n\r\n", "501 Not Implemented", "expected GET or PUT"),
        ("PUT /iptables HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n", "413 ", "at most 4194304"),
        ("PUT /iptables HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "411 ", "a Content-Length"),
        ("nonsense\r\n\r\n", "400 Bad Request", "expected METHOD PATH HTTP/1.1"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(
    pod: str, request_: str, status: str, sentence: str
) -> None:
    line, body = ask(pod, request_)
    assert line.startswith(f"HTTP/1.1 {status}")
    assert sentence in body


def test_who_says_too_much_or_hangs_up_harms_nobody(pod: str) -> None:
    for words in (
        b"",
        b"GET /metr",
        b"GET /" + b"x" * (1 << 20),
        b"PUT /iptables HTTP/1.1\r\nContent-Length: 9\r\n\r\nab",
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(monitor(pod)))
            with contextlib.suppress(ConnectionError):
                connection.sendall(words)
    assert get(pod, "/agent-url")[0] == "HTTP/1.1 200 OK"


def test_the_socket_goes_with_the_pod(ctr: Ctr, container_id: str) -> None:
    with ctr.detached(container_id, "sleep", "1000"):
        assert monitor(container_id).is_socket()
        assert monitor(container_id).parent.stat().st_mode & 0o077 == 0, "root's alone"
    assert not monitor(container_id).exists()
    assert kata_py("iptables", "get", "--sandbox-id", container_id).returncode == 1
