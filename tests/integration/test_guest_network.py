"""The guest's network as the host sets it up: what `ip` shows in the machine, and packets that arrive."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guest_shell import run_in_guest
from harness import TIMEOUT_S, new_id
from templates import ReadyTemplates

from agent_client.protocols import types_pb2
from virtcontainers.agent import KataAgent
from virtcontainers.config import AgentConfig, AgentTransport, HypervisorConfig, SharedFS
from virtcontainers.errors import DeadlineExceededError, InvalidArgumentError, KataError, NotFoundError
from virtcontainers.factory.template import Template, destroy
from virtcontainers.hypervisor.base import NetDevice, Persisted, QMPFailed
from virtcontainers.vm import VM, VMConfig

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/dev/net/tun").exists(), reason="needs root and /dev/net/tun"
)

_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000


@pytest.fixture(scope="module")
def config(guest_image: Path) -> VMConfig:
    hypervisor = HypervisorConfig(
        kernel=guest_image / "vmlinuz",
        initrd=guest_image / "initrd.img",
        default_memory_mib=256,
        shared_fs=SharedFS.NONE,
    )
    return VMConfig(hypervisor, AgentConfig(dial_timeout_s=TIMEOUT_S, transport=AgentTransport.SERIAL))


@pytest.fixture(scope="module")
def template(
    config: VMConfig, tmp_path_factory: pytest.TempPathFactory, ready_templates: ReadyTemplates
) -> Iterator[Template]:
    path = tmp_path_factory.mktemp("vc") / "template"
    yield ready_templates.put(path, config)
    asyncio.run(destroy(path))


def ignore_plan(persisted: Persisted, share_of: str | None = None) -> None:
    """These tests end their machines themselves."""


@contextlib.contextmanager
def tap(name: str, *addresses: str) -> Iterator[int]:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI_VNET_HDR))
        for address in addresses:
            nodad = ["nodad"] if ":" in address else []
            subprocess.run(["ip", "address", "add", address, "dev", name, *nodad], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield fd
    finally:
        os.close(fd)


class Guest:
    def __init__(self, vm: VM) -> None:
        self.vm = vm
        self.agent = KataAgent(vm.agent)

    async def plug(self, name: str, mac: str, fd: int) -> str:
        """Its PCI path."""
        hypervisor = self.vm.hypervisor
        slot = hypervisor.take_slot()
        await hypervisor.monitor.send_fd(name, fd)
        await hypervisor.monitor.execute("netdev_add", {"type": "tap", "id": name, "fd": name})
        device = {"driver": "virtio-net-pci", "id": f"nic-{name}", "netdev": name, "mac": mac}
        await hypervisor.monitor.execute("device_add", device | slot.place)
        return slot.pci_path

    async def shell(self, command: str) -> str:
        return await run_in_guest(self.vm, command)

    async def words(self, command: str) -> list[str]:
        """The lines, without the spaces between and behind their words."""
        return [" ".join(line.split()) for line in (await self.shell(command)).splitlines()]


@contextlib.asynccontextmanager
async def clone_of(template: Template) -> AsyncIterator[Guest]:
    vm = await template.get_base_vm(new_id("net"), template.config, shared_path=None, on_planned=ignore_plan)
    try:
        await vm.resume()
        await vm.connect(TIMEOUT_S)
        yield Guest(vm)
    finally:
        await vm.stop()


def address(text: str) -> types_pb2.IPAddress:
    ip, _, prefix = text.partition("/")
    family = types_pb2.v6 if ":" in ip else types_pb2.v4
    return types_pb2.IPAddress(family=family, address=ip, mask=prefix)


def interface(name: str, mac: str, *addresses: str, **fields: Any) -> types_pb2.Interface:
    return types_pb2.Interface(
        device=name, name=name, hwAddr=mac, IPAddresses=[address(one) for one in addresses], **fields
    )


async def wait_ping(guest: Guest, target: str) -> None:
    assert "1 packets received" in await guest.shell(f"busybox ping -c 1 -W 60 {target}")


MAC = "02:00:00:00:00:01"
OTHER_MAC = "02:00:00:00:00:02"


def test_a_clone_gets_the_interfaces_routes_and_neighbours_it_is_told(template: Template) -> None:
    async def body() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = stack.enter_context(tap("tap-a", "10.88.0.1/24", "fd88::1/64"))
            second = stack.enter_context(tap("tap-b"))
            guest = await stack.enter_async_context(clone_of(template))
            assert "virtio_net" in await guest.shell("cat /proc/modules"), "loaded before it was cloned"
            path = await guest.plug("a", MAC, first)
            await guest.plug("b", OTHER_MAC, second)
            agent = guest.agent

            # The kernel has called them eth0 and eth1: they change their names.
            await agent.update_interface(
                interface("eth1", MAC, "10.88.0.2/24", "fd88::2/64", mtu=1400, devicePath=path)
            )
            await agent.update_interface(
                interface("eth0", OTHER_MAC, "10.99.0.2/32", mtu=9000, raw_flags=0x80)
            )
            lines = await guest.words("ip addr")
            assert "inet 127.0.0.1/8 scope host lo" in lines
            assert "inet 10.88.0.2/24 brd 10.88.0.255 scope global eth1" in lines
            assert "inet 10.99.0.2/32 scope global eth0" in lines
            assert any(line.startswith("inet6 fd88::2/64 scope global") for line in lines)
            assert not any("tentative" in line for line in lines if "fd88" in line)
            links = {line.split()[1]: line for line in lines if "mtu" in line}
            assert "mtu 1400" in links["eth1:"] and "UP" in links["eth1:"] and "NOARP" not in links["eth1:"]
            assert "mtu 9000" in links["eth0:"] and "NOARP" in links["eth0:"]
            # Where no IPv6 was asked for, there is none.
            assert await guest.words("ip -6 addr show dev eth0") == []
            await wait_ping(guest, "10.88.0.1")
            await wait_ping(guest, "fd88::1")

            route = types_pb2.Route
            await agent.update_routes(
                [
                    route(gateway="10.88.0.1", device="eth1"),
                    route(dest="0.0.0.0/0", gateway="10.88.0.9", device="eth1", priority=50, mtu=1300),
                    route(dest="10.5.0.0/16", gateway="169.254.1.1", device="eth0"),
                    route(dest="169.254.1.1/32", device="eth0", scope=253, source="10.99.0.2"),
                    route(dest="10.6.0.0/16", gateway="10.7.7.7", device="eth0", flags=4),
                    route(gateway="fd88::1", device="eth1", family=types_pb2.v6),
                    route(dest="fd77::/64", device="eth1", family=types_pb2.v6, priority=7),
                    route(dest="10.8.0.0/16", gateway="fd88::9", device="eth1", priority=9),
                ]
            )
            # busybox does not tell of a gateway of the other family.
            assert sorted(await guest.words("ip route")) == [
                "10.5.0.0/16 via 169.254.1.1 dev eth0",
                "10.6.0.0/16 via 10.7.7.7 dev eth0 onlink",
                "10.8.0.0/16 dev eth1 metric 9",
                "10.88.0.0/24 dev eth1 scope link src 10.88.0.2",
                "169.254.1.1 dev eth0 scope link src 10.99.0.2",
                "default via 10.88.0.1 dev eth1",
                "default via 10.88.0.9 dev eth1 metric 50",
            ]
            ipv6 = await guest.words("ip -6 route")
            assert "default via fd88::1 dev eth1 metric 1024" in ipv6
            assert "fd77::/64 dev eth1 metric 7" in ipv6
            found = {(r.dest, r.gateway, r.device, r.priority, r.mtu) for r in await agent.list_routes()}
            assert ("0.0.0.0/0", "10.88.0.9", "eth1", 50, 1300) in found
            assert ("10.8.0.0/16", "fd88::9", "eth1", 9, 0) in found

            await agent.add_arp_neighbors(
                [
                    types_pb2.ARPNeighbor(
                        toIPAddress=address("169.254.1.1"), device="eth0", lladdr="02:00:00:00:00:99"
                    ),
                    types_pb2.ARPNeighbor(
                        toIPAddress=address("fd88::77"), device="eth1", lladdr=MAC, state=0x80
                    ),
                ]
            )
            neighbours = await guest.words("ip neigh")
            assert "169.254.1.1 dev eth0 lladdr 02:00:00:00:00:99 used 0/0/0 probes 0 PERMANENT" in [
                " ".join(w if "/" not in w else "0/0/0" for w in line.split()) for line in neighbours
            ]
            assert any("fd88::77" in line and "PERMANENT" in line for line in neighbours)

            # As the host says that they are no more.
            for gone, device in (("169.254.1.1", "eth0"), ("fd88::77", "eth1")):
                told = types_pb2.ARPNeighbor(toIPAddress=address(gone), device=device, state=0x20)
                await agent.add_arp_neighbors([told])
                lines = [line for line in await guest.words("ip neigh") if gone in line]
                assert not any("lladdr" in line or "PERMANENT" in line for line in lines)

            # Asked again, it is as asked then: nothing of before stays.
            await agent.update_interface(interface("eth1", MAC, "10.88.0.3/24", mtu=1500))
            await agent.update_routes([route(gateway="10.88.0.1", device="eth1")])
            lines = await guest.words("ip addr show dev eth1")
            assert "inet 10.88.0.3/24 brd 10.88.0.255 scope global eth1" in lines
            assert not any("10.88.0.2/" in line or "inet6" in line for line in lines)
            assert sorted(await guest.words("ip route")) == [
                "10.88.0.0/24 dev eth1 scope link src 10.88.0.3",
                "default via 10.88.0.1 dev eth1",
            ]
            await wait_ping(guest, "10.88.0.1")
            seen = {one.name: one for one in await agent.list_interfaces()}
            assert set(seen) == {"lo", "eth0", "eth1"}
            assert (seen["eth1"].hwAddr, seen["eth1"].mtu) == (MAC, 1500)
            assert [one.address for one in seen["eth1"].IPAddresses] == ["10.88.0.3"]

    asyncio.run(body())


RULES = b"""*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -p tcp -m tcp --dport 81 -m conntrack --ctstate NEW -m comment --comment "no 81" -j REJECT
-A INPUT -m limit --limit 5/min -j LOG
-A OUTPUT -m owner --uid-owner 1000 -j DROP
-A OUTPUT -d {host} -j DROP
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
-A PREROUTING -p tcp -m multiport --dports 80,8080 -j REDIRECT --to-ports 15001
-A POSTROUTING -o eth0 -m mark --mark 0x7 -j MASQUERADE
COMMIT
"""


def told(rules: bytes) -> list[str]:
    """Rules and chains without comments and counters."""
    lines = [line.partition(" [")[0].strip() for line in rules.decode().splitlines()]
    return sorted(line for line in lines if line and not line.startswith("#"))


def test_packet_filters_are_set_told_and_in_force(template: Template) -> None:
    async def body() -> None:
        with tap("tap-a", "10.88.0.1/24", "fd88::1/64") as fd:
            async with clone_of(template) as guest:
                agent = guest.agent
                path = await guest.plug("a", MAC, fd)
                await agent.update_interface(
                    interface("eth0", MAC, "10.88.0.2/24", "fd88::2/64", devicePath=path)
                )
                assert "nf_tables" not in await guest.shell("cat /proc/modules"), "loaded when it is used"
                for is_ipv6, host in ((False, "10.88.0.1"), (True, "fd88::1")):
                    assert told(await agent.get_ip_tables(is_ipv6=is_ipv6)) == []
                    await wait_ping(guest, host)
                    rules = RULES.replace(b"{host}", host.encode())
                    await agent.set_ip_tables(rules, is_ipv6=is_ipv6)
                    found = told(await agent.get_ip_tables(is_ipv6=is_ipv6))
                    reject = "icmp6-port-unreachable" if is_ipv6 else "icmp-port-unreachable"
                    wanted = rules.replace(b"-j REJECT", b"-j REJECT --reject-with " + reject.encode())
                    wanted = wanted.replace(host.encode(), f"{host}/{128 if is_ipv6 else 32}".encode())
                    assert found == told(wanted)
                    pinged = await guest.shell(f"busybox ping -c 1 -W 1 {host} || true")
                    assert "1 packets received" not in pinged
                sentence = r"iptables-restore: Bad argument `nonsense'; Error occurred at line: 2$"
                with pytest.raises(InvalidArgumentError, match=sentence):
                    await agent.set_ip_tables(b"*filter\nnonsense\nCOMMIT\n", is_ipv6=False)
                assert told(await agent.get_ip_tables(is_ipv6=False)) != []

    asyncio.run(body())


def test_what_cannot_be_is_refused_by_name(template: Template) -> None:
    async def body() -> None:
        with tap("tap-a") as fd:
            async with clone_of(template) as guest:
                agent = guest.agent
                path = await guest.plug("a", MAC, fd)
                await agent.update_interface(interface("eth0", MAC, "10.88.0.2/24", devicePath=path))
                missing = await asyncio.gather(
                    agent.update_interface(interface("eth5", OTHER_MAC)),
                    agent.update_interface(interface("eth5", "", devicePath="02/1e")),
                    return_exceptions=True,
                )
                assert [type(error) for error in missing] == [DeadlineExceededError] * 2
                by_mac, by_path = map(str, missing)
                assert f"interface eth5: none with hardware address {OTHER_MAC} after 30 s" in by_mac
                assert f"eth0 ({MAC})" in by_mac
                assert "interface eth5: none at PCI path 02/1e after 30 s" in by_path
                route = types_pb2.Route
                for error, sentence, refused in (
                    (
                        KataError,
                        "interface eth0: MTU 70000: EINVAL",
                        agent.update_interface(interface("eth0", MAC, mtu=70000)),
                    ),
                    (
                        InvalidArgumentError,
                        "interface eth0: 10.88.0.2: prefix length '33', expected 0 to 32",
                        agent.update_interface(interface("eth0", MAC, "10.88.0.2/33")),
                    ),
                    (
                        KataError,
                        "route 10.9.0.0/16 via 10.77.0.1 dev eth0: ENETUNREACH",
                        agent.update_routes([route(dest="10.9.0.0/16", gateway="10.77.0.1", device="eth0")]),
                    ),
                    (
                        NotFoundError,
                        "route default via 10.88.0.1 dev eth7: no interface eth7, found eth0, lo",
                        agent.update_routes([route(gateway="10.88.0.1", device="eth7")]),
                    ),
                ):
                    with pytest.raises(error, match=sentence):
                        await refused
                assert "inet 10.88.0.2/24 brd 10.88.0.255 scope global eth0" in await guest.words("ip addr")
                with tap("tap-b") as another:
                    device = NetDevice("a", OTHER_MAC, [another])
                    with pytest.raises(QMPFailed, match="QMP netdev_add: Duplicate ID 'a'"):
                        await guest.vm.hypervisor.hotplug_net(device)
                assert "tap-b" not in {name for _, name in socket.if_nameindex()}, "QEMU has it open"

    asyncio.run(body())


@pytest.mark.parametrize("parameters", ["", "ipv6.disable=1"])
def test_a_booted_machine_loads_the_driver_when_it_is_needed(config: VMConfig, parameters: str) -> None:
    """Also one without IPv6, which has what there is of IPv4."""

    async def body() -> None:
        with tap("tap-a", "10.88.0.1/24") as fd:
            hypervisor = replace(config.hypervisor, kernel_params=parameters)
            vm = VM.new(new_id("net"), replace(config, hypervisor=hypervisor), shared_path=None)
            await vm.start()
            try:
                guest = Guest(vm)
                assert "virtio_net" not in await guest.shell("cat /proc/modules")
                # At once: neither the kernel nor the driver has seen it.
                path = await guest.plug("a", MAC, fd)
                addresses = "10.88.0.2/24", "fd88::2/64", "fe80::2/64"
                await guest.agent.update_interface(interface("eth0", MAC, *addresses, devicePath=path))
                routes = [
                    types_pb2.Route(gateway="10.88.0.1", device="eth0"),
                    types_pb2.Route(gateway="fd88::1", device="eth0", family=types_pb2.v6),
                ]
                await guest.agent.update_routes(routes)
                await wait_ping(guest, "10.88.0.1")
                found = (await guest.agent.list_interfaces())[-1].IPAddresses
                there = addresses[:1] if parameters else addresses
                assert {f"{each.address}/{each.mask}" for each in found} == set(there)
                gateways = {route.gateway for route in await guest.agent.list_routes()} - {""}
                assert gateways == ({"10.88.0.1"} if parameters else {"10.88.0.1", "fd88::1"})
            finally:
                await vm.stop()

    asyncio.run(body())
