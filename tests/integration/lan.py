"""Networks for pods: a bridge on the host, network namespaces on it, and what is seen in them."""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from harness import TIMEOUT_S, Ctr, new_id, wait_for
from private_cri import BRIDGE_PREFIX

BRIDGE = f"{BRIDGE_PREFIX}lan"
PREFIX = "198.19.255"
PREFIX6 = "fd00:255:"
HOST = f"{PREFIX}.1"
HOST6 = f"{PREFIX6}:1"

_numbers = itertools.count(10)


def sh(script: str) -> str:
    """What it printed."""
    result = subprocess.run(["sh", "-ec", script], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert result.returncode == 0, f"{script}\n{result.stderr}"
    return result.stdout


@contextlib.contextmanager
def bridge() -> Iterator[None]:
    sh(f"""
        ip link add {BRIDGE} type bridge
        ip addr add {HOST}/24 dev {BRIDGE}
        ip addr add {HOST6}/64 dev {BRIDGE} nodad
        # Once set, by a change, it is no more its ports' smallest.
        ip link set {BRIDGE} mtu 1400; ip link set {BRIDGE} mtu 1500 up
    """)
    try:
        yield
    finally:
        sh(f"ip link del {BRIDGE}")


@dataclass(frozen=True)
class Interface:
    """A link and its addresses."""

    name: str
    hardware_addr: str
    mtu: int
    addresses: frozenset[str]


@dataclass(frozen=True)
class Seen:
    """What `ip` shows, in a namespace or in a container."""

    interfaces: frozenset[Interface]
    routes: frozenset[tuple[tuple[str, str], ...]]
    neighbors: frozenset[tuple[str, str]]
    """The permanent ones."""


@dataclass(frozen=True)
class Namespace:
    name: str
    number: int

    @property
    def options(self) -> tuple[str, ...]:
        """Of `ctr run`."""
        return ("--with-ns", f"network:/run/netns/{self.name}")

    @property
    def address(self) -> str:
        """eth0's."""
        return f"{PREFIX}.{self.number}"

    @property
    def address6(self) -> str:
        return f"{PREFIX6}:{self.number}"

    def ip(self, *arguments: str) -> Any:
        return json.loads(sh(f"ip -n {self.name} -j {' '.join(arguments)}") or "[]")

    def sh(self, script: str) -> str:
        return sh(f"ip netns exec {self.name} sh -ec '{script}'")

    def add_veth(self, name: str = "eth0", mtu: int = 1500) -> None:
        """Without addresses."""
        port = f"v{self.number}{name}"
        sh(f"""
            ip link add {port} mtu {mtu} type veth peer name {name} netns {self.name}
            ip link set {port} master {BRIDGE} up
            ip -n {self.name} link set {name} mtu {mtu} up
        """)
        self.wait_up(name)

    def wait_up(self, name: str) -> None:
        """Wait until the kernel calls it so, and has given it an address of its own: each comes later."""

        def is_up() -> bool:
            shown = sh(f"ip -n {self.name} addr show dev {name}")
            return "state UP" in shown and "inet6 fe80" in shown

        wait_for(f"{name} to be up", is_up)

    def add_macvlan(self, name: str) -> None:
        """Without addresses; on the bridge by a link of the host's."""
        parent = f"v{self.number}parent"
        sh(f"""
            ip link add {parent} type veth peer name {parent}b
            ip link set {parent}b master {BRIDGE} up
            ip link set {parent} up
            ip link add link {parent} name {name} netns {self.name} type macvlan mode bridge
            ip -n {self.name} link set {name} up
        """)
        self.wait_up(name)

    def add_eth0(self, mtu: int = 1500) -> None:
        """As a CNI plugin does, with addresses on the bridge and default routes to the host."""
        self.add_veth(mtu=mtu)
        sh(f"""
            ip -n {self.name} addr add {self.address}/24 dev eth0
            ip -n {self.name} addr add {self.address6}/64 dev eth0 nodad
            ip -n {self.name} route add default via {HOST}
            ip -n {self.name} -6 route add default via {HOST6}
        """)
        # The kernel makes it some time after the address.
        local = f"ip -n {self.name} -6 route show table local"
        wait_for("the address' own route", lambda: f"local {self.address6} " in sh(local))

    def links(self) -> set[str]:
        return {each["ifname"] for each in self.ip("link")}

    def state(self) -> str:
        """All that a pod could leave behind, or take away."""
        ip = f"ip -n {self.name}"
        return sh(f"""
            {ip} -o link | sed "s/qlen.*//"
            {ip} -o addr | sed "s/ tentative//; s/ nodad//" | grep -v fe80
            {ip} -4 route show table all | sort
            {ip} -6 route show table all | grep -v -e fe80 -e ff00 | sort
            {ip} rule; {ip} -6 rule; tc -n {self.name} qdisc
            for link in $({ip} -o link | sed "s/^[0-9]*: //; s/[@:].*//"); do
                tc -n {self.name} filter show dev $link ingress 2>/dev/null || true
                tc -n {self.name} filter show dev $link
            done
        """)

    def seen(self) -> Seen:
        links = [each for each in self.ip("addr") if not _is_ours(each["ifname"])]
        return Seen(
            frozenset(
                Interface(
                    each["ifname"],
                    each["address"],
                    each["mtu"],
                    frozenset(f"{address['local']}/{address['prefixlen']}" for address in each["addr_info"]),
                )
                for each in links
            ),
            frozenset(
                (
                    *(
                        (key, str(route.get(key, "")))
                        for key in ("dst", "gateway", "dev", "scope", "metric", "prefsrc")
                    ),
                    ("onlink", str("onlink" in route["flags"])),
                )
                for route in (*self.ip("route"), *self.ip("-6", "route"))
            ),
            frozenset(
                (each["dst"], each["lladdr"])
                for each in self.ip("neigh")
                if "PERMANENT" in each["state"] and not _is_ours(each["dev"])
            ),
        )


def _is_ours(name: str) -> bool:
    return name == "lo" or name.endswith("_kata")


def seen_in(ctr: Ctr, container_id: str) -> Seen:
    script = "ip -o addr; echo; ip -o link; echo; ip route; ip -6 route; echo; ip neigh"
    result = ctr.exec(container_id, "sh", "-c", script)
    assert result.returncode == 0, result.stderr
    addresses, links, routes, neighbors = (
        part.splitlines() for part in result.stdout.decode().split("\n\n", 3)
    )
    of_link: dict[str, set[str]] = {}
    for words in (line.split() for line in addresses):
        if words[2] in ("inet", "inet6"):
            of_link.setdefault(words[1], set()).add(words[3])
    interfaces = set()
    for line in links:
        words = line.replace("\\", "").split()
        name = words[1].partition("@")[0].rstrip(":")
        if not _is_ours(name):
            mac, mtu = words[words.index("link/ether") + 1], int(words[words.index("mtu") + 1])
            interfaces.add(Interface(name, mac, mtu, frozenset(of_link.get(name, ()))))
    return Seen(
        frozenset(interfaces),
        frozenset(_route(line.split()) for line in routes if line.strip() and "multicast" not in line),
        frozenset(
            (words[0], words[words.index("lladdr") + 1])
            for words in (line.split() for line in neighbors)
            if words and words[-1] == "PERMANENT"
        ),
    )


def _route(words: list[str]) -> tuple[tuple[str, str], ...]:
    def after(word: str) -> str:
        return words[words.index(word) + 1] if word in words else ""

    keys = {"gateway": "via", "dev": "dev", "scope": "scope", "metric": "metric", "prefsrc": "src"}
    found = ((key, after(word)) for key, word in keys.items())
    return (("dst", words[0]), *found, ("onlink", str("onlink" in words)))


@contextlib.contextmanager
def namespace() -> Iterator[Namespace]:
    """An empty one; what is in it goes with it."""
    number = next(_numbers)
    made = Namespace(new_id("net"), number)
    sh(f"ip netns add {made.name}; ip -n {made.name} link set lo up")
    try:
        yield made
    finally:
        # By itself it would take the links with it some time later.
        sh(f"""
            for port in $(cd /sys/class/net; echo v{number}*); do ip link del $port || true; done
            ip netns del {made.name}
        """)
