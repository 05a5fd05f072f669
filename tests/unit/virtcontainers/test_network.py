"""A pod's network in a real namespace, with a machine that refuses things."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest

from agent_client.protocols import types_pb2
from tests.unit.descriptors import open_descriptors
from tests.unit.netns import own_namespace
from virtcontainers.agent import KataAgent
from virtcontainers.config import HypervisorConfig, NetworkConfig
from virtcontainers.device_cgroup import DeviceRule, sandbox_rules
from virtcontainers.errors import FailedPreconditionError, KataError, UnavailableError
from virtcontainers.hypervisor.base import Hypervisor, NetDevice, QMPFailed
from virtcontainers.network.endpoints import InterworkingModel
from virtcontainers.network.network import Network
from virtcontainers.resource_control import ResourceController, find_hierarchies

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and /dev/net/tun"
)
TIMEOUT_S = 120
FAILED, PERMANENT = 0x20, 0x80


class Namespace:
    def __init__(self, pid: int) -> None:
        self.path = Path(f"/proc/{pid}/ns/net")

    def sh(self, script: str) -> str:
        command = ["nsenter", f"--net={self.path}", "sh", "-ec", script]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    with own_namespace() as pid:
        yield Namespace(pid)


def add_link(namespace: Namespace, name: str, address: str) -> None:
    """Its peer is there, too: without an address it is not the machine's."""
    namespace.sh(f"""
        ip link add {name} type veth peer name peer-{name}
        ip link set peer-{name} addrgenmode none; ip link set peer-{name} up
        ip link set {name} up; ip addr add {address} dev {name}
    """)


class Machine:
    """QEMU's and the agent's part: it keeps TAPs open, and what it was told."""

    def __init__(self) -> None:
        self.taps: dict[str, list[int]] = {}
        self.interfaces: dict[str, types_pb2.Interface] = {}
        self.routes: list[types_pb2.Route] = []
        self.neighbors: dict[str, tuple[str, int]] = {}
        """Address -> MAC address and state."""
        self.refuses_cards = self.keeps_cards = False
        self.refused = 0

    async def hotplug_net(self, device: NetDevice) -> str:
        if self.refuses_cards:
            self.refused += 1
            raise QMPFailed("QMP device_add: no")
        self.taps[device.tap] = [os.dup(fd) for fd in device.fds]
        return f"02/{len(self.taps):02x}"

    async def hotunplug_net(self, tap: str, *, timeout_s: float) -> None:
        if self.keeps_cards:
            raise QMPFailed(f"the guest has not let go of {tap}")
        self._close(tap)

    def _close(self, tap: str) -> None:
        for fd in self.taps.pop(tap):
            os.close(fd)

    async def update_interface(self, interface: types_pb2.Interface) -> None:
        self.interfaces[interface.name] = interface

    async def update_routes(self, routes: list[types_pb2.Route]) -> None:
        self.routes = routes

    async def add_arp_neighbors(self, neighbors: list[types_pb2.ARPNeighbor]) -> None:
        self.neighbors |= {each.toIPAddress.address: (each.lladdr, each.state) for each in neighbors}

    def end(self) -> None:
        for tap in list(self.taps):
            self._close(tap)


Allowed = Callable[[list[DeviceRule]], contextlib.AbstractContextManager[None]]


def network_of(namespace: Namespace, model: InterworkingModel, allowed: Allowed | None = None) -> Network:
    config = NetworkConfig(network_namespace=namespace.path, interworking_model=model)
    hypervisor = HypervisorConfig(disable_vhost_net=True)
    network = Network(
        config,
        hypervisor,
        sandbox_id=str(uuid4()),
        on_planned=lambda planned: None,
        allowed=allowed or (lambda rules: contextlib.nullcontext()),
    )
    network.start()
    return network


async def attached(
    namespace: Namespace,
    machine: Machine,
    model: InterworkingModel = InterworkingModel.TCFILTER,
    allowed: Allowed | None = None,
) -> Network:
    network = network_of(namespace, model, allowed)
    await network.attach(cast(Hypervisor, machine), cast(KataAgent, machine))
    return network


async def until(look: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not look():  # noqa: ASYNC110 # neither logging nor a Machine knows events
            await asyncio.sleep(0.01)


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    await until(lambda: text in caplog.text)


def test_what_the_machine_refused_is_told_and_tried_again(
    namespace: Namespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtcontainers.network.network._RETRY_S", 1000)

    async def body() -> None:
        machine = Machine()
        add_link(namespace, "eth0", "10.0.0.2/24")
        network = await attached(namespace, machine)
        try:
            machine.refuses_cards = True
            add_link(namespace, "net1", "10.1.0.2/24")
            await logged(caplog, "the pod's network is not what its namespace has: QMP")
            assert "tap1_kata" not in namespace.sh("ip -o link show")
            with pytest.raises(KataError, match="no"):
                await network.settle()
            machine.refuses_cards = False
            await network.settle()
            assert set(machine.taps) == {"tap0_kata", "tap1_kata"}
            assert set(machine.interfaces) == {"eth0", "net1"}

            machine.keeps_cards = True
            caplog.clear()
            namespace.sh("ip link del net1")
            await logged(caplog, "the guest has not let go of tap1_kata")
            machine.keeps_cards = False
            await network.settle()
            assert set(machine.taps) == {"tap0_kata"}
        finally:
            await network.close()
            machine.end()
            await network.delete()
        assert "_kata" not in namespace.sh("ip -o link show")
        assert "ingress" not in namespace.sh("tc qdisc show")

    asyncio.run(body())


def test_a_link_whose_macvtap_the_machine_refused_is_as_it_was(
    namespace: Namespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtcontainers.network.network._RETRY_S", 1000)

    async def body() -> None:
        machine = Machine()
        network = await attached(namespace, machine, InterworkingModel.MACVTAP)
        try:
            machine.refuses_cards = True
            namespace.sh(
                "ip link add net1 address 02:00:00:00:00:01 type veth peer name peer; ip link set net1 up\n"
                "ip addr add 10.1.0.2/24 dev net1; ip route add 10.9.0.0/16 via 10.1.0.1"
            )
            await logged(caplog, "the pod's network is not what its namespace has: QMP")
            assert "02:00:00:00:00:01" in namespace.sh("ip link show net1")
            assert "10.1.0.2/24" in namespace.sh("ip -o -4 addr show net1")
            assert "tap0_kata" not in namespace.sh("ip -o link show")
            machine.refuses_cards = False
            await network.settle()
            assert [each.address for each in machine.interfaces["net1"].IPAddresses][:1] == ["10.1.0.2"]
            assert ("10.9.0.0/16", "10.1.0.1") in {(each.dest, each.gateway) for each in machine.routes}
        finally:
            await network.close()
            machine.end()
            await network.delete()

    asyncio.run(body())


def test_what_the_machine_refused_is_tried_again_by_itself_until_the_pods_end(
    namespace: Namespace, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtcontainers.network.network._RETRY_S", 0.01)

    async def body() -> None:
        machine = Machine()
        network = await attached(namespace, machine)
        try:
            machine.refuses_cards = True
            add_link(namespace, "eth0", "10.0.0.2/24")
            await until(lambda: machine.refused >= 3)
            machine.refuses_cards = False
            await until(lambda: "eth0" in machine.interfaces)
            assert caplog.text.count("the pod's network is not what its namespace has") == 1

            machine.refuses_cards = True
            refused = machine.refused
            add_link(namespace, "net1", "10.1.0.2/24")
            await until(lambda: machine.refused > refused)
        finally:
            await network.close()
            refused = machine.refused
            await asyncio.sleep(0.2)
            assert machine.refused == refused
            machine.end()
            await network.delete()

    asyncio.run(body())


def test_the_pods_end_ends_a_look_at_its_network(namespace: Namespace) -> None:
    """Which a container that is being started has asked for, and which would else go on without a machine."""

    async def body() -> None:
        machine = Machine()
        network = await attached(namespace, machine)
        add_link(namespace, "eth0", "10.0.0.2/24")
        settling = asyncio.create_task(network.settle())
        await until(lambda: len(network._background) > 0)
        await network.close()
        await network.delete()
        with pytest.raises(UnavailableError, match="its machine has ended"):
            await settling
        assert machine.taps == {}
        assert "tap0_kata" not in namespace.sh("ip -o link show")
        assert "ingress" not in namespace.sh("tc qdisc show")

    asyncio.run(body())


def test_who_waits_for_anothers_look_is_told_of_the_pods_end(namespace: Namespace) -> None:
    async def body() -> None:
        network = await attached(namespace, Machine())
        async with network._lock:
            settling = asyncio.create_task(network.settle())
            await asyncio.sleep(0)
            await network.close()
        with pytest.raises(UnavailableError, match="its machine has ended"):
            await settling
        await network.delete()

    asyncio.run(body())


def test_pyroute2_is_imported_for_a_namespace_with_links_alone(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never by us."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    async def body() -> None:
        machine = Machine()
        network = await attached(namespace, machine)
        add_link(namespace, "eth0", "10.0.0.2/24")
        with pytest.raises(KataError, match="pyroute2 is not installed"):
            await network.settle()
        monkeypatch.undo()
        await network.settle()
        assert list(machine.interfaces) == ["eth0"]
        machine.end()
        await network.delete()
        assert "pyroute2" not in sys.modules

    asyncio.run(body())


def test_a_name_that_is_no_text_is_spelt_out(namespace: Namespace) -> None:
    async def body() -> None:
        machine = Machine()
        add_link(namespace, "eth0", "10.0.0.2/24")
        # The shell's own printf: an argument cannot be written so here.
        namespace.sh(r"ip link set eth0 down; ip link set eth0 name $(printf 'e\377')")
        network = await attached(namespace, machine)
        machine.end()
        await network.delete()
        assert list(machine.interfaces) == [r"e\xff"]

    asyncio.run(body())


def test_gateways_of_the_other_family_are_gateways(namespace: Namespace) -> None:
    async def body() -> None:
        machine = Machine()
        add_link(namespace, "eth0", "10.0.0.2/24")
        namespace.sh("ip route add 10.9.0.0/16 via inet6 fe80::1 dev eth0")
        network = await attached(namespace, machine)
        machine.end()
        await network.delete()
        assert machine.routes == [types_pb2.Route(dest="10.9.0.0/16", gateway="fe80::1", device="eth0")]

    asyncio.run(body())


def test_neighbours_alone_come_and_go(namespace: Namespace) -> None:
    async def body() -> None:
        machine = Machine()
        add_link(namespace, "eth0", "10.0.0.2/24")
        namespace.sh("""
            ip neigh add 10.0.0.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent
            ip -6 neigh add fd00::7 lladdr 02:00:00:00:00:77 dev eth0 nud permanent
        """)
        network = await attached(namespace, machine)
        there, there6 = ("02:00:00:00:00:07", PERMANENT), ("02:00:00:00:00:77", PERMANENT)
        assert machine.neighbors == {"10.0.0.7": there, "fd00::7": there6}
        namespace.sh("""
            ip neigh del 10.0.0.7 dev eth0
            ip neigh add 10.0.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud permanent
        """)
        await until(lambda: "10.0.0.8" in machine.neighbors)
        assert machine.neighbors == {
            "10.0.0.7": ("", FAILED),
            "10.0.0.8": ("02:00:00:00:00:08", PERMANENT),
            "fd00::7": there6,
        }
        namespace.sh("ip -6 neigh del fd00::7 dev eth0")
        await until(lambda: machine.neighbors["fd00::7"] != there6)
        assert machine.neighbors["fd00::7"] == ("", FAILED)
        machine.neighbors = {}
        add_link(namespace, "net1", "10.1.0.2/24")
        await network.settle()
        assert set(machine.interfaces) == {"eth0", "net1"}
        assert [each for each, (_, state) in machine.neighbors.items() if state == FAILED] == []
        machine.end()
        await network.delete()

    asyncio.run(body())


def test_routes_that_are_no_links_are_told_once(
    namespace: Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> list[str]:
        return [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]

    async def body() -> None:
        machine = Machine()
        add_link(namespace, "eth0", "10.0.0.2/24")
        add_link(namespace, "net1", "10.1.0.2/24")
        namespace.sh("""
            ip route add 10.9.0.0/16 via 10.0.0.1
            ip route add default metric 7 nexthop via 10.0.0.1 weight 2 nexthop via 10.1.0.1
            ip route add blackhole 10.8.0.0/16
        """)
        network = await attached(namespace, machine)
        assert [(route.dest, route.gateway) for route in machine.routes] == [("10.9.0.0/16", "10.0.0.1")]
        multipath, blackhole = warnings()
        where = f"the machine does not get a route of network namespace {namespace.path}: found"
        hops = "nexthop via 10.0.0.1 dev eth0 weight 2 nexthop via 10.1.0.1 dev net1 weight 1"
        assert multipath.startswith(f"{where} default metric 7 {hops}, expected one by one link")
        assert blackhole.startswith(f"{where} blackhole 10.8.0.0/16, expected")
        namespace.sh("""
            ip addr add 10.2.0.2/24 dev net1
            ip -6 addr add fd00:1::2/64 dev eth0 nodad
            ip -6 route add fd00:9::/64 nexthop via fd00:1::8 nexthop via fd00:1::9
        """)
        await network.settle()
        hops = "nexthop via fd00:1::8 dev eth0 weight 1 nexthop via fd00:1::9 dev eth0 weight 1"
        assert len(warnings()) == 3
        assert f"found fd00:9::/64 metric 1024 {hops}, expected" in warnings()[-1]
        machine.end()
        await network.delete()

    asyncio.run(body())


@pytest.mark.parametrize("model", InterworkingModel)
def test_a_namespace_that_has_a_pod_is_refused(namespace: Namespace, model: InterworkingModel) -> None:
    async def body() -> None:
        add_link(namespace, "eth0", "10.0.0.2/24")
        machine = Machine()
        first = await attached(namespace, machine, model)
        script = """
            ip -o link | cut -d " " -f 2; ip link show eth0 | grep ether; ip -o addr show scope global
            tc filter show dev eth0 ingress
        """
        before = namespace.sh(script)
        if model is InterworkingModel.MACVTAP:
            namespace.sh("ip addr add 10.0.0.3/24 dev eth0")  # or it would be nobody's
        second = network_of(namespace, model)
        with pytest.raises(FailedPreconditionError, match="two pods cannot have one network namespace"):
            await second.attach(cast(Hypervisor, Machine()), cast(KataAgent, machine))
        await second.delete()
        if model is InterworkingModel.MACVTAP:
            namespace.sh("ip addr del 10.0.0.3/24 dev eth0")
        assert namespace.sh(script) == before
        machine.end()
        await first.delete()

    asyncio.run(body())


@pytest.fixture(params=["cgroup", "cgroup2"])
def cgroup(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ResourceController]:
    """The devices' of a pod with sandbox_cgroup_only; this process is in it."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    (tmp_path / "mountinfo").write_text(
        "".join(f"{each}\n" for each in mounts if f" - {request.param} " in each)
    )
    hierarchies = [
        each
        for each in find_hierarchies(tmp_path / "mountinfo")
        if each.is_v2 or "devices" in each.controllers
    ]
    if not hierarchies:
        pytest.skip(f"this host has no such {request.param}")
    controller = ResourceController(f"/kata-py-unit-test-{secrets.token_hex(3)}", hierarchies)
    controller.create()
    try:
        nothing = [{"allow": False, "access": "rwm"}]
        controller.update_devices(sandbox_rules(nothing, sandbox_cgroup_only=True, debug=False, others=[]))
        controller.add_process(os.getpid())
        yield controller
    finally:
        controller.delete()


@pytest.mark.parametrize("model", [InterworkingModel.MACVTAP, InterworkingModel.NONE])
def test_of_macvtaps_a_pod_may_open_its_own_alone_and_only_once(
    namespace: Namespace, cgroup: ResourceController, model: InterworkingModel, tmp_path: Path
) -> None:
    """Whatever number the driver has, which a host that has just loaded it did not know before."""

    async def body() -> None:
        machine = Machine()
        add_link(namespace, "eth0", "10.0.0.2/24")
        if model is InterworkingModel.NONE:
            namespace.sh("""
                ip link add link eth0 name net1 type macvtap mode bridge; ip addr flush dev eth0
                ip link set net1 up; ip addr add 10.1.0.2/24 dev net1
            """)
        network = await attached(namespace, machine, model, cgroup.devices_allowed)
        try:
            ((fd,),) = machine.taps.values()
            number = os.fstat(fd).st_rdev
            os.mknod(tmp_path / "tap", stat.S_IFCHR | 0o600, number)
            with pytest.raises(PermissionError):
                os.open(tmp_path / "tap", os.O_RDWR)
            add_link(namespace, "net2", "10.2.0.2/24")
            await network.settle()
            assert len(machine.taps) == 2
        finally:
            machine.end()
            await network.delete()

    asyncio.run(body())


def test_a_macvtap_that_may_not_be_opened_goes(namespace: Namespace, cgroup: ResourceController) -> None:
    async def body() -> None:
        add_link(namespace, "eth0", "10.0.0.2/24")
        script = "ip -o link | cut -d ' ' -f 2; ip link show eth0 | grep ether; ip -o -4 addr"
        before = namespace.sh(script)
        network = network_of(namespace, InterworkingModel.MACVTAP)
        with pytest.raises(KataError, match="/sys/tap: Operation not permitted"):
            await network.attach(cast(Hypervisor, Machine()), cast(KataAgent, Machine()))
        assert namespace.sh(script) == before
        await network.delete()

    asyncio.run(body())


def test_many_changes_leave_no_descriptor_and_no_process(namespace: Namespace) -> None:
    def children() -> set[str]:
        return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())

    async def body() -> None:
        machine = Machine()
        add_link(namespace, "eth0", "10.0.0.2/24")
        network = await attached(namespace, machine)
        before = open_descriptors()
        for number in range(10):
            add_link(namespace, "net1", f"10.1.{number}.2/24")
            await network.settle()
            assert set(machine.taps) == {"tap0_kata", "tap1_kata"}
            namespace.sh("ip link del net1")
            await network.settle()
            assert set(machine.taps) == {"tap0_kata"}
        assert open_descriptors() <= before
        machine.end()
        await network.delete()

    descriptors, processes = open_descriptors(), children()
    asyncio.run(body())
    assert open_descriptors() <= descriptors
    assert children() <= processes
