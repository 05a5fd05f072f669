"""The machine's network, which its containers share: interfaces, routes and neighbours as the host asks."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterable, Iterator

from agent_client.protocols import types_pb2
from guest.agent import netlink
from guest.agent.netlink import Address, Link, NetlinkError, Route, Rtnl
from ttrpc import Code, StatusError

log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
_POLL_S = 0.02
_MAX_NAME_BYTES = 15  # IFNAMSIZ
_RENAMES = 10
_SYS_CLASS_NET = "/sys/class/net"
_IPV6_SETTINGS = "/proc/sys/net/ipv6/conf"
_IPV6_PRIORITY = 1024  # IP6_RT_PRIO_USER: what the kernel takes for none
_LINK_LOCAL = "fe80:"


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StatusError(Code.INTERNAL, f"{what}: {error.strerror or error}") from error


@contextlib.contextmanager
def _unless(number: int) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.errno != number:
            raise


def _invalid(what: str) -> StatusError:
    return StatusError(Code.INVALID_ARGUMENT, what)


def _is_left_out(family: int, what: str) -> bool:
    """As with Kata's agent: on a kernel that was told to have no IPv6 (ipv6.disable=1) a pod has none."""
    if family != socket.AF_INET6 or os.path.exists(_IPV6_SETTINGS):
        return False
    from guest.agent.modules import load_module

    with contextlib.suppress(OSError):
        load_module("ipv6")
    if os.path.exists(_IPV6_SETTINGS):
        return False
    log.warning("this kernel has no IPv6: without %s", what)
    return True


# What the host says, in the kernel's terms


def _mac(address: str, what: str) -> bytes:
    try:
        packed = bytes.fromhex(address.replace(":", ""))
    except ValueError:
        packed = b""
    if not packed:
        raise _invalid(f"{what}: hardware address {address!r}, expected one as 02:00:00:00:00:01")
    return packed


def _packed(family: int, address: str, what: str) -> str:
    """In the kernel's spelling."""
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, address))
    except OSError:
        version = "IPv6" if family == socket.AF_INET6 else "IPv4"
        raise _invalid(f"{what}: {address!r} is no {version} address") from None


def _prefix(family: int, length: str, what: str) -> int:
    most = 128 if family == socket.AF_INET6 else 32
    if not length.isdecimal() or int(length) > most:
        raise _invalid(f"{what}: prefix length {length!r}, expected 0 to {most}")
    return int(length)


def _address(message: types_pb2.IPAddress, what: str) -> Address:
    family = netlink.family_of(message.address)
    return Address(
        family,
        _packed(family, message.address, what),
        _prefix(family, message.mask, f"{what}: {message.address}"),
    )


def route_of(message: types_pb2.Route, index: int) -> Route:
    """Comparable with the kernel's own. Raises StatusError (INVALID_ARGUMENT)."""
    what = describe(message)
    destination, _, length = message.dest.partition("/")
    ipv6 = message.family == types_pb2.v6 or ":" in destination
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    most = 128 if ipv6 else 32
    if not destination:
        destination, length = "::" if ipv6 else "0.0.0.0", "0"
    prefix = _prefix(family, length or str(most), what)
    bits = int.from_bytes(socket.inet_pton(family, _packed(family, destination, what)), "big")
    network = bits >> (most - prefix) << (most - prefix)
    gateway = message.gateway
    source = message.source.partition("/")[0]
    return Route(
        family,
        f"{socket.inet_ntop(family, network.to_bytes(most // 8, 'big'))}/{prefix}",
        index,
        _packed(netlink.family_of(gateway), gateway, what) if gateway else "",
        _packed(family, source, what) if source else "",
        # IPv6's have none.
        0 if ipv6 else message.scope,
        message.priority or (_IPV6_PRIORITY if ipv6 else 0),
        # The others tell the route's state where it was read, and are refused.
        message.flags & netlink.RTNH_F_ONLINK,
        message.mtu,
    )


def describe(message: types_pb2.Route) -> str:
    """As `ip route` would."""
    words = ["route", message.dest or "default"]
    if message.gateway:
        words += ["via", message.gateway]
    words += ["dev", message.device]
    if message.source:
        words += ["src", message.source]
    if message.priority:
        words += ["metric", str(message.priority)]
    return " ".join(words)


# Interfaces


def _is_at(name: str, pci_path: str) -> bool:
    """Whether the interface is of this PCI device, by its link in sysfs, which names every bridge on the way:
    looking through the device's folders takes an emulated processor long."""
    try:
        path = os.readlink(f"{_SYS_CLASS_NET}/{name}")
    except OSError:
        return False  # no device's, or renamed meanwhile
    # "0000:01:03.0" is slot 3, function 0, of bus 1; "pci0000:00" is none.
    slots = [part.rpartition(":")[-1] for part in path.split("/") if part.count(":") == 2]
    wanted = [slot.partition(".") for slot in pci_path.split("/")]
    return slots == [f"{int(slot, 16):02x}.{int(function or '0', 16):x}" for slot, _, function in wanted]


def _find(rtnl: Rtnl, interface: types_pb2.Interface) -> Link | None:
    if interface.devicePath:
        return next((link for link in rtnl.links() if _is_at(link.name, interface.devicePath)), None)
    address = interface.hwAddr.lower()
    return next((link for link in rtnl.links() if link.address == address), None)


async def _appear(rtnl: Rtnl, interface: types_pb2.Interface) -> Link:
    """The host may ask before the kernel has seen what was plugged in, or its driver was loaded."""
    deadline = asyncio.get_running_loop().time() + _TIMEOUT_S
    while (link := _find(rtnl, interface)) is None:
        if asyncio.get_running_loop().time() > deadline:
            place = (
                f"at PCI path {interface.devicePath}"
                if interface.devicePath
                else f"with hardware address {interface.hwAddr}"
            )
            names = ", ".join(f"{link.name} ({link.address})" for link in rtnl.links())
            raise StatusError(
                Code.DEADLINE_EXCEEDED,
                f"interface {interface.name}: none {place} after {_TIMEOUT_S:g} s, found {names}",
            )
        await asyncio.sleep(_POLL_S)
    return link


async def update_interface(interface: types_pb2.Interface) -> None:
    """Make it what the message says: name, addresses, MTU, ARP; and up. Raises StatusError.

    An interface that has the name already gets the other's: the two were taken for each other.
    """
    what = f"interface {interface.name}"
    if not 0 < len(interface.name.encode()) <= _MAX_NAME_BYTES or "/" in interface.name:
        raise _invalid(f"{what}: expected a name of 1 to {_MAX_NAME_BYTES} bytes")
    if not interface.devicePath and not interface.hwAddr:
        raise _invalid(f"{what}: expected a devicePath or a hwAddr to find it by")
    mac = _mac(interface.hwAddr, what) if interface.hwAddr else b""
    addresses = [
        address
        for address in (_address(message, what) for message in interface.IPAddresses)
        if not _is_left_out(address.family, f"{what}: address {address}")
    ]
    with _naming(what), Rtnl() as rtnl:
        link = await _appear(rtnl, interface)
        # From here on nothing is awaited: another call finds this one done.
        if mac and link.address != mac.hex(":"):
            with _naming(f"{what}: hardware address {interface.hwAddr}"):
                _set(rtnl, link.index, down=True)
                _set(rtnl, link.index, rest=netlink.attribute(netlink.IFLA_ADDRESS, mac))
        if link.name != interface.name:
            _rename(rtnl, link, interface.name)
        # An emulated processor is slow: what is so already is left alone.
        if interface.mtu not in (0, link.mtu):
            with _naming(f"{what}: MTU {interface.mtu}"):
                _set(rtnl, link.index, rest=netlink.attribute(netlink.IFLA_MTU, interface.mtu))
        noarp = interface.raw_flags & netlink.IFF_NOARP
        if noarp != link.flags & netlink.IFF_NOARP:
            _set(rtnl, link.index, flags=noarp, change=netlink.IFF_NOARP)
        _set_up_ipv6(interface.name, addresses)
        _set_addresses(rtnl, link.index, addresses, what)
        _set(rtnl, link.index, flags=netlink.IFF_UP, change=netlink.IFF_UP)


def _set(
    rtnl: Rtnl, index: int, *, flags: int = 0, change: int = 0, rest: bytes = b"", down: bool = False
) -> None:
    change |= netlink.IFF_UP if down else 0
    rtnl.change(netlink.RTM_NEWLINK, netlink.link_content(index, flags=flags, change=change, rest=rest))


def _rename(rtnl: Rtnl, link: Link, name: str) -> None:
    """Old kernels do so only to an interface that is down. One that has the name already gets the other's."""
    with _naming(f"interface {link.name}: new name {name}"):
        _set(rtnl, link.index, down=True)
        for _ in range(_RENAMES):
            if _call(rtnl, link.index, name):
                return
            # It was here, or has just come: plugged in with this one, and named by the kernel.
            for other in rtnl.links():
                if other.name == name:
                    _make_room(rtnl, other, link, name)
        raise NetlinkError(errno.EEXIST, "EEXIST: others take it again and again")


def _make_room(rtnl: Rtnl, other: Link, link: Link, name: str) -> None:
    # Or its IPv6 addresses would be gone; its routes are.
    _write_setting(name, "keep_addr_on_down", 1)
    _set(rtnl, other.index, down=True)
    _call(rtnl, other.index, f"swap{other.index}")
    _call(rtnl, link.index, name)
    if not _call(rtnl, other.index, link.name):
        # That, too, was taken by one that has come.
        _call(rtnl, other.index, "eth%d")
    if other.flags & netlink.IFF_UP:
        _set(rtnl, other.index, flags=netlink.IFF_UP, change=netlink.IFF_UP)


def _call(rtnl: Rtnl, index: int, name: str) -> bool:
    """Whether the name was free."""
    with _unless(errno.EEXIST):
        _set(rtnl, index, rest=netlink.attribute(netlink.IFLA_IFNAME, name))
        return True
    return False


def _set_up_ipv6(name: str, addresses: Iterable[Address]) -> None:
    """The namespace whose addresses these are has IPv6, and a link-local address, or has not: so has this."""
    ipv6 = [address.address for address in addresses if address.family == socket.AF_INET6]
    # 1 is none: the kernel would make one of its own beside the one that is asked for.
    has_link_local = any(address.startswith(_LINK_LOCAL) for address in ipv6)
    _write_setting(name, "addr_gen_mode", 1 if has_link_local else 0)
    _write_setting(name, "disable_ipv6", 0 if ipv6 else 1)


def _write_setting(name: str, setting: str, value: int) -> None:
    # A kernel without IPv6, or an MTU that is too small for it, has no such file; addresses will say so.
    with contextlib.suppress(FileNotFoundError), open(f"{_IPV6_SETTINGS}/{name}/{setting}", "w") as file:
        file.write(str(value))


def _set_addresses(rtnl: Rtnl, index: int, wanted: list[Address], what: str) -> None:
    keeps_own = not any(address.address.startswith(_LINK_LOCAL) for address in wanted)
    for found_index, address in rtnl.addresses():
        if found_index != index or address in wanted:
            continue
        if keeps_own and address.address.startswith(_LINK_LOCAL):
            continue
        # A secondary address ends with its primary one.
        with _naming(f"{what}: removing address {address}"), _unless(errno.EADDRNOTAVAIL):
            rtnl.change(netlink.RTM_DELADDR, address.content(index))
    for address in wanted:
        with _naming(f"{what}: address {address}"):
            rtnl.change(
                netlink.RTM_NEWADDR, address.content(index), netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
            )


def list_interfaces() -> list[types_pb2.Interface]:
    with _naming("interfaces"), Rtnl() as rtnl:
        links, addresses = rtnl.links(), rtnl.addresses()
    return [
        types_pb2.Interface(
            device=link.name,
            name=link.name,
            hwAddr=link.address,
            mtu=link.mtu,
            raw_flags=link.flags & netlink.IFF_NOARP,
            IPAddresses=[
                types_pb2.IPAddress(
                    family=types_pb2.v6 if address.family == socket.AF_INET6 else types_pb2.v4,
                    address=address.address,
                    mask=str(address.prefix),
                )
                for index, address in addresses
                if index == link.index
            ],
        )
        for link in links
    ]


def own_addresses() -> list[str]:
    """All but loopback and link-local ones, of interfaces that are up."""
    with _naming("interfaces"), Rtnl() as rtnl:
        up = {link.index for link in rtnl.links() if link.name != "lo" and link.flags & netlink.IFF_UP}
        return [
            address.address
            for index, address in rtnl.addresses()
            if index in up and not address.address.startswith(_LINK_LOCAL)
        ]


# Routes and neighbours


def update_routes(routes: Iterable[types_pb2.Route]) -> list[types_pb2.Route]:
    """Make these all the routes there are, beside those that the kernel has made itself of addresses and of
    routers' advertisements; gives them all. Raises StatusError that names the route; those before it are
    there then."""
    with _naming("routes"), Rtnl() as rtnl:
        indexes = {link.name: link.index for link in rtnl.links()}
        wanted: dict[Route, str] = {}
        for message in routes:
            what = describe(message)
            route = route_of(message, _index(indexes, message.device, what))
            if not _is_left_out(route.family, what):
                wanted[route] = what
        there = {
            route: protocol
            for protocol, route in rtnl.routes()
            if protocol not in (netlink.RTPROT_KERNEL, netlink.RTPROT_RA)
        }
        for route, protocol in there.items():
            if route not in wanted:
                with _naming(f"removing route {route.destination} {route.gateway}"):
                    rtnl.change(netlink.RTM_DELROUTE, route.content(protocol))
        # Gateways must be reachable, by the narrower scopes first.
        for route in sorted(wanted, key=lambda route: (bool(route.gateway), -route.scope)):
            if route in there:
                continue
            # The kernel may have made it, of an address.
            with _naming(wanted[route]), _unless(errno.EEXIST):
                rtnl.change(
                    netlink.RTM_NEWROUTE,
                    route.content(netlink.RTPROT_BOOT),
                    netlink.NLM_F_CREATE | netlink.NLM_F_APPEND,
                )
        return _routes(rtnl, indexes)


def _index(indexes: dict[str, int], name: str, what: str) -> int:
    if name not in indexes:
        raise StatusError(
            Code.NOT_FOUND, f"{what}: no interface {name}, found {', '.join(sorted(indexes)) or 'none'}"
        )
    return indexes[name]


def list_routes() -> list[types_pb2.Route]:
    """All of the main table, the kernel's too."""
    with _naming("routes"), Rtnl() as rtnl:
        return _routes(rtnl, {link.name: link.index for link in rtnl.links()})


def _routes(rtnl: Rtnl, indexes: dict[str, int]) -> list[types_pb2.Route]:
    names = {index: name for name, index in indexes.items()}
    return [
        types_pb2.Route(
            dest=route.destination,
            gateway=route.gateway,
            device=names.get(route.index, ""),
            source=route.source,
            scope=route.scope,
            family=types_pb2.v6 if route.family == socket.AF_INET6 else types_pb2.v4,
            flags=route.flags,
            mtu=route.mtu,
            priority=route.priority,
        )
        for _, route in rtnl.routes()
    ]


def add_arp_neighbors(neighbors: Iterable[types_pb2.ARPNeighbor]) -> None:
    """Those without a state are permanent. Raises StatusError that names the one at fault; those before it
    are there then."""
    with _naming("neighbours"), Rtnl() as rtnl:
        indexes = {link.name: link.index for link in rtnl.links()}
        for message in neighbors:
            what = f"neighbour {message.toIPAddress.address} dev {message.device} lladdr {message.lladdr}"
            family = netlink.family_of(message.toIPAddress.address)
            content = netlink.neighbour_content(
                _index(indexes, message.device, what),
                _packed(family, message.toIPAddress.address, what),
                _mac(message.lladdr, what) if message.lladdr else b"",
                message.state & 0xFFFF or netlink.NUD_PERMANENT,
                message.flags & 0xFF,
            )
            if _is_left_out(family, what):
                continue
            with _naming(what):
                rtnl.change(netlink.RTM_NEWNEIGH, content, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE)
