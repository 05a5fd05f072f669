"""Pods on a network: what their namespace has is what their containers have."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import TIMEOUT_S, Ctr, new_id, processes_of, wait_for, wait_page
from lan import HOST, HOST6, PREFIX, Namespace, bridge, namespace, seen_in, sh
from private_containerd import write_kata_config
from templates import KATA_PY, Log, ReadyTemplates, Templates, qemu_arguments, templates
from test_sandbox import booting, run, sandbox_config, spec

from virtcontainers.sandbox import Sandbox, create_sandbox

SLEEP = ("sleep", "1000")
FILE_BYTES = 48 << 20
"""What fits into the container's /dev/shm."""
TRANSFERS = 22
"""Of the file: together 1 GiB and a bit."""
MTU = 1500


@pytest.fixture(scope="module", autouse=True)
def lan(_host_unchanged_by_module: None) -> Iterator[None]:
    with bridge():
        yield


@pytest.fixture(scope="module")
def template(
    ctr: Ctr, tmp_path_factory: pytest.TempPathFactory, ready_templates: ReadyTemplates
) -> Iterator[Templates]:
    hypervisor = {"shared_fs": "virtio-9p", "enable_annotations": [".*"]}
    with templates(tmp_path_factory.mktemp("t"), {"hypervisor.qemu": hypervisor}) as found:
        found.put(ready_templates)
        yield found


@pytest.fixture
def net() -> Iterator[Namespace]:
    """At the end nothing of a pod is left in it."""
    with namespace() as made:
        yield made
        assert not [link for link in made.links() if link.endswith("_kata")]
        assert "ingress" not in made.sh("tc qdisc")


def model(name: str) -> tuple[str, ...]:
    return ("--annotation", f"io.katacontainers.config.runtime.internetworking_model={name}")


def wait_ping(ctr: Ctr, pod: str, address: str) -> None:
    """Who asks gives up on a neighbour that does not answer for three seconds, and drops the packet."""
    program = "ping6" if ":" in address else "ping"
    command = program, "-c", "1", "-W", "10", address
    wait_for(f"{address} to answer {pod}", lambda: ctr.exec(pod, *command).returncode == 0)


def hosts_network() -> str:
    return sh("ip -o link | cut -d : -f 2; ip -o addr | grep -v fe80; tc qdisc")


def succeeds(ctr: Ctr, pod: str, *command: str) -> str:
    result = ctr.exec(pod, *command)
    assert result.returncode == 0, result.stderr
    return result.stdout.decode()


@pytest.fixture(scope="class")
def nets(lan: None) -> Iterator[tuple[Namespace, Namespace]]:
    with namespace() as one, namespace() as two:
        one.add_eth0()
        two.add_eth0(mtu=1400)
        two.add_veth("net1", mtu=9000)
        two.add_macvlan("net2")
        sh("ip addr add 10.90.0.1/24 dev kpy-lan")
        two.sh("""
            ip addr add 10.77.0.2/32 dev net1
            ip addr add 10.77.0.3/24 dev net1
            ip route add 10.78.0.0/16 via 169.254.1.1 dev net1 onlink metric 20
            ip route add 10.79.0.0/16 via 10.77.0.9 dev net1 metric 7 src 10.77.0.3
            ip route add 10.80.0.0/16 via 10.77.0.9 dev net1 mtu 1280
            ip route add 10.81.1.1 dev net1 scope link
            ip route add default via 10.77.0.9 dev net1 metric 300
            ip -6 route add fd00:77::/64 dev eth0 metric 77
            ip neigh add 10.77.0.9 lladdr 02:00:00:00:77:09 dev net1 nud permanent
            ip -6 neigh add fd00:255::77 lladdr 02:00:00:00:77:77 dev eth0 nud permanent
            ip addr add 10.90.0.2/24 dev net2
            ip tuntap add net3 mode tap; ip addr add 10.91.0.2/24 dev net3; ip link set net3 up
        """)
        wait_for("net3 to be known as idle", lambda: "state DOWN" in two.sh("ip link show net3"))
        yield one, two


@pytest.fixture(scope="class")
def pods(
    ctr: Ctr,
    template: Templates,
    nets: tuple[Namespace, Namespace],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, str]]:
    one, two = nets
    before = one.state(), two.state()
    path = tmp_path_factory.mktemp("b") / "configuration.toml"
    hypervisor = {"default_vcpus": 2, "shared_fs": "virtio-9p"}
    write_kata_config(path, {"hypervisor.qemu": hypervisor})
    booted = ("--runtime-config-path", str(path))
    with (
        ctr.detached(new_id("booted"), *SLEEP, options=(*booted, *one.options)) as first,
        ctr.detached(new_id("cloned"), *SLEEP, options=(*template.options, *two.options)) as second,
    ):
        assert "-incoming" not in qemu_arguments(processes_of(first, "qemu-system")[0])
        assert "-incoming" in qemu_arguments(processes_of(second, "qemu-system")[0])
        yield first, second
    assert (one.state(), two.state()) == before


class TestTwoPods:
    """On one bridge with the host, one booted and one cloned."""

    def test_they_have_what_their_namespaces_have(
        self, ctr: Ctr, pods: tuple[str, str], nets: tuple[Namespace, Namespace]
    ) -> None:
        for pod, net in zip(pods, nets, strict=True):
            assert seen_in(ctr, pod) == net.seen()

    def test_a_card_has_a_queue_for_each_vcpu(self, ctr: Ctr, pods: tuple[str, str]) -> None:
        queues = [succeeds(ctr, pod, "ls", "/sys/class/net/eth0/queues").split() for pod in pods]
        assert queues == [["rx-0", "rx-1", "tx-0", "tx-1"], ["rx-0", "tx-0"]]

    def test_qemu_itself_is_not_where_their_links_are(
        self, pods: tuple[str, str], nets: tuple[Namespace, Namespace]
    ) -> None:
        for pod, net in zip(pods, nets, strict=True):
            (qemu,) = processes_of(pod, "qemu-system")
            places = [Path(f"/proc/{qemu}/ns/net"), Path("/run/netns", net.name), Path("/proc/self/ns/net")]
            assert len({place.stat().st_ino for place in places}) == 3

    def test_they_reach_the_host_and_each_other(
        self, ctr: Ctr, pods: tuple[str, str], nets: tuple[Namespace, Namespace]
    ) -> None:
        for pod, other in zip(pods, reversed(nets), strict=True):
            for address in (HOST, HOST6, other.address, other.address6):
                wait_ping(ctr, pod, address)
        wait_ping(ctr, pods[1], "10.90.0.1")  # by the macvlan

    def test_a_gibibyte_arrives_whole(
        self, ctr: Ctr, pods: tuple[str, str], nets: tuple[Namespace, Namespace]
    ) -> None:
        """From the host into one pod, from there into the other, and many times back to the host."""
        data = os.urandom(FILE_BYTES)
        first, second = pods
        with host_server(data) as port:
            fetch(ctr, first, f"http://{HOST}:{port}/")
        succeeds(ctr, first, "httpd", "-h", "/dev/shm")
        fetch(ctr, second, f"http://{nets[0].address}/file")
        succeeds(ctr, second, "httpd", "-h", "/dev/shm")
        wanted = hashlib.sha256(data).hexdigest()
        for url in [f"http://[{nets[0].address6}]/file"] * (TRANSFERS - 1) + [
            f"http://{nets[1].address}/file"
        ]:
            found = hashlib.sha256()
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
                while piece := response.read(1 << 20):
                    found.update(piece)
            assert found.hexdigest() == wanted

    def test_udp_of_mtu_size_comes_and_goes(self, ctr: Ctr, pods: tuple[str, str]) -> None:
        size = MTU - 20 - 8 - 4  # the headers of IPv4, UDP and TFTP
        data = os.urandom(size * 20 + 1)
        with tftp(data) as server:
            get = ("tftp", "-g", "-b", str(size), "-r", "file", "-l", "/tmp/file", HOST, str(server.port))
            succeeds(ctr, pods[0], *get)
            put = ("tftp", "-p", "-b", str(size), "-l", "/tmp/file", "-r", "file", HOST, str(server.port))
            succeeds(ctr, pods[0], *put)
            assert wait_for("the file", lambda: server.received) == data
        assert server.largest == MTU - 20 - 8

    def test_two_pods_cannot_have_one_namespace(
        self,
        ctr: Ctr,
        container_id: str,
        template: Templates,
        nets: tuple[Namespace, Namespace],
        pods: object,
    ) -> None:
        before = nets[0].state()
        result = ctr.run(container_id, "true", options=(*template.options, *nets[0].options))
        assert result.returncode != 0
        assert b"two pods cannot have one network namespace" in result.stderr
        assert nets[0].state() == before


def fetch(ctr: Ctr, pod: str, url: str) -> None:
    succeeds(ctr, pod, "wget", "-q", "-O", "/dev/shm/file", url)


@contextlib.contextmanager
def host_server(data: bytes) -> Iterator[int]:
    """One answer to HTTP, on this port."""
    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(TIMEOUT_S)

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


class Tftp:
    """RFC 1350 with RFC 2348's block size: one reader, then one writer."""

    def __init__(self, data: bytes) -> None:
        self.received = b""
        self.largest = 0
        """Payload of a datagram."""
        self._data = data
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((HOST, 0))
        self._socket.settimeout(TIMEOUT_S)
        # IP_MTU_DISCOVER, IP_PMTUDISC_DO: never in fragments
        self._socket.setsockopt(socket.IPPROTO_IP, 10, 2)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            size, written = 512, bytearray()
            while True:
                packet, peer = self._socket.recvfrom(65536)
                self.largest = max(self.largest, len(packet))
                kind, number = struct.unpack_from("!HH", packet)
                if kind in (1, 2):
                    words = packet[2:].split(b"\0")
                    size = int(words[words.index(b"blksize") + 1])
                    self._socket.sendto(b"\0\6blksize\0%d\0" % size, peer)
                elif kind == 4:
                    block = self._data[number * size : (number + 1) * size]
                    if number * size <= len(self._data):
                        self._socket.sendto(struct.pack("!HH", 3, number + 1) + block, peer)
                elif kind == 3:
                    if number == len(written) // size + 1:  # or else it comes again: our answer was late
                        written += packet[4:]
                    self._socket.sendto(struct.pack("!HH", 4, number), peer)
                    if len(packet) - 4 < size:
                        self.received = bytes(written)
                        return

    def __enter__(self) -> Tftp:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._thread.join()


def tftp(data: bytes) -> Tftp:
    return Tftp(data)


def test_macvtap_connects_the_pod(ctr: Ctr, container_id: str, template: Templates, net: Namespace) -> None:
    net.add_eth0()
    wanted = net.seen()
    (mac,) = (each.hardware_addr for each in wanted.interfaces)
    options = (*template.options, *model("macvtap"), *net.options)
    with ctr.detached(container_id, *SLEEP, options=options):
        assert seen_in(ctr, container_id) == wanted
        assert {"tap0_kata", "eth0"} < net.links()
        wait_ping(ctr, container_id, HOST)
        wait_ping(ctr, container_id, HOST6)
        succeeds(ctr, container_id, "httpd", "-h", "/etc")
        assert wait_page(f"http://{net.address}/passwd").startswith(b"root:x:0:0:")
        assert mac not in {each.hardware_addr for each in net.seen().interfaces}
    after = net.seen()
    assert after.interfaces == wanted.interfaces


def test_model_none_leaves_the_tap_to_others(
    ctr: Ctr, container_id: str, template: Templates, net: Namespace
) -> None:
    net.add_eth0()
    wanted = net.seen()
    with ctr.detached(container_id, *SLEEP, options=(*template.options, *model("none"), *net.options)):
        assert seen_in(ctr, container_id) == wanted
        assert ctr.exec(container_id, "ping", "-c", "1", "-W", "1", HOST).returncode != 0
        net.sh("""
            ip addr flush dev eth0; ip link set eth0 address 02:00:00:00:00:01
            ip link add br0 type bridge; ip link set br0 up
            ip link set eth0 master br0; ip link set tap0_kata master br0
        """)
        wait_ping(ctr, container_id, HOST)


def test_links_come_go_and_change_while_the_pod_runs(
    ctr: Ctr, container_id: str, template: Templates, net: Namespace
) -> None:
    def follows() -> bool:
        return seen_in(ctr, container_id) == net.seen()

    net.add_eth0()
    with ctr.detached(container_id, *SLEEP, options=(*template.options, *net.options)):
        assert follows()
        net.add_veth("net1", mtu=1300)
        net.sh("ip addr add 10.66.0.2/24 dev net1; ip route add 10.67.0.0/16 via 10.66.0.1")
        wait_for("the new link in the guest", follows)
        net.sh(
            "ip addr add 10.66.0.3/24 dev net1; ip link set eth0 mtu 1280; ip route add 10.68.0.0/16 dev eth0"
        )
        wait_for("the changes in the guest", follows)
        assert "mtu 1280" in net.sh("ip link show tap0_kata")
        net.sh("ip link del net1")
        wait_for("the link's end in the guest", follows)
        wait_for("its TAP's end", lambda: "tap1_kata" not in net.links())
        neighbor = f"{PREFIX}.250 dev eth0"
        net.sh(f"ip neigh add {neighbor} lladdr 02:00:00:00:02:50 nud permanent")
        wait_for("the neighbour in the guest", follows)
        net.sh(f"ip neigh del {neighbor}")
        wait_for("the neighbour's end in the guest", follows)
        wait_ping(ctr, container_id, HOST)


def test_a_pod_with_ipv6_only_outlives_its_namespace(
    ctr: Ctr, container_id: str, template: Templates, net: Namespace
) -> None:
    net.add_eth0()
    net.sh("ip -4 addr flush dev eth0; ip -4 route flush table main")
    with ctr.detached(container_id, *SLEEP, options=(*template.options, *net.options)):
        assert seen_in(ctr, container_id) == net.seen()
        wait_ping(ctr, container_id, HOST6)
        net.sh("ip link del eth0")
        sh(f"ip netns del {net.name}")
        # Not ls, which looks at each, and complains of one that has just gone.
        links = "sh", "-c", "cd /sys/class/net; echo *"
        wait_for("the link's end in the guest", lambda: succeeds(ctr, container_id, *links).split() == ["lo"])
        assert succeeds(ctr, container_id, "ip", "-6", "route", "show", "default") == ""
    sh(f"ip netns add {net.name}")  # for the fixture, which looks into it


@pytest.mark.parametrize("kind", ["tcfilter", "macvtap"])
def test_a_pod_that_was_killed_leaves_nothing(
    ctr: Ctr, container_id: str, template: Templates, net: Namespace, tmp_path: Path, kind: str
) -> None:
    net.add_eth0()
    before = net.seen().interfaces
    # ctr's fifos are not the shim's.
    options = (*template.options, *model(kind), *net.options, "--fifo-dir", str(tmp_path / "fifo"))
    with ctr.detached(container_id, *SLEEP, options=options):
        assert "tap0_kata" in net.links()
        for program in ("containerd-shim-kata", "qemu-system"):
            for pid in processes_of(container_id, program):
                # QEMU may have ended with the shim.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        wait_for("the pod's end", lambda: ctr.status(container_id) in ("STOPPED", None))
    wait_for("no TAP", lambda: "tap0_kata" not in net.links())
    wait_for("no redirection", lambda: "ingress" not in net.sh("tc qdisc"))
    wait_for("the link as it was", lambda: net.seen().interfaces == before)


def test_a_link_that_no_machine_can_have_is_refused(
    ctr: Ctr, container_id: str, template: Templates, net: Namespace
) -> None:
    net.add_eth0()
    net.sh("ip link add br0 type bridge; ip addr add 10.55.0.1/24 dev br0; ip link set br0 up")
    before = net.state()
    result = ctr.run(container_id, "true", options=(*template.options, *net.options))
    assert result.returncode != 0
    assert b"interface br0 of network namespace" in result.stderr
    assert b"found kind bridge, expected one of veth, macvlan" in result.stderr
    assert net.state() == before


def test_the_hosts_network_is_refused(ctr: Ctr, container_id: str, template: Templates) -> None:
    links = hosts_network()
    path = f"/proc/{os.getpid()}/ns/net"
    result = ctr.run(container_id, "true", options=(*template.options, "--with-ns", f"network:{path}"))
    assert result.returncode != 0
    assert b"found the host's network" in result.stderr
    assert hosts_network() == links


def test_a_namespace_that_is_not_there_is_named(ctr: Ctr, container_id: str, template: Templates) -> None:
    options = (*template.options, "--with-ns", "network:/run/netns/nowhere")
    result = ctr.run(container_id, "true", options=options)
    assert result.returncode != 0
    assert b"network namespace /run/netns/nowhere: No such file or directory" in result.stderr


def test_a_pod_without_a_namespace_has_the_loopback_only(
    ctr: Ctr, container_id: str, template: Templates
) -> None:
    result = ctr.run(container_id, "ip", "-o", "addr", options=template.options)
    assert {line.split()[1] for line in result.stdout.decode().splitlines()} == {"lo"}


def test_ctr_run_with_cni(ctr: Ctr, container_id: str, template: Templates, tmp_path: Path) -> None:
    """It calls the plugins between the container's creation and its start."""
    (tmp_path / "net.d").mkdir()
    (tmp_path / "net.d/10-lan.conflist").write_text(CNI % {"data": tmp_path / "addresses"})
    command = ctr.run_command(
        container_id,
        *("sh", "-c", f"ip addr show eth0; ip route; ping -c 2 -W {TIMEOUT_S} {HOST}"),
        options=("--rm", "--cni", *template.options),
    )
    # ctr knows these folders only, and the host has others of these names, or none.
    script = f"""
        mount -t tmpfs tmpfs /opt; mkdir -p /opt/cni; ln -s /usr/lib/cni /opt/cni/bin
        mkdir {tmp_path}/upper {tmp_path}/work {tmp_path}/etc
        mount -t tmpfs tmpfs {tmp_path}/etc; cp -a /etc/passwd /etc/group {tmp_path}/etc
        mkdir {tmp_path}/etc/cni; cp -a {tmp_path}/net.d {tmp_path}/etc/cni/net.d
        mount --bind {tmp_path}/etc /etc
        exec "$@"
    """
    links = hosts_network()
    out = sh(f"unshare --mount sh -ec '{script}' sh " + " ".join(f"'{word}'" for word in command))
    assert re.search(r"inet 198\.19\.255\.2\d\d/24", out)
    assert f"default via {HOST} dev eth0" in out
    # ping waits a second for the last.
    assert re.search("[12] packets received", out)
    # The link on the host goes with the machine's namespace, which the kernel takes apart in its own time.
    wait_for("the namespace's end", lambda: hosts_network() == links)


def test_a_hook_fills_the_machines_own_namespace(tmp_path: Path, guest_image: Path) -> None:
    """As docker's does, which finds it by the pid it is told."""
    pod = new_id("hook")
    given = spec("sh", "-c", "cat /proc/net/route; cat /proc/net/fib_trie")
    config = sandbox_config(tmp_path, guest_image, pod, given)

    async def hook(sandbox: Sandbox) -> None:
        sh(f"""
            ip link add vhook type veth peer name eth0 netns {sandbox.hypervisor_pid}
            ip link set vhook master kpy-lan up
            nsenter --net=/proc/{sandbox.hypervisor_pid}/ns/net sh -ec '
                ip addr add 198.19.255.99/24 dev eth0; ip link set eth0 up; ip route add default via {HOST}
            '
        """)

    async def body() -> None:
        sandbox = await create_sandbox(config, booting(config), prestart=hook)
        try:
            status, output = await run(sandbox.containers[pod])
        finally:
            await sandbox.delete()
        assert status == 0
        assert b"eth0\t00000000\t01FF13C6" in output  # the default route
        assert b"|-- 198.19.255.99" in output

    asyncio.run(body())
    wait_for("the namespace's end", lambda: "vhook" not in sh("ip -o link"))


def test_a_cached_machine_gets_the_pods_network(ctr: Ctr, tmp_path: Path, net: Namespace) -> None:
    net.add_eth0()
    endpoint = tmp_path / "cache.sock"
    cache = {"vm_cache_number": 1, "vm_cache_endpoint": str(endpoint)}
    path = tmp_path / "configuration.toml"
    write_kata_config(path, {"hypervisor.qemu": {"shared_fs": "virtio-9p"}, "factory": cache})
    server = subprocess.Popen(
        [KATA_PY, "factory", "init", "--config", path], stdout=subprocess.PIPE, text=True
    )
    pod = new_id("cached")
    log = Log(ctr.containerd)
    try:
        assert server.stdout is not None
        while not (line := server.stdout.readline()).startswith("The VM cache is at"):
            assert line, "the server has ended"
        with ctr.detached(pod, *SLEEP, options=("--runtime-config-path", str(path), *net.options)):
            assert log.warnings(pod) == []
            assert seen_in(ctr, pod) == net.seen()
            wait_ping(ctr, pod, HOST)
    finally:
        server.terminate()
        server.communicate()


def test_a_macvtap_of_the_namespace_is_the_machines(
    ctr: Ctr, container_id: str, template: Templates, net: Namespace
) -> None:
    net.add_veth("parent")
    net.sh(f"""
        ip link add link parent name eth0 type macvtap mode bridge; ip link set eth0 up
        ip addr add {net.address}/24 dev eth0; ip addr flush dev parent
    """)
    net.wait_up("eth0")
    wanted = net.seen()
    only = ("--annotation", "io.katacontainers.config.runtime.sandbox_cgroup_only=true")
    options = (*template.options, *model("macvtap"), *only, *net.options)
    with ctr.detached(container_id, *SLEEP, options=options):
        found = seen_in(ctr, container_id)
        assert found.interfaces == {each for each in wanted.interfaces if each.name == "eth0"}
        wait_ping(ctr, container_id, HOST)
    assert "eth0" in net.links()


def test_with_disable_new_netns_no_namespace_is_touched(
    ctr: Ctr, container_id: str, template: Templates, net: Namespace
) -> None:
    net.add_eth0()
    before = net.state(), hosts_network()
    disabled = ("--annotation", "io.katacontainers.config.runtime.disable_new_netns=true", *model("none"))
    for options in (net.options, ("--net-host",)):
        pod = new_id("disabled")
        result = ctr.run(pod, "ip", "-o", "link", options=(*template.options, *disabled, *options))
        assert result.returncode == 0, result.stderr
        assert [line.split()[1] for line in result.stdout.decode().splitlines()] == ["lo:"]
    assert (net.state(), hosts_network()) == before


CNI = """{
    "cniVersion": "0.4.0", "name": "lan", "plugins": [{
        "type": "bridge", "bridge": "kpy-lan",
        "ipam": {
            "type": "host-local", "dataDir": "%(data)s",
            "ranges": [[{"subnet": "198.19.255.0/24", "rangeStart": "198.19.255.200",
                         "rangeEnd": "198.19.255.250", "gateway": "198.19.255.1"}]],
            "routes": [{"dst": "0.0.0.0/0"}]
        }
    }]
}"""


def test_the_log_tells_of_the_pods_links(
    ctr: Ctr, container_id: str, template: Templates, net: Namespace
) -> None:
    log = Log(ctr.containerd)
    net.add_eth0()
    result = ctr.run(container_id, "true", options=(*template.options, *net.options))
    assert result.returncode == 0, result.stderr
    assert log.warnings(container_id) == []
    sentence = "the pod has eth0 (virtual) by tap0_kata"
    wait_for("the log", lambda: log.count(sentence))
    assert log.count(sentence) == 1
