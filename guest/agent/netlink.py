"""The kernel's rtnetlink: its messages built and taken apart, and the socket they go through.

pyroute2 would be seconds of imports on an emulated CPU; this is what the agent needs of it. Numbers are those
of linux/netlink.h, rtnetlink.h, if_link.h, if_addr.h and neighbour.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from typing import Self

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_REPLACE = 0x100
NLM_F_DUMP = 0x300
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
_NLM_F_DUMP_INTR = 0x10
_NLM_F_ACK_TLVS = 0x200

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLMSGERR_ATTR_MSG = 1

RTM_NEWLINK = 16
RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
RTM_NEWROUTE = 24
RTM_DELROUTE = 25
RTM_GETROUTE = 26
RTM_NEWNEIGH = 28

IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_MTU = 4

IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_BROADCAST = 4
IFA_FLAGS = 8
IFA_F_NODAD = 0x02

RTA_DST = 1
RTA_OIF = 4
RTA_GATEWAY = 5
RTA_PRIORITY = 6
RTA_PREFSRC = 7
RTA_METRICS = 8
RTA_TABLE = 15
RTA_VIA = 18
RTAX_MTU = 2
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTPROT_KERNEL = 2
RTPROT_BOOT = 3
RTPROT_RA = 9
RTNH_F_ONLINK = 4

NDA_DST = 1
NDA_LLADDR = 2
NUD_PERMANENT = 0x80

IFF_UP = 0x1
IFF_NOARP = 0x80

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_LINK = struct.Struct("=BxHiII")  # family, type, index, flags, mask of the flags to change
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, dst and src prefix, tos, table, protocol, scope, type, flags
_NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_TYPE_MASK = 0x3FFF
_RECEIVE_BYTES = 1 << 16
_TIMEOUT_S = 10.0


class NetlinkError(OSError):
    """The kernel's refusal; `strerror` has its explanation too, where it gives one."""


def attribute(kind: int, value: bytes | int | str) -> bytes:
    """Padded, for another to follow; an int is an unsigned one of four bytes, a str ends in a zero."""
    if isinstance(value, int):
        value = struct.pack("=I", value)
    elif isinstance(value, str):
        value = value.encode() + b"\0"
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """By type, the last of each. Raises ValueError when they do not fill `data`."""
    found = {}
    while data:
        if len(data) < _ATTRIBUTE.size:
            raise ValueError(f"netlink: {len(data)} bytes where an attribute was expected")
        size, kind = _ATTRIBUTE.unpack_from(data)
        if not _ATTRIBUTE.size <= size <= len(data):
            raise ValueError(f"netlink: an attribute of {size} bytes among {len(data)}")
        found[kind & _TYPE_MASK] = data[_ATTRIBUTE.size : size]
        data = data[size + -size % 4 :]
    return found


def messages(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and content of each. Raises ValueError."""
    found = []
    while data:
        if len(data) < _HEADER.size:
            raise ValueError(f"netlink: {len(data)} bytes where a message was expected")
        size, kind, flags, sequence, _ = _HEADER.unpack_from(data)
        if not _HEADER.size <= size <= len(data):
            raise ValueError(f"netlink: a message of {size} bytes among {len(data)}")
        found.append((kind, flags, sequence, data[_HEADER.size : size]))
        data = data[size + -size % 4 :]
    return found


def _number(value: bytes | None) -> int:
    return int(struct.unpack("=I", value)[0]) if value else 0


def _text(family: int, value: bytes) -> str:
    return socket.inet_ntop(family, value)


@dataclass(frozen=True)
class Link:
    index: int
    name: str
    address: str  # "02:00:00:00:00:01"; "" where it has none
    mtu: int
    flags: int

    @classmethod
    def parse(cls, content: bytes) -> Self:
        _, _, index, flags, _ = _LINK.unpack_from(content)
        found = attributes(content[_LINK.size :])
        return cls(
            index,
            found[IFLA_IFNAME].rstrip(b"\0").decode(errors="replace"),
            found.get(IFLA_ADDRESS, b"").hex(":"),
            _number(found.get(IFLA_MTU)),
            flags,
        )


@dataclass(frozen=True)
class Address:
    family: int
    address: str
    prefix: int

    @classmethod
    def parse(cls, content: bytes) -> tuple[int, Self]:
        """With the index of its interface."""
        family, prefix, _, _, index = _ADDRESS.unpack_from(content)
        found = attributes(content[_ADDRESS.size :])
        # Of a peer's, IFA_ADDRESS is the other end.
        return index, cls(family, _text(family, found.get(IFA_LOCAL) or found[IFA_ADDRESS]), prefix)

    def content(self, index: int) -> bytes:
        packed = socket.inet_pton(self.family, self.address)
        rest = attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed)
        flags = 0
        if self.family == socket.AF_INET6:
            # The host has made sure that nobody else has it; until that was done again, it could not be used.
            flags = IFA_F_NODAD
        elif self.prefix < 31:
            hosts = (1 << (32 - self.prefix)) - 1
            rest += attribute(IFA_BROADCAST, (int.from_bytes(packed, "big") | hosts).to_bytes(4, "big"))
        return _ADDRESS.pack(self.family, self.prefix, flags, 0, index) + rest

    def __str__(self) -> str:
        return f"{self.address}/{self.prefix}"


@dataclass(frozen=True)
class Route:
    """A unicast route of the main table."""

    family: int
    destination: str  # "10.0.0.0/24"
    index: int
    gateway: str = ""
    source: str = ""
    scope: int = 0
    priority: int = 0
    flags: int = 0
    mtu: int = 0

    @classmethod
    def parse(cls, content: bytes) -> tuple[int, Self] | None:
        """With its protocol; None for what is not such a route."""
        family, prefix, _, _, table, protocol, scope, kind, flags = _ROUTE.unpack_from(content)
        found = attributes(content[_ROUTE.size :])
        table = _number(found.get(RTA_TABLE)) or table
        if family not in (socket.AF_INET, socket.AF_INET6) or (kind, table) != (RTN_UNICAST, RT_TABLE_MAIN):
            return None
        none = bytes(4 if family == socket.AF_INET else 16)
        gateway = ""
        if RTA_GATEWAY in found:
            gateway = _text(family, found[RTA_GATEWAY])
        elif RTA_VIA in found:
            gateway = _text(int(struct.unpack_from("=H", found[RTA_VIA])[0]), found[RTA_VIA][2:])
        metrics = attributes(found.get(RTA_METRICS, b""))
        return protocol, cls(
            family,
            f"{_text(family, found.get(RTA_DST, none))}/{prefix}",
            _number(found.get(RTA_OIF)),
            gateway,
            _text(family, found[RTA_PREFSRC]) if RTA_PREFSRC in found else "",
            scope,
            _number(found.get(RTA_PRIORITY)),
            flags & RTNH_F_ONLINK,
            _number(metrics.get(RTAX_MTU)),
        )

    def content(self, protocol: int) -> bytes:
        address, _, prefix = self.destination.partition("/")
        rest = attribute(RTA_OIF, self.index)
        if prefix != "0":
            rest += attribute(RTA_DST, socket.inet_pton(self.family, address))
        if self.gateway:
            family = family_of(self.gateway)
            gateway = socket.inet_pton(family, self.gateway)
            if family == self.family:
                rest += attribute(RTA_GATEWAY, gateway)
            else:
                rest += attribute(RTA_VIA, struct.pack("=H", family) + gateway)
        if self.source:
            rest += attribute(RTA_PREFSRC, socket.inet_pton(self.family, self.source))
        if self.priority:
            rest += attribute(RTA_PRIORITY, self.priority)
        if self.mtu:
            rest += attribute(RTA_METRICS, attribute(RTAX_MTU, self.mtu))
        header = (
            self.family,
            int(prefix),
            0,
            0,
            RT_TABLE_MAIN,
            protocol,
            self.scope,
            RTN_UNICAST,
            self.flags,
        )
        return _ROUTE.pack(*header) + rest


def family_of(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def link_content(index: int, *, flags: int = 0, change: int = 0, rest: bytes = b"") -> bytes:
    return _LINK.pack(socket.AF_UNSPEC, 0, index, flags, change) + rest


def neighbour_content(index: int, address: str, lladdr: bytes, state: int, flags: int) -> bytes:
    family = family_of(address)
    rest = attribute(NDA_DST, socket.inet_pton(family, address))
    if lladdr:
        rest += attribute(NDA_LLADDR, lladdr)
    return _NEIGHBOUR.pack(family, index, state, flags, 0) + rest


class Rtnl:
    """A conversation with the kernel about this process's network; what is asked is done when a call returns.
    Raises NetlinkError."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        # It answers before the system call returns: only a fault of ours would be waited for.
        self._socket.settimeout(_TIMEOUT_S)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def change(self, kind: int, content: bytes, flags: int = 0) -> None:
        self._request(kind, content, flags | NLM_F_ACK)

    def links(self) -> list[Link]:
        return [Link.parse(content) for content in self._dump(RTM_GETLINK, link_content(0))]

    def addresses(self) -> list[tuple[int, Address]]:
        """Each with the index of its interface."""
        found = self._dump(RTM_GETADDR, _ADDRESS.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        return [Address.parse(content) for content in found]

    def routes(self) -> list[tuple[int, Route]]:
        """Those of the main table, each with its protocol."""
        found = self._dump(RTM_GETROUTE, _ROUTE.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0))
        return [route for content in found if (route := Route.parse(content)) is not None]

    def _dump(self, kind: int, content: bytes) -> list[bytes]:
        while True:
            found = self._request(kind, content, NLM_F_DUMP)
            if found is not None:
                return found

    def _request(self, kind: int, content: bytes, flags: int) -> list[bytes] | None:
        """None when what was listed changed meanwhile."""
        self._sequence += 1
        header = (_HEADER.size + len(content), kind, flags | NLM_F_REQUEST, self._sequence, 0)
        self._socket.send(_HEADER.pack(*header) + content)
        answers: list[bytes] = []
        torn = False
        while True:
            for kind, flags, sequence, answer in messages(self._socket.recv(_RECEIVE_BYTES)):
                if sequence != self._sequence:
                    continue
                torn = torn or bool(flags & _NLM_F_DUMP_INTR)
                if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                    number = -int(struct.unpack_from("=i", answer)[0]) if answer else 0
                    if number:
                        raise _error(number, answer, flags)
                    return None if torn else answers
                answers.append(answer)


def _error(number: int, answer: bytes, flags: int) -> NetlinkError:
    reason = os.strerror(number)
    if flags & _NLM_F_ACK_TLVS:
        text = attributes(answer[4 + _HEADER.size :]).get(_NLMSGERR_ATTR_MSG, b"")
        if text:
            reason += f" ({text.rstrip(bytes(1)).decode(errors='replace')})"
    return NetlinkError(number, f"{errno.errorcode.get(number, number)}: {reason}")
