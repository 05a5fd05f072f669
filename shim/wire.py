"""Protobuf's wire format, as much of it as `start` and `delete` need.

Importing protobuf costs more than both.
"""

from __future__ import annotations


def varint(value: int) -> bytes:
    out = bytearray()
    value &= (1 << 64) - 1
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode(number: int, value: int | bytes) -> bytes:
    """One field: an integer of any kind but sint, or a string or message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value) if value else b""
    return varint(number << 3 | 2) + varint(len(value)) + value


def decode(data: bytes) -> dict[int, int | bytes] | None:
    """Field number -> its last value, a negative integer as 64 bits. None when it is no message."""
    fields: dict[int, int | bytes] = {}
    position = 0

    def read_varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("varint of more than 64 bits")

    try:
        while position < len(data):
            key = read_varint()
            kind = key & 7
            if kind == 0:
                fields[key >> 3] = read_varint()
                continue
            size = {1: 8, 5: 4}[kind] if kind != 2 else read_varint()
            if position + size > len(data):
                return None
            fields[key >> 3] = data[position : position + size]
            position += size
    except (IndexError, KeyError, ValueError):
        return None
    return fields
