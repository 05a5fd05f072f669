"""What is done in a pod's network namespace, by a process that is in it: see `child`.

Each function that takes plain data answers with plain data, and with descriptors to hand over.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib.util
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from virtcontainers import mount
from virtcontainers.errors import FailedPreconditionError, KataError

Answer = tuple[Any, list[int]]
Link = Mapping[str, Any]
"""`Endpoint.to_connect`'s."""

_CLONE_NEWNS = 0x00020000  # <linux/sched.h>

# <linux/if_tun.h>
_TUNSETIFF = 0x400454CA
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_IFF_MULTI_QUEUE = 0x0100
_IFF_TUN_EXCL = 0x8000

# <linux/rtnetlink.h>
_RTMGRP = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400
"""Links, neighbours, addresses and routes, of IPv4 and IPv6."""
_RT_TABLE_MAIN = 254
_RTN_UNICAST = 1
_RTN_NAMES = {6: "blackhole", 7: "unreachable", 8: "prohibit", 9: "throw"}
_RTPROT_KERNEL = 2
_RTNH_F_ONLINK = 4

_INGRESS = 0xFFFF0000
_INGRESS_CLASS = 0xFFFFFFF2
"""The class of arriving packets, of an ingress and of a clsact qdisc: <linux/pkt_sched.h>."""
_PRIORITY = 0x4B41
"""Of our filters: it tells them from others'."""
_ETH_P_ALL = 3


@cache
def _ipr() -> Any:
    """pyroute2's connection to the kernel.

    Its package's own __init__ imports all it has, which is a third of the time: only what is needed comes.
    """
    if "pyroute2" not in sys.modules:
        spec = importlib.util.find_spec("pyroute2")
        if spec is None or spec.submodule_search_locations is None:
            raise KataError("pyroute2 is not installed: a pod cannot have a network")
        package = ModuleType("pyroute2")
        package.__path__ = spec.submodule_search_locations
        sys.modules["pyroute2"] = package
    from pyroute2.iproute.linux import IPRoute

    return IPRoute()


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """The kernel's refusal, and to what."""
    try:
        yield
    except KataError:
        raise
    except Exception as error:
        code = getattr(error, "code", None) or getattr(error, "errno", None)
        raise KataError(f"{what}: {os.strerror(code) if isinstance(code, int) else error}") from error


def watch() -> Answer:
    """A socket that has a message whenever links, neighbours, addresses or routes change from now on, and the
    names of the links there are. Needs no pyroute2."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    ) as sock:
        sock.bind((0, _RTMGRP))
        names = [name for _, name in socket.if_nameindex()]
        return names, [sock.detach()]


# -- looking


def scan() -> Answer:
    """Under "links" `NetworkInfo.to_json` of every one but the loopback; under "lost_routes" what no message
    of the agent's can say: routes of the main table that are no one link's, as `ip route` has them."""
    ipr, lost = _ipr(), list[str]()
    with _naming("links of the network namespace"):
        links = {message["index"]: _link(message) for message in ipr.get_links()}
        links = {index: link for index, link in links.items() if link["name"] != "lo"}
        if not links:
            return {"links": [], "lost_routes": []}, []
        for message in ipr.get_addr():
            if (link := links.get(message["index"])) is not None:
                # Of a point-to-point link IFA_ADDRESS is the peer's.
                address = message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS")
                link["addresses"].append({"address": address, "prefix": message["prefixlen"]})
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in ipr.get_routes(family=family, table=_RT_TABLE_MAIN):
                link = links.get(message.get_attr("RTA_OIF"))
                if link is not None and message["type"] == _RTN_UNICAST:
                    link["routes"].append(_route(message))
                elif message["proto"] != _RTPROT_KERNEL and (text := _lost_route(message, links)):
                    lost.append(text)
        for message in ipr.get_neighbours():
            if (link := links.get(message["ifindex"])) is not None:
                link["neighbors"].append(
                    {
                        "address": message.get_attr("NDA_DST"),
                        "lladdr": message.get_attr("NDA_LLADDR") or "",
                        "state": message["state"],
                        "flags": message["flags"],
                    }
                )
    return {"links": list(links.values()), "lost_routes": lost}, []


def _lost_route(message: Any, links: Mapping[int, Link]) -> str:
    """Of one that is by several links or gateways, or by none; "" for others."""
    destination = message.get_attr("RTA_DST")
    words = [f"{destination}/{message['dst_len']}" if destination else "default"]
    if kind := _RTN_NAMES.get(message["type"]):
        words.insert(0, kind)
    hops = message.get_attr("RTA_MULTIPATH") or []
    if not kind and not hops:
        return ""
    if priority := message.get_attr("RTA_PRIORITY"):
        words += ["metric", str(priority)]
    for hop in hops:
        via = hop.get_attr("RTA_VIA")
        gateway = hop.get_attr("RTA_GATEWAY") or (via["addr"] if via else "")
        words += ["nexthop", *(["via", gateway] if gateway else [])]
        if (link := links.get(hop["oif"])) is not None:
            words += ["dev", link["name"]]
        words += ["weight", str(hop["hops"] + 1)]
    return " ".join(words)


def _link(message: Any) -> dict[str, Any]:
    linkinfo = message.get_attr("IFLA_LINKINFO")
    kind = (linkinfo.get_attr("IFLA_INFO_KIND") if linkinfo else "") or ""
    data = linkinfo.get_attr("IFLA_INFO_DATA") if linkinfo else None
    name = message.get_attr("IFLA_IFNAME")
    return {
        "index": message["index"],
        # pyroute2 gives bytes where it is no UTF-8, and no agent can be told such a name.
        "name": name if isinstance(name, str) else name.decode(errors="backslashreplace"),
        "kind": "tun" if kind in ("tun", "tuntap") else kind,
        "mtu": message.get_attr("IFLA_MTU"),
        "hardware_addr": message.get_attr("IFLA_ADDRESS") or "",
        "flags": message["flags"],
        "bus": message.get_attr("IFLA_PARENT_DEV_BUS_NAME") or "",
        "tun_type": (data.get_attr("IFLA_TUN_TYPE") or 0) if data and kind in ("tun", "tuntap") else 0,
        "addresses": [],
        "routes": [],
        "neighbors": [],
    }


def _route(message: Any) -> dict[str, Any]:
    metrics = message.get_attr("RTA_METRICS")
    destination = message.get_attr("RTA_DST")
    via = message.get_attr("RTA_VIA")  # a gateway of the other family
    return {
        "destination": f"{destination}/{message['dst_len']}" if destination else "",
        "gateway": message.get_attr("RTA_GATEWAY") or (via["addr"] if via else ""),
        "source": message.get_attr("RTA_PREFSRC") or "",
        "scope": message["scope"],
        # The others tell its state, and nobody can ask for them.
        "flags": message["flags"] & _RTNH_F_ONLINK,
        "priority": message.get_attr("RTA_PRIORITY") or 0,
        "mtu": (metrics.get_attr("RTAX_MTU") or 0) if metrics else 0,
        "protocol": message["proto"],
        "ipv6": message["family"] == socket.AF_INET6,
    }


# -- connecting


def make_macvtap(link: Link) -> Answer:
    """Before `connect`, unless it is there already. The answer is its device, as "246:1": only now its driver
    is loaded for sure, and has a number. Nothing stays when it fails."""
    with contextlib.ExitStack() as undo:
        if link["model"] == "macvtap":
            _make_macvtap(link, undo)
        device = _device_of_macvtap(link["tap"])
        undo.pop_all()
        return device, []


def connect(link: Link, queues: int, vhost_net: bool, macvtap: str = "") -> Answer:
    """Make the machine's side of a link: its descriptors, one a queue, and then vhost-net's, as many or none;
    of a `macvtap` that is there, by its device.

    The answer says the tap's index, and whether there is vhost-net. Nothing stays when it fails, but for the
    `macvtap`.
    """
    with contextlib.ExitStack() as undo:
        if macvtap:
            index, fds = socket.if_nametoindex(link["tap"]), _open_macvtap(link["tap"], macvtap, queues)
        else:
            index, fds = _make_tap(link, queues)
            undo.callback(_remove_redirection, link["index"], link["name"])
        undo.callback(_close, fds)
        if link["model"] == "tcfilter":
            _redirect(link["index"], index, f"{link['name']} to {link['tap']}")
            _redirect(index, link["index"], f"{link['tap']} to {link['name']}")
        with _naming(f"interface {link['tap']}"):
            _ipr().link("set", index=index, state="up")
        vhost: list[int] = []
        if vhost_net:
            vhost = _open("/dev/vhost-net", queues)
        undo.pop_all()
        return {"tap": index, "vhost": bool(vhost)}, fds + vhost


def _make_tap(link: Link, queues: int) -> tuple[int, list[int]]:
    fds: list[int] = []
    name = link["tap"]
    try:
        for number in range(queues):
            with _naming("/dev/net/tun"):
                fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fds.append(fd)
            flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
            flags |= _IFF_MULTI_QUEUE if queues > 1 else 0
            flags |= _IFF_TUN_EXCL if number == 0 else 0
            with _naming(f"TAP {name}"):
                try:
                    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    raise _taken(f"TAP {name}") from error
        # Or the kernel would give it an IPv6 address, and talk to the machine.
        with contextlib.suppress(FileNotFoundError):
            _write(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")
        index = socket.if_nametoindex(name)
        with _naming(f"TAP {name}: MTU {link['mtu']}"):
            _ipr().link("set", index=index, mtu=link["mtu"])
        return index, fds
    except BaseException:
        _close(fds)
        raise


def _taken(what: str) -> KataError:
    return FailedPreconditionError(
        f"{what}: found one of another pod's, expected none: two pods cannot have one network namespace"
    )


def _redirect(source: int, target: int, what: str) -> None:
    """All that arrives at `source` leaves by `target`.

    tc qdisc add dev SOURCE ingress
    tc filter add dev SOURCE ingress protocol all u32 match u8 0 0 action mirred egress redirect dev TARGET
    """
    ipr = _ipr()
    with _naming(f"redirecting {what}"):
        try:
            ipr.tc("add", "ingress", source)
        except Exception as error:
            if getattr(error, "code", 0) != errno.EEXIST:
                raise
            if _our_filters(source):
                _remove_filters(source)  # of a pod that was killed: its TAP has gone
        ipr.tc(
            "add-filter",
            "u32",
            source,
            parent=_INGRESS_CLASS,
            prio=_PRIORITY,
            protocol=_ETH_P_ALL,
            target=0,
            keys=["0x0/0x0+0"],
            action={"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": target},
        )


def _our_filters(index: int) -> list[Any]:
    return [
        message
        for message in _ipr().get_filters(index=index, parent=_INGRESS_CLASS)
        if message["info"] >> 16 == _PRIORITY
    ]


def _remove_filters(index: int) -> None:
    which = {"parent": _INGRESS_CLASS, "prio": _PRIORITY, "protocol": _ETH_P_ALL}
    _ipr().tc("del-filter", "u32", index, target=0, **which)  # pyroute2 wants a target that nobody reads


def _make_macvtap(link: Link, undo: contextlib.ExitStack) -> None:
    ipr, name = _ipr(), link["tap"]
    with _naming(f"macvtap {name} on {link['name']}"):
        try:
            ipr.link("add", ifname=name, kind="macvtap", link=link["index"], macvtap_mode="bridge")
        except Exception as error:
            if getattr(error, "code", 0) != errno.EEXIST:
                raise
            raise _taken(f"macvtap {name}") from error
        index = socket.if_nametoindex(name)
        ipr.link("set", index=index, ifalias=link["owner"])
        undo.callback(disconnect, link)
        with contextlib.suppress(FileNotFoundError):
            _write(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "1")
        # The machine has the link's MAC address, so the link gets another: it would take the frames.
        own = b"\x02" + os.urandom(5)
        ipr.link("set", index=link["index"], address=own.hex(":"))
        ipr.link("set", index=index, address=link["hardware_addr"], mtu=link["mtu"])
        # Or both would answer who has them.
        ipr.flush_addr(index=link["index"])
        ipr.link("set", index=link["index"], state="up")
        ipr.link("set", index=index, state="up")


def _device_of_macvtap(name: str) -> str:
    with _naming(f"macvtap {name}"), _own_mounts():
        mount.mount("sysfs", Path("/sys"), "sysfs")
        return _read(f"/sys/class/net/{name}/tap{socket.if_nametoindex(name)}/dev").strip()


def _open_macvtap(name: str, device: str, queues: int) -> list[int]:
    """By a node of our own: in /dev it is named by an index that other namespaces have, too, or it is not
    there at all."""
    with _naming(f"macvtap {name}"), _own_mounts():
        mount.mount("tmpfs", Path("/sys"), "tmpfs")
        major, minor = device.split(":")
        os.mknod("/sys/tap", 0o600 | 0o020000, os.makedev(int(major), int(minor)))
        return _open("/sys/tap", queues)


@contextlib.contextmanager
def _own_mounts() -> Iterator[None]:
    """Nobody else sees what is mounted from now on, to this process' end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    mount.mount("", Path("/"), flags=mount.MS_PRIVATE | mount.MS_REC)
    yield


def _open(path: str, count: int) -> list[int]:
    fds: list[int] = []
    try:
        with _naming(path):
            while len(fds) < count:
                fds.append(os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
    except BaseException:
        _close(fds)
        raise
    return fds


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def set_mtu(name: str, mtu: int) -> Answer:
    """Of the machine's side, after its link."""
    with _naming(f"interface {name}: MTU {mtu}"):
        _ipr().link("set", index=socket.if_nametoindex(name), mtu=mtu)
    return None, []


# -- undoing


def disconnect(link: Link) -> Answer:
    """Take away what `connect` has made, once the machine has ended; idempotent.

    A TAP goes with the last descriptor of it: one that is there is another pod's, and so is what leads to it.
    """
    index, name = link["index"], link["name"]
    if link["model"] == "macvtap":
        _remove_macvtap(link)
    elif link["model"] == "tcfilter" and link["tap"] not in dict(socket.if_nameindex()).values():
        _remove_redirection(index, name)
    return None, []


def _remove_redirection(index: int, name: str) -> None:
    with _naming(f"interface {name}"), _gone_is_well():
        if _our_filters(index):
            _remove_filters(index)
            if not list(_ipr().get_filters(index=index, parent=_INGRESS_CLASS)):
                _ipr().tc("del", "ingress", index)


def _remove_macvtap(link: Link) -> None:
    ipr = _ipr()
    with _naming(f"macvtap {link['tap']}"), _gone_is_well():
        ours = [
            message["index"]
            for message in ipr.get_links()
            if message.get_attr("IFLA_IFNAME") == link["tap"]
            and message.get_attr("IFLA_IFALIAS") == link["owner"]
        ]
        if not ours:
            return
        ipr.link("del", index=ours[0])
    with _naming(f"interface {link['name']}"), _gone_is_well():
        ipr.link("set", index=link["index"], address=link["hardware_addr"])
        for address, prefix in link["addresses"]:
            with contextlib.suppress(Exception):  # the kernel has made it itself
                ipr.addr("add", index=link["index"], address=address, prefixlen=prefix)


@contextlib.contextmanager
def _gone_is_well() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if getattr(error, "code", 0) not in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            raise


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:  # noqa: PTH123
        file.write(text)


def _read(path: str) -> str:
    with open(path) as file:  # noqa: PTH123
        return file.read()
