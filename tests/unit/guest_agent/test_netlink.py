"""rtnetlink's messages, byte for byte as the kernel and iproute2 exchange them (little-endian)."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from agent_client.protocols import types_pb2
from guest.agent import netlink, network
from guest.agent.netlink import Address, Link, Route, attribute, attributes, messages
from guest.agent.network import add_arp_neighbors, describe, route_of, update_routes
from ttrpc import Code, StatusError

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="bytes of a little-endian machine")


def test_attributes_are_padded_and_found_again() -> None:
    data = attribute(3, "eth0") + attribute(4, 1500) + attribute(1, bytes.fromhex("020000000001"))
    assert data.hex(" ", 4) == "09000300 65746830 00000000 08000400 dc050000 0a000100 02000000 00010000"
    assert attributes(data) == {3: b"eth0\0", 4: b"\xdc\x05\0\0", 1: b"\x02\0\0\0\0\1"}


@pytest.mark.parametrize("data", [b"\x05", b"\x03\0\1\0", b"\x09\0\1\0abcd"])
def test_attributes_that_do_not_fit_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="netlink"):
        attributes(data)


@pytest.mark.parametrize("data", [b"\x05", b"\x0f" + bytes(15), b"\x20" + bytes(15)])
def test_messages_that_do_not_fit_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="netlink"):
        messages(data)


def test_messages_follow_one_another() -> None:
    one = bytes.fromhex("14000000 0300 0200 07000000 00000000 00000000")
    other = bytes.fromhex("11000000 1000 0000 08000000 00000000 ff") + bytes(3)
    assert messages(one + other) == [(3, 2, 7, bytes(4)), (16, 0, 8, b"\xff")]


def test_a_link() -> None:
    content = bytes.fromhex("00000100 02000000 83100000 00000000") + attribute(3, "eth0") + attribute(4, 1500)
    content += attribute(1, bytes.fromhex("0200000000ff"))
    assert Link.parse(content) == Link(2, "eth0", "02:00:00:00:00:ff", 1500, 0x1083)


def test_addresses_have_their_broadcast_and_those_of_ipv6_are_used_at_once() -> None:
    assert Address(socket.AF_INET, "10.0.0.5", 24).content(7).hex(" ", 4) == (
        "02180000 07000000 08000200 0a000005 08000100 0a000005 08000400 0a0000ff"
    )
    assert Address(socket.AF_INET, "10.0.0.5", 31).content(7).hex(" ", 4) == (
        "021f0000 07000000 08000200 0a000005 08000100 0a000005"
    )
    ipv6 = Address(socket.AF_INET6, "fd00::5", 64)
    assert ipv6.content(7)[:8].hex() == "0a40020007000000"
    assert Address.parse(ipv6.content(7)) == (7, ipv6)


ROUTES = [
    (
        types_pb2.Route(gateway="10.0.0.1", device="eth0"),
        Route(socket.AF_INET, "0.0.0.0/0", 2, "10.0.0.1"),
        "route default via 10.0.0.1 dev eth0",
    ),
    (
        types_pb2.Route(
            dest="10.9.8.7/16", device="eth0", source="10.0.0.5", scope=253, mtu=1400, priority=100
        ),
        Route(socket.AF_INET, "10.9.0.0/16", 2, "", "10.0.0.5", 253, 100, 0, 1400),
        "route 10.9.8.7/16 dev eth0 src 10.0.0.5 metric 100",
    ),
    (
        # Linkdown is a state, onlink is for the kernel to heed.
        types_pb2.Route(dest="10.1.1.1", gateway="1.1.1.1", device="eth0", flags=4 | 16),
        Route(socket.AF_INET, "10.1.1.1/32", 2, "1.1.1.1", flags=4),
        "route 10.1.1.1 via 1.1.1.1 dev eth0",
    ),
    (
        types_pb2.Route(gateway="fe80::0:1", device="eth0", family=types_pb2.v6, scope=0),
        Route(socket.AF_INET6, "::/0", 2, "fe80::1", priority=1024),
        "route default via fe80::0:1 dev eth0",
    ),
    (
        types_pb2.Route(dest="10.4.0.0/16", gateway="fe80::1", device="eth0"),
        Route(socket.AF_INET, "10.4.0.0/16", 2, "fe80::1"),
        "route 10.4.0.0/16 via fe80::1 dev eth0",
    ),
]


@pytest.mark.parametrize(("message", "route", "sentence"), ROUTES)
def test_routes_are_told_to_the_kernel_as_it_tells_them(
    message: types_pb2.Route, route: Route, sentence: str
) -> None:
    assert route_of(message, 2) == route
    assert Route.parse(route.content(netlink.RTPROT_BOOT)) == (netlink.RTPROT_BOOT, route)
    assert describe(message) == sentence


def test_an_interface_is_found_behind_all_of_its_bridges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_SYS_CLASS_NET", str(tmp_path))
    places = {
        "eth0": "pci0000:00/0000:00:02.0/0000:01:1f.0/virtio3/net/eth0",
        "eth1": "pci0000:00/0000:00:1f.0/virtio4/net/eth1",
        "eth2": "pci0000:00/0000:00:02.0/0000:01:03.1/virtio5/net/eth2",
        "lo": "virtual/net/lo",
    }
    for name, place in places.items():
        (tmp_path / name).symlink_to(f"../../devices/{place}")

    def found(pci_path: str) -> list[str]:
        return [name for name in (*places, "gone") if network._is_at(name, pci_path)]

    assert found("02/1f") == ["eth0"]
    assert found("1f") == found("1F.0") == ["eth1"]
    assert found("02/3.1") == ["eth2"]
    assert found("02") == found("02/03") == found("03/1f") == []


def test_a_route_in_bytes() -> None:
    route = Route(socket.AF_INET, "10.9.0.0/16", 2, "10.0.0.1", mtu=1400)
    assert route.content(3).hex(" ", 4) == (
        "02100000 fe030001 00000000 08000400 02000000 08000100 0a090000 08000500 0a000001 "
        "0c000800 08000200 78050000"
    )


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        (types_pb2.Route(dest="10.0.0.0/33", device="lo"), r"route 10.0.0.0/33 dev lo: prefix length '33'"),
        (types_pb2.Route(dest="10.0.0/8", device="lo"), r"'10.0.0' is no IPv4 address"),
        (types_pb2.Route(gateway="fe80::g", device="lo"), r"'fe80::g' is no IPv6 address"),
        (types_pb2.Route(dest="fd00::/64", source="10.0.0.1", device="lo"), r"'10.0.0.1' is no IPv6 address"),
    ],
)
def test_a_route_that_is_none_is_refused_before_any_is_changed(
    message: types_pb2.Route, sentence: str
) -> None:
    with pytest.raises(StatusError, match=sentence) as raised:
        update_routes([message])
    assert raised.value.code is Code.INVALID_ARGUMENT


def test_neighbours() -> None:
    content = netlink.neighbour_content(2, "10.0.0.1", bytes.fromhex("020000000001"), 0x80, 0)
    assert content.hex(" ", 4) == ("02000000 02000000 80000000 08000100 0a000001 0a000200 02000000 00010000")
    for message, sentence in (
        (types_pb2.ARPNeighbor(device="lo", lladdr="nonsense"), "'' is no IPv4 address"),
        (
            types_pb2.ARPNeighbor(
                toIPAddress=types_pb2.IPAddress(address="10.0.0.1"), device="nosuch", lladdr="02:00"
            ),
            "neighbour 10.0.0.1 dev nosuch lladdr 02:00: no interface nosuch",
        ),
        (
            types_pb2.ARPNeighbor(
                toIPAddress=types_pb2.IPAddress(address="10.0.0.1"), device="lo", lladdr="2:q"
            ),
            "hardware address '2:q'",
        ),
    ):
        with pytest.raises(StatusError, match=sentence):
            add_arp_neighbors([message])


def test_the_kernel_is_listened_to() -> None:
    with netlink.Rtnl() as rtnl:
        lo = next(link for link in rtnl.links() if link.name == "lo")
        assert lo.flags & 0x8
        assert (lo.index, Address(socket.AF_INET, "127.0.0.1", 8)) in rtnl.addresses()
        rtnl.routes()
        with pytest.raises(netlink.NetlinkError, match=r"^\[Errno \d+\] E[A-Z]+: "):
            rtnl.change(netlink.RTM_NEWLINK, netlink.link_content(1 << 30))
