"""What can go wrong on a ttrpc connection, by what a caller would want to tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any


class Code(IntEnum):
    """google.rpc.Code."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16

    @classmethod
    def _missing_(cls, value: object) -> Code:
        return cls.UNKNOWN


class TtrpcError(Exception):
    """Any failure of ttrpc."""


class StatusError(TtrpcError):
    """A call was answered with an error, by the peer's handler or by ttrpc itself; a handler raises it to
    answer so. `details` are google.protobuf.Any, or messages with its fields."""

    def __init__(self, code: Code, message: str, details: Sequence[Any] = ()) -> None:
        super().__init__(f"{code.name.lower()}: {message}")
        self.code = code
        self.message = message
        self.details = tuple(details)


class ProtocolError(TtrpcError):
    """The peer sent what is no ttrpc; its connection cannot go on."""


class ConnectionClosed(TtrpcError):
    """The connection ended before the answer came."""
