"""What a link of the pod's namespace becomes in the machine, after Kata's `*_endpoint.go`.

Plain data: nothing here touches a namespace.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, ClassVar

from agent_client.protocols import types_pb2
from virtcontainers.errors import InvalidArgumentError

_IFF_LOOPBACK = 0x8  # <linux/if.h>
_IFF_NOARP = 0x80
_NUD_REACHABLE = 0x02  # <linux/neighbour.h>
_NUD_FAILED = 0x20
_NUD_PERMANENT = 0x80
_RTPROT_KERNEL = 2  # <linux/rtnetlink.h>
_TUN = 1  # <linux/if_tun.h>, IFF_TUN

_TAP_NAME = re.compile(r"tap(\d+)_kata")


class InterworkingModel(StrEnum):
    """`internetworking_model`: how a link and the machine's TAP are connected."""

    TCFILTER = "tcfilter"
    MACVTAP = "macvtap"
    NONE = "none"
    """Not at all: whoever configured this connects the TAP."""


@dataclass(frozen=True)
class Address:
    address: str
    prefix: int


@dataclass(frozen=True)
class Route:
    """Of the main table. `destination` is empty for a default route."""

    destination: str
    gateway: str
    source: str
    scope: int
    flags: int
    priority: int
    mtu: int
    protocol: int
    ipv6: bool


@dataclass(frozen=True)
class Neighbor:
    address: str
    lladdr: str
    state: int
    flags: int


@dataclass(frozen=True)
class NetworkInfo:
    """A link as it was found in the namespace."""

    index: int
    name: str
    kind: str
    """The kernel's; "" for what has none, a device."""
    mtu: int
    hardware_addr: str
    flags: int
    bus: str
    """Of a physical device: "pci"."""
    tun_type: int
    addresses: tuple[Address, ...]
    routes: tuple[Route, ...]
    neighbors: tuple[Neighbor, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> NetworkInfo:
        lists = {
            "addresses": tuple(Address(**each) for each in found["addresses"]),
            "routes": tuple(Route(**each) for each in found["routes"]),
            "neighbors": tuple(Neighbor(**each) for each in found["neighbors"]),
        }
        return cls(**{**found, **lists})


@dataclass
class Endpoint:
    """One link and its network card in the machine."""

    type: ClassVar[str]
    """Kata's EndpointType."""

    info: NetworkInfo
    number: int
    model: InterworkingModel
    pci_path: str = ""
    """Set once it is plugged in."""

    @property
    def tap(self) -> str:
        """The name of the machine's side in the namespace, Kata's."""
        return f"tap{self.number}_kata"

    def to_connect(self, owner: str) -> dict[str, Any]:
        """What the child in the namespace needs to connect it for a sandbox, and to undo that."""
        return {
            "owner": owner,
            "index": self.info.index,
            "name": self.info.name,
            "tap": self.tap,
            "model": self.model.value,
            "mtu": self.info.mtu,
            "hardware_addr": self.info.hardware_addr,
            "addresses": [[each.address, each.prefix] for each in self.info.addresses],
        }


class VethEndpoint(Endpoint):
    type = "virtual"


class MacvlanEndpoint(Endpoint):
    type = "macvlan"


class IPVlanEndpoint(Endpoint):
    type = "ipvlan"


class TuntapEndpoint(Endpoint):
    type = "tuntap"


class MacvtapEndpoint(Endpoint):
    """A macvtap that is there already: it is itself the machine's side."""

    type = "macvtap"

    @property
    def tap(self) -> str:
        return self.info.name

    def to_connect(self, owner: str) -> dict[str, Any]:
        return {**super().to_connect(owner), "model": "existing"}


_ENDPOINTS: Mapping[str, type[Endpoint]] = {
    # A device of no more particular kind: Kata handles it as a veth.
    "": VethEndpoint,
    "veth": VethEndpoint,
    "macvlan": MacvlanEndpoint,
    "macvtap": MacvtapEndpoint,
    "ipvlan": IPVlanEndpoint,
    "tun": TuntapEndpoint,
}


def is_configured(info: NetworkInfo) -> bool:
    """Whether the machine is to have it: base devices of tunnels, which every namespace has, have no
    address."""
    return not info.flags & _IFF_LOOPBACK and bool(info.addresses) and not _TAP_NAME.fullmatch(info.name)


def new_endpoint(
    info: NetworkInfo, model: InterworkingModel, others: Iterable[Endpoint], *, where: str
) -> Endpoint:
    """Raises InvalidArgumentError for a link that a machine cannot have, naming it."""
    what = f"interface {info.name} of {where}"
    if info.bus == "pci":
        raise InvalidArgumentError(
            f"{what}: found a physical PCI device, expected a virtual one: a machine could have it by VFIO "
            "only, and cold_plug_vfio is not implemented"
        )
    if info.kind == "tun" and info.tun_type == _TUN:
        raise InvalidArgumentError(
            f"{what}: found a TUN device, expected a TAP: it carries no Ethernet frames"
        )
    if info.kind not in _ENDPOINTS:
        kinds = ", ".join(kind for kind in _ENDPOINTS if kind)
        raise InvalidArgumentError(f"{what}: found kind {info.kind}, expected one of {kinds}")
    endpoint = _ENDPOINTS[info.kind]
    if endpoint is IPVlanEndpoint:
        # Its MAC address is its parent's: a macvtap above it cannot work.
        model = InterworkingModel.TCFILTER
    taken = [other.number for other in others]
    return endpoint(info, max(taken, default=-1) + 1, model)


def agent_interface(endpoint: Endpoint) -> types_pb2.Interface:
    info = endpoint.info
    return types_pb2.Interface(
        device=info.name,
        name=info.name,
        IPAddresses=[
            types_pb2.IPAddress(
                family=_family(":" in each.address), address=each.address, mask=str(each.prefix)
            )
            for each in info.addresses
        ],
        mtu=info.mtu,
        hwAddr=info.hardware_addr,
        devicePath=endpoint.pci_path,
        type=endpoint.type,
        raw_flags=info.flags & _IFF_NOARP,
    )


def agent_routes(endpoints: Iterable[Endpoint]) -> list[types_pb2.Route]:
    """All but those that the guest's kernel makes itself of the addresses."""
    return [
        types_pb2.Route(
            dest=route.destination,
            gateway=route.gateway,
            device=endpoint.info.name,
            source=route.source,
            scope=route.scope,
            family=_family(route.ipv6),
            flags=route.flags,
            mtu=route.mtu,
            priority=route.priority,
        )
        for endpoint in endpoints
        for route in endpoint.info.routes
        if route.protocol != _RTPROT_KERNEL
    ]


def agent_neighbors(endpoints: Iterable[Endpoint]) -> list[types_pb2.ARPNeighbor]:
    """Those that somebody has set, and the default gateways', which many pods that start at once would all
    ask for."""
    return [
        types_pb2.ARPNeighbor(
            toIPAddress=types_pb2.IPAddress(family=_family(":" in each.address), address=each.address),
            device=endpoint.info.name,
            lladdr=each.lladdr,
            state=each.state,
            flags=each.flags,
        )
        for endpoint in endpoints
        for each in endpoint.info.neighbors
        if each.lladdr and _is_for_the_guest(each, endpoint.info.routes)
    ]


def static_neighbors(endpoints: Iterable[Endpoint]) -> set[tuple[int, str]]:
    """Those that somebody has set: the link's index, and the address."""
    return {
        (endpoint.info.index, each.address)
        for endpoint in endpoints
        for each in endpoint.info.neighbors
        if each.lladdr and each.state == _NUD_PERMANENT
    }


def agent_gone_neighbors(
    endpoints: Iterable[Endpoint], gone: Collection[tuple[int, str]]
) -> list[types_pb2.ARPNeighbor]:
    """No call removes a neighbour. One that is said to have failed is what the kernel makes of it before it
    removes it: it asks for the address again."""
    return [
        types_pb2.ARPNeighbor(
            toIPAddress=types_pb2.IPAddress(family=_family(":" in address), address=address),
            device=endpoint.info.name,
            state=_NUD_FAILED,
        )
        for endpoint in endpoints
        for index, address in sorted(gone)
        if index == endpoint.info.index
    ]


def _is_for_the_guest(neighbor: Neighbor, routes: Sequence[Route]) -> bool:
    if neighbor.state == _NUD_PERMANENT:
        return True
    gateways = {route.gateway for route in routes if not route.destination}
    return neighbor.state == _NUD_REACHABLE and neighbor.address in gateways


def _family(ipv6: bool) -> types_pb2.IPFamily:
    return types_pb2.v6 if ipv6 else types_pb2.v4
