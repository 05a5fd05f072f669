"""TCP connections of the host's into the pod, to what listens in it: also on its loopback addresses alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from agent_client.protocols.forwarding import Broken, Carrier, reset
from agent_client.protocols.port_forward_pb2 import Chunk
from guest.agent.network import own_addresses
from ttrpc import Code, StatusError

_LOOPBACK = ("127.0.0.1", "::1")
_DIAL_TIMEOUT_S = 10.0


async def forward(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """UNAVAILABLE when nobody listens, ABORTED when the connection breaks."""
    first = await anext(chunks, None)
    if first is None or not 0 < first.port < 1 << 16:
        raise StatusError(Code.INVALID_ARGUMENT, "expected a port of 1 to 65535 in the first chunk")
    reader, writer = await _dial(first.port)
    # What the host does not take waits here, and with it the connection.
    outgoing: asyncio.Queue[Chunk | None] = asyncio.Queue(maxsize=1)

    async def carry() -> None:
        try:
            await Carrier(reader, writer, outgoing.put).run(chunks)
        except Exception:
            await outgoing.put(None)
            raise
        await outgoing.put(None)

    carrying = asyncio.create_task(carry())
    try:
        while (chunk := await outgoing.get()) is not None:
            yield chunk
        await carrying
        writer.close()
    except Broken as error:
        raise StatusError(Code.ABORTED, f"port {first.port}: {error}") from error
    finally:
        if not writer.is_closing():
            reset(writer)
        carrying.cancel()
        await asyncio.wait({carrying})


async def _dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """127.0.0.1 first, as containerd has it for pods without a machine; then what else is the pod's."""
    failures = []
    for address in (*_LOOPBACK, *own_addresses()):
        try:
            async with asyncio.timeout(_DIAL_TIMEOUT_S):
                return await asyncio.open_connection(address, port)
        except OSError as error:
            failures.append(f"{address}: {error.strerror or 'no answer'}")
    raise StatusError(Code.UNAVAILABLE, f"nobody listens on port {port} in the pod ({', '.join(failures)})")
