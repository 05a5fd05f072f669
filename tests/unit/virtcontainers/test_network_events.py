"""Which of the kernel's messages make us look again."""

from __future__ import annotations

import socket
import struct

import pytest

from virtcontainers.network import events

NEWLINK, DELLINK, NEWADDR, DELADDR, NEWROUTE, DELROUTE = 16, 17, 20, 21, 24, 25
NEWNEIGH, DELNEIGH = 28, 29
MAIN, LOCAL = 254, 255
FAILED, STALE, PERMANENT = 0x20, 0x04, 0x80
LINK_SCOPE, IPV6 = 253, 10
TAPS = {7}
NEIGHBORS = {(2, "10.0.0.9"), (2, "fd00::9")}


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, 0, 0, 0) + body


def link(kind: int, index: int) -> bytes:
    return message(kind, struct.pack("=BxHiII", 0, 1, index, 0, 0) + bytes(36))


def address(kind: int, index: int, scope: int, family: int = 2) -> bytes:
    return message(kind, struct.pack("=BBBBI", family, 24, 0, scope, index))


def route(kind: int, table: int, protocol: int) -> bytes:
    return message(kind, struct.pack("=8BI", 2, 24, 0, 0, table, protocol, 0, 1, 0))


def neighbor(kind: int, index: int, state: int, address: str = "10.0.0.1") -> bytes:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    destination = struct.pack("=HH", 4 + len(packed), 1) + packed
    return message(kind, struct.pack("=BxxxiHBB", family, index, state, 0, 0) + destination + bytes(8))


@pytest.mark.parametrize(
    "data",
    [
        link(NEWLINK, 2),
        link(DELLINK, 2),
        address(NEWADDR, 2, 0),
        address(DELADDR, 2, 0),
        address(NEWADDR, 2, LINK_SCOPE),  # somebody has set it: IPv4's
        route(NEWROUTE, MAIN, 4),
        route(DELROUTE, MAIN, 3),
        neighbor(NEWNEIGH, 2, PERMANENT),
        neighbor(NEWNEIGH, 2, FAILED, "10.0.0.9"),
        neighbor(NEWNEIGH, 2, STALE, "fd00::9"),
        neighbor(DELNEIGH, 2, FAILED, "10.0.0.9"),
        message(NEWNEIGH, struct.pack("=BxxxiHBB", 2, 2, STALE, 0, 0) + b"\4\0\2\0"),
        message(NEWNEIGH, struct.pack("=BxxxiHBB", 99, 2, STALE, 0, 0) + b"\5\0\1\0x"),
        message(99, b"never seen"),
        message(NEWLINK, b"cut"),
        b"\1\0\0\0" + bytes(12),
    ],
)
def test_what_may_concern_the_machine_matters(data: bytes) -> None:
    assert events.matter(data, TAPS, NEIGHBORS)
    assert events.matter(link(NEWLINK, 7) + data, TAPS, NEIGHBORS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        message(NEWNEIGH, struct.pack("=BxxxiHBB", socket.AF_BRIDGE, 2, PERMANENT, 0, 0) + b"\4\0\2\0"),
        link(NEWLINK, 7),
        link(DELLINK, 7),
        address(NEWADDR, 7, 0),
        address(NEWADDR, 2, LINK_SCOPE, IPV6),
        route(NEWROUTE, LOCAL, 2),
        route(NEWROUTE, MAIN, 2),
        route(NEWROUTE, LOCAL, 4),
        neighbor(NEWNEIGH, 7, PERMANENT),
        neighbor(NEWNEIGH, 2, STALE),
        neighbor(DELNEIGH, 2, FAILED),
        neighbor(DELNEIGH, 3, FAILED, "10.0.0.9"),
    ],
)
def test_what_we_do_and_what_the_kernel_does_by_itself_does_not(data: bytes) -> None:
    assert not events.matter(data, TAPS, NEIGHBORS)
    assert not events.matter(data + data, TAPS, NEIGHBORS)
