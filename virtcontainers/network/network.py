"""The network of one pod: its namespace's links are the machine's, from its start to its end, after Kata's
`network_linux.go`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from virtcontainers.agent import KataAgent
from virtcontainers.config import HypervisorConfig, NetworkConfig
from virtcontainers.device_cgroup import DeviceRule
from virtcontainers.errors import KataError, UnavailableError
from virtcontainers.hypervisor.base import Hypervisor, NetDevice
from virtcontainers.network import events
from virtcontainers.network.child import NamespaceChild, open_namespace
from virtcontainers.network.endpoints import (
    Endpoint,
    InterworkingModel,
    NetworkInfo,
    Route,
    agent_gone_neighbors,
    agent_interface,
    agent_neighbors,
    agent_routes,
    is_configured,
    new_endpoint,
    static_neighbors,
)

log = logging.getLogger(__name__)

VHOST_NET = Path("/dev/vhost-net")
_SETTLE_S = 0.2
"""Who sets up a link makes a dozen changes, one after another."""
_RETRY_S = 1.0
"""After a change could not be followed; then twice as long each time."""
_MOST_RETRY_S = 60.0
_UNPLUG_TIMEOUT_S = 30.0
_MOST_QUEUES = 64
"""Of a card; all its descriptors come in one message."""

_FALLBACK_LINKS = frozenset(
    ("lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6gre0")
)
"""What the kernel itself puts into every new namespace."""


@dataclass
class _Changes:
    """From what the machine has to what is in the namespace."""

    gone: list[Endpoint] = field(default_factory=list)
    new: list[tuple[Endpoint, NetDevice]] = field(default_factory=list)
    changed: list[Endpoint] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.gone or self.new or self.changed)

    def close(self) -> None:
        """The descriptors that no machine has got."""
        for _, device in self.new:
            for fd in (*device.fds, *device.vhost_fds):
                os.close(fd)
        self.new = []


class Network:
    """Of one pod. `on_planned` is told, before it exists, of what `cleanup` needs to undo it; `allowed` lasts
    while devices are opened."""

    def __init__(
        self,
        config: NetworkConfig,
        hypervisor: HypervisorConfig,
        *,
        sandbox_id: str,
        on_planned: Callable[[dict[str, Any]], None],
        allowed: Callable[[list[DeviceRule]], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.config = config
        self._id = sandbox_id
        self.endpoints: list[Endpoint] = []
        self._planned: dict[int, dict[str, Any]] = {}
        """What has to be undone in the end, by the link's index."""
        self._queues = min(max(1, hypervisor.default_vcpus), _MOST_QUEUES)
        self._vhost_net = not hypervisor.disable_vhost_net and VHOST_NET.exists()
        self._on_planned = on_planned
        self._allowed = allowed
        self._path = config.network_namespace
        self._namespace = -1
        self._watch = -1
        """The socket on which the kernel tells of changes in the namespace."""
        self._taps: set[int] = set()
        self._flushed_routes: dict[int, tuple[Route, ...]] = {}
        """What links have lost to macvtaps that came to nothing, by their indices: addresses come back, and
        these do not."""
        self._lost_routes: frozenset[str] = frozenset()
        """Of which there was a warning."""
        self._neighbors: set[tuple[int, str]] = set()
        """Those that somebody had set, and the guest may have."""
        self._is_stale = False
        """There were changes since the namespace was looked at."""
        self._guest_knows = True
        """It was told of all that was seen."""
        self._timer: asyncio.TimerHandle | None = None
        """Of the next look at the namespace."""
        self._retry_s = _RETRY_S
        self._complaint = ""
        self._lock = asyncio.Lock()
        """Of all that is done to the machine's cards and the guest's network."""
        self._first: asyncio.Task[_Changes] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._machine: tuple[Hypervisor, KataAgent] | None = None
        self._log = logging.LoggerAdapter(log, {"sandbox": sandbox_id})

    @property
    def _where(self) -> str:
        return f"network namespace {self._path}"

    @property
    def namespace(self) -> int | None:
        """A descriptor of the pod's namespace, from `start` to `delete`. None for a pod without one, or with
        one that is left alone."""
        has_one = self._namespace >= 0 and self.config.network_namespace is not None
        return self._namespace if has_one else None

    def start(self) -> None:
        """Look into the namespace and connect its links, while the machine starts. Raises
        InvalidArgumentError when there is no such namespace, or it is the host's."""
        if self._path is None or self.config.disable_new_network:
            return
        self._namespace = open_namespace(self._path)
        self._first = asyncio.create_task(self._look(strict=True))

    async def attach(self, hypervisor: Hypervisor, agent: KataAgent) -> None:
        """Give the guest what `start` has found, and from now on what changes.

        A pod without a namespace has its machine's own, where hooks, and `ctr run --cni`, put links.
        """
        if self.config.disable_new_network:
            return
        async with self._lock:
            if self._first is None:
                self._path = Path(f"/proc/{hypervisor.pid}/ns/net")
                try:
                    self._namespace = open_namespace(self._path)
                except KataError as error:
                    raise UnavailableError(f"the machine has no network namespace: {error}") from error
                self._first = asyncio.create_task(self._look(strict=True))
            changes = await self._first
            self._machine = hypervisor, agent
            await self._apply(changes)
            self._listen()

    async def settle(self) -> None:
        """Return when the guest has what was in the namespace when this was called; what could not be done
        before is tried again. Raises KataError, UnavailableError when `close` comes first."""
        if self._machine is None:
            return
        async with self._lock:
            if self._machine is None:  # it has ended while another had the lock
                raise self._has_ended()
            self._drain()
        if self._is_stale or not self._guest_knows:
            await self._until_closed(self._sync(strict=True))

    async def _until_closed(self, work: Coroutine[Any, Any, None]) -> None:
        """Raises UnavailableError when `close` comes first: it ends the work."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        try:
            await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._machine is not None or (caller is not None and caller.cancelling()):
                raise
            raise self._has_ended() from None

    def _has_ended(self) -> UnavailableError:
        return UnavailableError(f"{self._where}: its machine has ended")

    async def close(self) -> None:
        """The machine has ended, or is about to: nothing is done to it any more. Idempotent."""
        self._machine = None
        if self._watch >= 0:
            asyncio.get_running_loop().remove_reader(self._watch)
        if self._timer is not None:
            self._timer.cancel()
        tasks: list[asyncio.Task[Any]] = [*self._background, *([self._first] if self._first else [])]
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, _Changes):
                result.close()
        self._first = None

    async def delete(self) -> None:
        """Leave the namespace as it was, but for the routes of links that macvtap was used for; idempotent.
        Raises KataError."""
        await self.close()
        try:
            if self._planned and self.config.network_namespace is not None:
                await _disconnect(self._namespace, self._planned.values())
                self._planned = {}
        finally:
            for fd in (self._watch, self._namespace):
                if fd >= 0:
                    os.close(fd)
            self._watch = self._namespace = -1

    # -- the namespace

    async def _look(self, *, strict: bool) -> _Changes:
        """Find out what has changed, and make the TAPs of what is new.

        With `strict` a link that no machine can have is an error; else it is left out, which is logged.
        """
        changes = _Changes()
        try:
            async with NamespaceChild.inside(self._namespace) as child:
                if self._watch < 0:
                    # Before the look: no change comes between the two.
                    names, (self._watch,) = await child.call("watch")
                    if _FALLBACK_LINKS.issuperset(names):
                        return changes
                scanned, _ = await child.call("scan")
                self._warn_of(scanned["lost_routes"])
                found = {info.index: info for info in map(NetworkInfo.from_json, scanned["links"])}
                await self._compare(found, changes, child, strict=strict)
        except BaseException:
            changes.close()
            raise
        return changes

    def _warn_of(self, lost_routes: Iterable[str]) -> None:
        """Once for each. A route of the agent's protocol has one link, and one gateway at most; a route for
        each hop would be something else: the first of them would have all."""
        found = dict.fromkeys(lost_routes)
        for route in found:
            if route not in self._lost_routes:
                self._log.warning(
                    "the machine does not get a route of %s: found %s, expected one by one link: Kata's "
                    "agent is told of no others",
                    self._where,
                    route,
                )
        self._lost_routes = frozenset(found)

    async def _compare(
        self, found: dict[int, NetworkInfo], changes: _Changes, child: NamespaceChild, *, strict: bool
    ) -> None:
        for endpoint in self.endpoints:
            info = found.pop(endpoint.info.index, None)
            if info is None:
                changes.gone.append(endpoint)
                continue
            if endpoint.model is not InterworkingModel.TCFILTER:
                # What the link had is the guest's alone now.
                info = replace(endpoint.info, name=info.name, mtu=info.mtu)
            if info != endpoint.info or not self._guest_knows:
                if info.mtu != endpoint.info.mtu and endpoint.tap != info.name:
                    await child.call("set_mtu", name=endpoint.tap, mtu=info.mtu)
                endpoint.info = info
                changes.changed.append(endpoint)
        new: list[Endpoint] = []
        for info in filter(is_configured, found.values()):
            routes = self._flushed_routes.pop(info.index, ())
            info = replace(info, routes=(*routes, *(each for each in info.routes if each not in routes)))
            try:
                model = InterworkingModel(self.config.interworking_model)
                new.append(new_endpoint(info, model, [*self.endpoints, *new], where=self._where))
            except KataError as error:
                if strict:
                    raise
                self._log.error("the machine does not get a link: %s", error)
        if new:
            self._plan(new)
            self.endpoints += new
        for endpoint in new:
            made, fds = await self._connect(endpoint, child)
            self._taps.add(made["tap"])
            device = NetDevice(
                endpoint.tap, endpoint.info.hardware_addr, fds[: self._queues], fds[self._queues :]
            )
            changes.new.append((endpoint, device))

    async def _connect(self, endpoint: Endpoint, child: NamespaceChild) -> tuple[Any, list[int]]:
        link = endpoint.to_connect(self._id)
        arguments = {"link": link, "queues": self._queues, "vhost_net": self._vhost_net}
        if link["model"] not in ("macvtap", "existing"):
            return await child.call("connect", **arguments)
        device, _ = await child.call("make_macvtap", link=link)
        fds: list[int] = []
        try:
            with self._allowed([DeviceRule(True, f"c {device} rw")]):
                made, fds = await child.call("connect", **arguments, macvtap=device)
        except KataError:
            for fd in fds:
                os.close(fd)
            with contextlib.suppress(KataError):
                await child.call("disconnect", link=link)
            raise
        return made, fds

    def _plan(self, new: Iterable[Endpoint]) -> None:
        self._planned |= {each.info.index: each.to_connect(self._id) for each in new}
        if self.config.network_namespace is None:
            return  # it goes with the machine
        found = os.fstat(self._namespace)
        self._on_planned(
            {
                "path": str(self.config.network_namespace),
                "id": [found.st_dev, found.st_ino],
                "links": list(self._planned.values()),
            }
        )

    # -- the machine

    async def _sync(self, *, strict: bool) -> None:
        async with self._lock:
            if self._machine is None:
                return
            self._is_stale = False
            # What we do ourselves is told as well: only read once it is known what that was.
            asyncio.get_running_loop().remove_reader(self._watch)
            try:
                await self._apply(await self._look(strict=strict))
            except BaseException as error:
                # What has no card is new again next time, and the guest is told of the others anew.
                lost = [each for each in self.endpoints if not each.pci_path]
                self._flushed_routes |= {
                    each.info.index: each.info.routes
                    for each in lost
                    if each.model is InterworkingModel.MACVTAP
                }
                self.endpoints = [each for each in self.endpoints if each.pci_path]
                self._guest_knows = False
                if lost and isinstance(error, KataError):
                    # A link has its addresses no more while a macvtap is on it, and would be nobody's.
                    with contextlib.suppress(KataError):
                        await _disconnect(self._namespace, [each.to_connect(self._id) for each in lost])
                if self._machine is not None:
                    self._schedule_look(self._retry_s)
                    self._retry_s = min(2 * self._retry_s, _MOST_RETRY_S)
                raise
            finally:
                if self._machine is not None:
                    self._listen()
            self._retry_s, self._complaint = _RETRY_S, ""

    async def _apply(self, changes: _Changes) -> None:
        if not changes and self._guest_knows:
            return
        assert self._machine is not None
        hypervisor, agent = self._machine
        try:
            for endpoint in changes.gone:
                await hypervisor.hotunplug_net(endpoint.tap, timeout_s=_UNPLUG_TIMEOUT_S)
                self.endpoints.remove(endpoint)
                self._log.info("%s has gone from the pod", endpoint.info.name)
            for endpoint, device in changes.new:
                endpoint.pci_path = await hypervisor.hotplug_net(device)
        finally:
            new = [endpoint for endpoint, _ in changes.new]
            changes.close()
        for endpoint in (*new, *changes.changed):
            await agent.update_interface(agent_interface(endpoint))
        await agent.update_routes(agent_routes(self.endpoints))
        static = static_neighbors(self.endpoints)
        gone = agent_gone_neighbors(self.endpoints, self._neighbors - static)
        self._neighbors |= static
        if neighbors := [*gone, *agent_neighbors((*new, *changes.changed))]:
            await agent.add_arp_neighbors(neighbors)
        self._neighbors = static
        self._guest_knows = True
        for endpoint in new:
            self._log.info("the pod has %s (%s) by %s", endpoint.info.name, endpoint.type, endpoint.tap)

    # -- changes

    def _listen(self) -> None:
        asyncio.get_running_loop().add_reader(self._watch, self._on_message)

    def _on_message(self) -> None:
        self._drain()
        if self._is_stale:
            self._schedule_look(_SETTLE_S)

    def _schedule_look(self, delay_s: float) -> None:
        """Unless that is sooner anyhow."""
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            if self._timer.when() <= loop.time() + delay_s:
                return
            self._timer.cancel()
        self._timer = loop.call_later(delay_s, self._on_time)

    def _drain(self) -> None:
        while True:
            try:
                data = os.read(self._watch, 1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                self._is_stale = True
                if error.errno != errno.ENOBUFS:  # there were more than it can hold
                    return
            else:
                self._is_stale = self._is_stale or events.matter(data, self._taps, self._neighbors)

    def _on_time(self) -> None:
        self._timer = None
        if self._is_stale or not self._guest_knows:
            task = asyncio.create_task(self._sync_in_background())
            self._background.add(task)
            task.add_done_callback(self._background.discard)

    async def _sync_in_background(self) -> None:
        try:
            await self._sync(strict=False)
        except KataError as error:
            # Once: it is tried again, and may be so until the pod's end.
            level = logging.DEBUG if self._complaint == str(error) else logging.ERROR
            self._complaint = str(error)
            self._log.log(level, "the pod's network is not what its namespace has: %s", error)


async def cleanup(planned: dict[str, Any]) -> None:
    """In a fresh process: leave the namespace as it was before `Network`; idempotent. Raises KataError."""
    try:
        namespace = open_namespace(Path(planned["path"]))
    except KataError:
        return  # it has gone, and all in it
    try:
        found = os.fstat(namespace)
        if [found.st_dev, found.st_ino] == planned["id"]:
            await _disconnect(namespace, planned["links"])
    finally:
        os.close(namespace)


async def _disconnect(namespace: int, links: Iterable[dict[str, Any]]) -> None:
    failure: KataError | None = None
    async with NamespaceChild.inside(namespace) as child:
        for link in links:
            try:
                await child.call("disconnect", link=link)
            except KataError as error:
                failure = failure or error
    if failure is not None:
        raise failure
