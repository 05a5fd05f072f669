"""Port-forward: connections to the loopback addresses of the pod's network namespace end in its machine.

For a port-forward containerd (and CRI-O) connects to localhost inside the namespace, where without a machine
the container would listen. Nothing listens there for ours: its sockets are the guest's, and what is sent to
the namespace's own addresses from inside stays inside. So one socket of ours is given all such connections,
and each is carried to the guest's loopback by our agent, on the connection it has anyhow.

By a BPF program: netfilter's way, a rule that redirects, needs modules that a host may not have, tracks
connections, and must be taken away again. This one ends with our process, and is asked only where a
connection arrives in the namespace itself: the pod's packets are the machine's, and never do.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable
from typing import Any, cast

from ttrpc import TtrpcError
from virtcontainers.agent import KataAgent
from virtcontainers.network.sk_lookup import Listener

log = logging.getLogger(__name__)

_MOST = 64
"""Connections at a time: each may hold two windows, here and in the guest."""
_IDLE_AFTER_END_S = 60.0
"""Who asked closes a second after either end; the kernel forgets a closed connection after a minute."""


class PortForward:
    """Of one pod; it idles as a socket and a BPF program."""

    def __init__(self, namespace: int, agent: KataAgent, *, sandbox_id: str) -> None:
        """`namespace` is a descriptor of the pod's network namespace. Raises KataError."""
        self._listener = Listener(namespace)
        self._agent = agent
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._log = logging.LoggerAdapter(log, {"sandbox": sandbox_id})

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, sock=self._listener.socket)

    async def close(self) -> None:
        """Idempotent."""
        if self._server is not None:
            self._server.close()
        self._listener.close()
        for task in self._connections:
            task.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The first connection's to pay: few pods ever have one.
        from agent_client.protocols.forwarding import Broken, Carrier, reset
        from agent_client.protocols.port_forward_pb2 import Chunk

        task = asyncio.current_task()
        assert task is not None
        port = writer.get_extra_info("sockname")[1]
        if len(self._connections) >= _MOST:
            self._log.warning("port-forward to port %d: refused, %d are open", port, _MOST)
            reset(writer)
            return
        self._connections.add(task)
        try:
            stream = await self._agent.client.forward()
            try:
                await stream.send(Chunk(port=port))
                carrier = Carrier(reader, writer, stream.send, idle_after_end_s=_IDLE_AFTER_END_S)
                await carrier.run(cast(AsyncIterable[Any], stream))
                await stream.close_send()
            except Broken:
                await stream.send(Chunk(reset=True))
                raise
            finally:
                stream.close()
            writer.close()
        except (Broken, TtrpcError) as error:
            self._log.info("port-forward to port %d: %s", port, error)
        finally:
            if not writer.is_closing():
                reset(writer)
            self._connections.discard(task)
