"""Frames as in PROTOCOL.md: length, stream id (both big-endian 32 bit), type, flags, then the payload."""

from __future__ import annotations

import asyncio
import struct
from typing import NamedTuple

from ttrpc.errors import Code, ProtocolError, StatusError

MAX_MESSAGE_BYTES = 4 << 20
READ_LIMIT = 1 << 20
"""For StreamReader's `limit`: what one connection buffers before it is no longer read is twice this."""

REQUEST = 1
RESPONSE = 2
DATA = 3

REMOTE_CLOSED = 0x01
REMOTE_OPEN = 0x02
NO_DATA = 0x04

_HEADER = struct.Struct(">IIBB")
_DISCARD_BYTES = 64 << 10
_JOIN_BYTES = 64 << 10


class Frame(NamedTuple):
    """One message. `oversized` is its announced length when that was over the limit: the payload is gone."""

    stream_id: int
    type: int
    flags: int
    payload: bytes
    oversized: int = 0


def check_size(length: int, limit: int = MAX_MESSAGE_BYTES) -> None:
    """Raises StatusError(RESOURCE_EXHAUSTED) for a payload over `limit`, in the words of Go's ttrpc."""
    if length > limit:
        raise StatusError(
            Code.RESOURCE_EXHAUSTED, f"message length {length} exceed maximum message size of {limit}"
        )


def encode(stream_id: int, type_: int, flags: int, payload: bytes) -> bytes:
    return _HEADER.pack(len(payload), stream_id, type_, flags) + payload


def write_frame(writer: asyncio.StreamWriter, stream_id: int, type_: int, flags: int, payload: bytes) -> None:
    """Hands a frame to the transport in one go: frames of several tasks do not mix."""
    if len(payload) <= _JOIN_BYTES:
        writer.write(encode(stream_id, type_, flags, payload))
    else:
        # Joining would copy what the socket mostly takes from where it is.
        writer.write(_HEADER.pack(len(payload), stream_id, type_, flags))
        writer.write(payload)


async def read_frame(reader: asyncio.StreamReader, limit: int = MAX_MESSAGE_BYTES) -> Frame | None:
    """The next frame, None at a clean end of the connection.

    A payload over `limit` is read and thrown away piece by piece. Raises ProtocolError when the reserved
    first byte is set or the connection ends inside a frame.
    """
    inside = False
    try:
        length, stream_id, type_, flags = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        inside = True
        if length >> 24:
            raise ProtocolError(f"the reserved first byte of a frame is {length >> 24:#04x}, expected 0")
        if length > limit:
            left = length
            while left:
                piece = await reader.read(min(left, _DISCARD_BYTES))
                if not piece:
                    raise ProtocolError("the connection ended inside a frame")
                left -= len(piece)
            return Frame(stream_id, type_, flags, b"", length)
        payload = await reader.readexactly(length) if length else b""
    except asyncio.IncompleteReadError as error:
        if error.partial or inside:
            raise ProtocolError("the connection ended inside a frame") from None
        return None
    return Frame(stream_id, type_, flags, payload)


def peer_name(writer: asyncio.StreamWriter) -> str:
    """For the log: the unix socket's path or the vsock address, whichever side has one."""
    for side in ("peername", "sockname"):
        name = writer.get_extra_info(side)
        if name:
            return name if isinstance(name, str) else repr(name)
    return "an unnamed socket"


def abort(writer: asyncio.StreamWriter) -> None:
    """End the connection now. Not close, which waits for a peer that may never read."""
    transport = writer.transport
    # asyncio's own abort fails on a transport that has closed after a flush.
    if not transport.is_closing() or transport.get_write_buffer_size():
        transport.abort()
