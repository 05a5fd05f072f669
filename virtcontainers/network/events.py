"""Which of the kernel's messages about a namespace are a reason to look at it again.

Not what they say: only the fixed head of each is read, and whose a neighbour's is.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Container

# <linux/rtnetlink.h>
_LINKS = (16, 17)
"""RTM_NEWLINK, RTM_DELLINK"""
_ADDRESSES = (20, 21)
_ROUTES = (24, 25)
_NEIGHBORS = (28, 29)
_RTM_NEWNEIGH = 28
_RT_SCOPE_LINK = 253
_RT_TABLE_MAIN = 254
_RTPROT_KERNEL = 2

_NLMSGHDR = struct.Struct("=IHHII")
_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=8BI")
_NDMSG = struct.Struct("=BxxxiHBB")
_NLATTR = struct.Struct("=HH")
_NDA_DST = 1
_NUD_PERMANENT = 0x80


def matter(data: bytes, taps: Container[int], neighbors: Container[tuple[int, str]]) -> bool:
    """`data` is what one read of the socket gave; `taps` are the links that we have made ourselves, and
    `neighbors` those that somebody has set: the link's index, and the address."""
    at = 0
    while at + _NLMSGHDR.size <= len(data):
        length, kind, *_ = _NLMSGHDR.unpack_from(data, at)
        body = data[at + _NLMSGHDR.size : at + length]
        if length < _NLMSGHDR.size or _matters(kind, body, taps, neighbors):
            return True
        at += (length + 3) & ~3
    return False


def _matters(kind: int, body: bytes, taps: Container[int], neighbors: Container[tuple[int, str]]) -> bool:
    try:
        if kind in _LINKS:
            return _IFINFOMSG.unpack_from(body)[2] not in taps
        if kind in _ADDRESSES:
            family, _, _, scope, index = _IFADDRMSG.unpack_from(body)
            # IPv6's link-local one comes, and is ready a second later, by itself.
            comes_by_itself = family == socket.AF_INET6 and scope == _RT_SCOPE_LINK
            return not comes_by_itself and index not in taps
        if kind in _ROUTES:
            table, protocol = _RTMSG.unpack_from(body)[4:6]
            return bool(table == _RT_TABLE_MAIN and protocol != _RTPROT_KERNEL)
        if kind in _NEIGHBORS:
            family, index, state, _, _ = _NDMSG.unpack_from(body)
            if family == socket.AF_BRIDGE:
                return False  # what one has learned
            if kind == _RTM_NEWNEIGH and state & _NUD_PERMANENT:
                return index not in taps
            # One that was set may be no more; the others come and go by themselves.
            size, attribute = _NLATTR.unpack_from(body, _NDMSG.size)
            if attribute != _NDA_DST:
                return True
            address = body[_NDMSG.size + _NLATTR.size : _NDMSG.size + size]
            return (index, socket.inet_ntop(family, address)) in neighbors
    except (struct.error, ValueError, OSError):
        pass
    return True
