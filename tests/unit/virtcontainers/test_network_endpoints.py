"""Which links a machine gets, as what, and what its guest is told of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from agent_client.protocols import types_pb2
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.network.endpoints import (
    Address,
    Endpoint,
    InterworkingModel,
    IPVlanEndpoint,
    MacvlanEndpoint,
    MacvtapEndpoint,
    Neighbor,
    NetworkInfo,
    Route,
    TuntapEndpoint,
    VethEndpoint,
    agent_interface,
    agent_neighbors,
    agent_routes,
    is_configured,
    new_endpoint,
)

STATIC, KERNEL = 4, 2
ETH0 = NetworkInfo(
    index=2,
    name="eth0",
    kind="veth",
    mtu=1400,
    hardware_addr="02:00:00:00:00:02",
    flags=0x11043,
    bus="",
    tun_type=0,
    addresses=(Address("10.0.0.2", 24), Address("fd00::2", 64)),
    routes=(),
    neighbors=(),
)
DEFAULT = Route(
    destination="",
    gateway="10.0.0.1",
    source="",
    scope=0,
    flags=4,
    priority=7,
    mtu=1300,
    protocol=STATIC,
    ipv6=False,
)


def endpoint(info: NetworkInfo, *others: Endpoint, model: str = "tcfilter") -> Endpoint:
    return new_endpoint(info, InterworkingModel(model), others, where="network namespace /run/netns/t")


@pytest.mark.parametrize(
    ("kind", "wanted", "type_"),
    [
        ("veth", VethEndpoint, "virtual"),
        ("", VethEndpoint, "virtual"),
        ("macvlan", MacvlanEndpoint, "macvlan"),
        ("macvtap", MacvtapEndpoint, "macvtap"),
        ("ipvlan", IPVlanEndpoint, "ipvlan"),
        ("tun", TuntapEndpoint, "tuntap"),
    ],
)
def test_each_kind_of_link_is_katas_endpoint(kind: str, wanted: type[Endpoint], type_: str) -> None:
    found = endpoint(replace(ETH0, kind=kind, tun_type=2 if kind == "tun" else 0))
    assert type(found) is wanted
    assert found.type == type_


@pytest.mark.parametrize(
    ("info", "words"),
    [
        (replace(ETH0, kind="bridge"), "found kind bridge, expected one of veth, macvlan"),
        (replace(ETH0, kind="tun", tun_type=1), "found a TUN device, expected a TAP"),
        (replace(ETH0, kind="", bus="pci"), "found a physical PCI device, expected a virtual one"),
    ],
)
def test_what_no_machine_can_have_is_refused_by_name(info: NetworkInfo, words: str) -> None:
    with pytest.raises(InvalidArgumentError) as refusal:
        endpoint(info)
    assert str(refusal.value).startswith("interface eth0 of network namespace /run/netns/t: ")
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "info",
    [
        replace(ETH0, addresses=()),
        replace(ETH0, name="lo", flags=0x9),
        replace(ETH0, name="tap3_kata", kind="tun"),
    ],
)
def test_loopback_bare_links_and_our_own_taps_are_no_endpoints(info: NetworkInfo) -> None:
    assert is_configured(ETH0)
    assert not is_configured(info)


def test_taps_are_numbered_as_in_kata_and_no_number_comes_twice() -> None:
    first = endpoint(ETH0)
    second = endpoint(replace(ETH0, index=3, name="net1"), first)
    assert (first.tap, second.tap) == ("tap0_kata", "tap1_kata")
    assert endpoint(replace(ETH0, index=4, name="net2"), second).tap == "tap2_kata"


def test_a_macvtap_is_the_machines_side_itself() -> None:
    found = endpoint(replace(ETH0, kind="macvtap"), model="macvtap")
    assert found.tap == "eth0"
    assert found.to_connect("pod")["model"] == "existing"


def test_an_ipvlan_is_always_redirected() -> None:
    assert endpoint(replace(ETH0, kind="ipvlan"), model="macvtap").model is InterworkingModel.TCFILTER


def test_the_child_s_answer_is_read_as_it_was_written() -> None:
    info = replace(ETH0, routes=(DEFAULT,), neighbors=(Neighbor("10.0.0.9", "02:00:00:00:00:09", 128, 0),))
    assert NetworkInfo.from_json(json.loads(json.dumps(info.to_json()))) == info


def test_the_guest_is_told_of_an_interface_as_kata_tells() -> None:
    found = endpoint(replace(ETH0, flags=0x80 | ETH0.flags))
    found.pci_path = "02/01"
    assert agent_interface(found) == types_pb2.Interface(
        device="eth0",
        name="eth0",
        IPAddresses=[
            types_pb2.IPAddress(family=types_pb2.v4, address="10.0.0.2", mask="24"),
            types_pb2.IPAddress(family=types_pb2.v6, address="fd00::2", mask="64"),
        ],
        mtu=1400,
        hwAddr="02:00:00:00:00:02",
        devicePath="02/01",
        type="virtual",
        raw_flags=0x80,
    )


def test_routes_come_with_all_they_have_and_without_the_kernels() -> None:
    link = replace(DEFAULT, destination="10.0.0.0/24", gateway="", scope=253, protocol=KERNEL)
    v6 = replace(DEFAULT, gateway="fd00::1", flags=0, priority=1024, mtu=0, ipv6=True)
    found = agent_routes([endpoint(replace(ETH0, routes=(DEFAULT, link, v6)))])
    assert found == [
        types_pb2.Route(gateway="10.0.0.1", device="eth0", flags=4, priority=7, mtu=1300),
        types_pb2.Route(gateway="fd00::1", device="eth0", family=types_pb2.v6, priority=1024),
    ]


def test_neighbors_are_those_that_were_set_and_the_default_gateway() -> None:
    neighbors = (
        Neighbor("10.0.0.9", "02:00:00:00:00:09", 0x80, 0),
        Neighbor("10.0.0.1", "02:00:00:00:00:01", 0x02, 0),
        Neighbor("10.0.0.3", "02:00:00:00:00:03", 0x02, 0),  # learned, and no gateway
        Neighbor("10.0.0.1", "02:00:00:00:00:01", 0x04, 0),  # stale
        Neighbor("10.0.0.4", "", 0x80, 0),
        Neighbor("fd00::9", "02:00:00:00:00:19", 0x80, 0x80),
    )
    found = agent_neighbors([endpoint(replace(ETH0, routes=(DEFAULT,), neighbors=neighbors))])
    assert [(each.toIPAddress.address, each.state) for each in found] == [
        ("10.0.0.9", 0x80),
        ("10.0.0.1", 0x02),
        ("fd00::9", 0x80),
    ]
    assert found[2].toIPAddress.family == types_pb2.v6
    assert found[2].flags == 0x80
