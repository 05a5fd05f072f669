"""One call of gRPC over a unix socket, by hand.

The library would cost 31 MB in each process that serves a pod, which makes two calls in its life. Sources:
RFC 9113 (HTTP/2), RFC 7541 (HPACK), gRPC's PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import struct
from asyncio import StreamReader, StreamWriter
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from urllib.parse import unquote

from virtcontainers.errors import DeadlineExceededError, KataError, UnavailableError

ANSWER_LIMIT_BYTES = 60_000
"""The window of a stream is 65535 bytes until its receiver opens it further, which we never do."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_STREAM = 1
_FRAME_LIMIT_BYTES = 16384
_HEADERS_LIMIT_BYTES = 16384
_HEADER_TABLE_SIZE = 1
"""The setting of that name."""

_ACK = 0x1
_END_STREAM = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8
_PRIORITY = 0x20

_STATUS = {8: "200", 9: "204", 10: "206", 11: "304", 12: "400", 13: "404", 14: "500"}
"""`:status` in HPACK's static table. Nothing else of what is in it matters to us."""
_STATIC_ENTRIES = 61

# <grpc/status.h>
_CODES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE"),
    *("UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)


class _Frame(IntEnum):
    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    CONTINUATION = 9


class GrpcStatusError(KataError):
    """The server's refusal; `code` is the name of its status."""

    def __init__(self, what: str, code: str, message: str) -> None:
        self.code = code
        super().__init__(f"{what}: {message} ({code})")


async def call_unary(path: Path, method: str, request: bytes = b"", *, timeout_s: float) -> bytes:
    """The answer of the server on `path` to `method` ("/package.Service/Method").

    Raises GrpcStatusError; UnavailableError when nobody listens there, or ends the connection;
    DeadlineExceededError; KataError for what is no answer, or one above ANSWER_LIMIT_BYTES.
    """
    what = f"{path}: {method.rpartition('/')[2]}"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_unix_connection(path)
            try:
                writer.write(_render(method, request))
                answer = await _Answer(what).read(reader, writer)
            finally:
                writer.transport.abort()
    except TimeoutError:
        raise DeadlineExceededError(f"{what}: no answer within {timeout_s:g} s") from None
    except EOFError:
        raise UnavailableError(f"{what}: the server ended the connection") from None
    except OSError as error:
        raise UnavailableError(f"{what}: nobody serves it: {error.strerror or error}") from error
    return answer


def _render(method: str, request: bytes) -> bytes:
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": method,
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    # 0x10: neither name nor value is in a table, or is to be put into one.
    block = b"".join(b"\x10" + _string(name) + _string(value) for name, value in headers.items())
    message = struct.pack(">BI", 0, len(request)) + request
    assert len(message) <= _FRAME_LIMIT_BYTES
    return b"".join(
        (
            _PREFACE,
            # Without a table, the server's headers mean the same whatever came before them.
            _frame(_Frame.SETTINGS, 0, 0, struct.pack(">HI", _HEADER_TABLE_SIZE, 0)),
            _frame(_Frame.HEADERS, _END_HEADERS, _STREAM, block),
            _frame(_Frame.DATA, _END_STREAM, _STREAM, message),
        )
    )


def _frame(kind: _Frame, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _string(text: str) -> bytes:
    assert len(text) < 127
    return bytes([len(text)]) + text.encode()


@dataclass
class _Answer:
    what: str
    headers: dict[str, str] = field(default_factory=dict)
    """With the trailers."""
    body: bytearray = field(default_factory=bytearray)
    _block: bytearray = field(default_factory=bytearray)
    _ended: bool = False

    async def read(self, reader: StreamReader, writer: StreamWriter) -> bytes:
        while True:
            head = await reader.readexactly(9)
            length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
            if length > _FRAME_LIMIT_BYTES:
                raise self.garbage(f"a frame of {length} bytes")
            payload = await reader.readexactly(length)
            match kind:
                case _Frame.SETTINGS if not flags & _ACK:
                    writer.write(_frame(_Frame.SETTINGS, _ACK, 0, b""))
                case _Frame.PING if not flags & _ACK:
                    writer.write(_frame(_Frame.PING, _ACK, 0, payload))
                case _Frame.RST_STREAM | _Frame.GOAWAY:
                    # A server that goes away still answers what it has taken on.
                    if kind == _Frame.RST_STREAM or int.from_bytes(payload[:4], "big") < _STREAM:
                        raise UnavailableError(f"{self.what}: the server refuses the call")
                case _Frame.HEADERS | _Frame.CONTINUATION:
                    self._take_headers(kind, flags, payload)
                case _Frame.DATA:
                    self._ended |= bool(flags & _END_STREAM)
                    self.body += self._unpadded(flags, payload)
                    self._check_size()
            if self._ended and not self._block:
                return self._result()

    def garbage(self, found: str) -> KataError:
        return KataError(f"{self.what}: found {found}, expected an answer of gRPC")

    def _take_headers(self, kind: int, flags: int, payload: bytes) -> None:
        if kind == _Frame.HEADERS:
            self._ended |= bool(flags & _END_STREAM)
            payload = self._unpadded(flags, payload)
            if flags & _PRIORITY:
                payload = payload[5:]
        self._block += payload
        if len(self._block) > _HEADERS_LIMIT_BYTES:
            raise self.garbage(f"headers of more than {_HEADERS_LIMIT_BYTES} bytes")
        if flags & _END_HEADERS:
            try:
                self.headers |= _decode(bytes(self._block))
            except (ValueError, IndexError) as error:
                raise self.garbage(f"headers that cannot be read: {error}") from None
            self._block.clear()

    def _unpadded(self, flags: int, payload: bytes) -> bytes:
        if not flags & _PADDED:
            return payload
        if not payload or payload[0] >= len(payload):
            raise self.garbage("a frame of padding")
        return payload[1 : len(payload) - payload[0]]

    def _check_size(self) -> None:
        """The first that is said of a message is how large it will be."""
        size = int.from_bytes(self.body[1:5], "big") if len(self.body) >= 5 else 0
        if max(size, len(self.body)) > ANSWER_LIMIT_BYTES:
            raise KataError(f"{self.what}: found {size} bytes, expected at most {ANSWER_LIMIT_BYTES}")

    def _result(self) -> bytes:
        http, status = self.headers.get(":status"), self.headers.get("grpc-status", "")
        if http != "200":
            raise self.garbage(f"HTTP status {http}")
        if not status.isdecimal():
            raise self.garbage("no status")
        if int(status) != 0:
            code = _CODES[int(status)] if int(status) < len(_CODES) else f"status {status}"
            message = unquote(self.headers.get("grpc-message", "")) or "the server does not say why"
            raise GrpcStatusError(self.what, code, message)
        if len(self.body) < 5 or self.body[0] != 0 or len(self.body) != 5 + int.from_bytes(self.body[1:5]):
            raise self.garbage(f"a message of {len(self.body)} bytes that is none")
        return bytes(self.body[5:])


def _decode(block: bytes) -> dict[str, str]:
    """The headers of an HPACK block made without a dynamic table. Those with a name or value that is
    Huffman-coded are left out, and of the static table all but `:status`. Raises ValueError and IndexError.
    """
    headers = {}
    at = 0
    while at < len(block):
        first = block[at]
        if first & 0x80:
            index, at = _integer(block, at, 7)
            if not 0 < index <= _STATIC_ENTRIES:
                raise ValueError(f"index {index}")
            if index in _STATUS:
                headers[":status"] = _STATUS[index]
            continue
        if first & 0xE0 == 0x20:
            _, at = _integer(block, at, 5)  # the size of the table, which is 0
            continue
        index, at = _integer(block, at, 6 if first & 0x40 else 4)
        if index > _STATIC_ENTRIES:
            raise ValueError(f"index {index}")
        name: str | None = ":status" if index in _STATUS else None
        if index == 0:
            name, at = _text(block, at)
        value, at = _text(block, at)
        if name is not None and value is not None:
            headers[name] = value
    return headers


def _integer(block: bytes, at: int, prefix_bits: int) -> tuple[int, int]:
    most = (1 << prefix_bits) - 1
    value, at = block[at] & most, at + 1
    if value < most:
        return value, at
    for shift in (0, 7, 14):
        octet, at = block[at], at + 1
        value += (octet & 0x7F) << shift
        if octet < 0x80:
            return value, at
    raise ValueError("a number above all limits")


def _text(block: bytes, at: int) -> tuple[str | None, int]:
    """None: it is Huffman-coded, which gRPC's own servers do not do."""
    huffman = block[at] & 0x80
    length, at = _integer(block, at, 7)
    if at + length > len(block):
        raise ValueError("a string beyond the end")
    return None if huffman else block[at : at + length].decode("ascii", "replace"), at + length
