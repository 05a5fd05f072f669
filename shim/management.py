"""Kata's shim management: HTTP on a unix socket, for `kata-py` and Kata's own tools, after
`shim_management.go`. One request a connection.

Imported when somebody asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from virtcontainers.errors import KataError
from virtcontainers.sandbox import Sandbox

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
"""What the agent's protocol can carry."""
_REQUEST_TIMEOUT_S = 60.0
"""Only a hang is longer, also on a machine that is busy."""

_REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    411: "Length Required",
    413: "Content Too Large",
    500: "Internal Server Error",
    501: "Not Implemented",
}


@dataclass(frozen=True)
class Request:
    sandbox: Sandbox
    method: str
    path: str
    query: dict[str, str]
    body: bytes


class HttpError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


Handler = Callable[[Request], Awaitable[bytes]]


async def _metrics(request: Request) -> bytes:
    return (await request.sandbox.agent.get_metrics(_REQUEST_TIMEOUT_S)).encode()


async def _agent_url(request: Request) -> bytes:
    return str(request.sandbox.agent.client.address).encode()


async def _get_ip_tables(request: Request) -> bytes:
    return await request.sandbox.agent.get_ip_tables(is_ipv6=request.path == "/ip6tables")


async def _set_ip_tables(request: Request) -> bytes:
    await request.sandbox.agent.set_ip_tables(request.body, is_ipv6=request.path == "/ip6tables")
    return b""


async def _volume_stats(request: Request) -> bytes:
    """As Go writes the agent's answer in JSON: what is zero is left out, enums are numbers."""
    if not (device := unquote(request.query.get("path", ""))):
        raise HttpError(400, "expected the parameter path")
    found = await request.sandbox.guest_volume_stats(device)
    usage = [
        {field.name: value for field, value in each.ListFields() if value is not None} for each in found.usage
    ]
    condition = {field.name: value for field, value in found.volume_condition.ListFields()}
    return json.dumps({"usage": usage, "volume_condition": condition}).encode()


async def _resize_volume(request: Request) -> bytes:
    try:
        asked = json.loads(request.body)
        device, size = asked["VolumePath"], asked["Size"]
        if not isinstance(device, str) or not isinstance(size, int) or not 0 < size < 1 << 63:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        found = request.body[:100].decode(errors="replace")
        raise HttpError(
            400, f'found {found!r}, expected {{"VolumePath": "/dev/...", "Size": bytes}}'
        ) from None
    await request.sandbox.resize_guest_volume(device, size)
    return b""


ROUTES: dict[str, dict[str, Handler]] = {
    "/metrics": {"GET": _metrics},
    "/agent-url": {"GET": _agent_url},
    "/iptables": {"GET": _get_ip_tables, "PUT": _set_ip_tables},
    "/ip6tables": {"GET": _get_ip_tables, "PUT": _set_ip_tables},
    "/direct-volume/stats": {"GET": _volume_stats},
    "/direct-volume/resize": {"POST": _resize_volume},
}
"""Path -> method -> who answers. Kata's names."""


async def serve(sandbox: Sandbox, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the connection's one request, and close it."""
    try:
        try:
            async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                request = await _read(sandbox, reader)
            status, body = 200, await _handler(request)(request)
        except HttpError as error:
            status, body = error.status, str(error).encode()
        except KataError as error:
            status, body = 500, str(error).encode()
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
    except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
        log.debug("management: a request that is none: %r", error, extra={"sandbox": sandbox.id})
    except Exception:
        log.exception("management", extra={"sandbox": sandbox.id})
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _handler(request: Request) -> Handler:
    methods = ROUTES.get(request.path)
    if methods is None:
        raise HttpError(404, f"{request.path}: expected one of {', '.join(ROUTES)}")
    if request.method not in methods:
        raise HttpError(501, f"{request.method} {request.path}: expected {' or '.join(methods)}")
    return methods[request.method]


async def _read(sandbox: Sandbox, reader: asyncio.StreamReader) -> Request:
    # The stream's limit, 64 KiB, is that of the head.
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise HttpError(400, f"found {first!r}, expected METHOD PATH HTTP/1.1")
    headers = {name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    if headers.get("transfer-encoding"):
        raise HttpError(411, "expected a Content-Length")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
        raise HttpError(413, f"Content-Length is {length}, expected at most {MAX_BODY_BYTES}")
    url = urlsplit(words[1])
    query = {key: values[-1] for key, values in parse_qs(url.query).items()}
    return Request(sandbox, words[0], url.path, query, await reader.readexactly(int(length)))
