"""Asking a pod's shim over its management socket, after Kata's `shimclient`."""

from __future__ import annotations

import http.client
import socket

from virtcontainers import persist
from virtcontainers.errors import InvalidArgumentError, KataError, NotFoundError

TIMEOUT_S = 60.0
"""The agent's calls may take as long; Kata waits three seconds, for machines that are not emulated."""


class _Connection(http.client.HTTPConnection):
    def __init__(self, sandbox_id: str, timeout_s: float) -> None:
        super().__init__("shim", timeout=timeout_s)
        self._sandbox_id = sandbox_id

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with persist.management_address(self._sandbox_id) as address:
            self.sock.connect(address)


def do_get(sandbox_id: str, url: str, *, timeout_s: float = TIMEOUT_S) -> bytes:
    """The answer to GET. Raises KataError's classes."""
    return _request(sandbox_id, "GET", url, None, timeout_s)


def do_put(sandbox_id: str, url: str, body: bytes, *, timeout_s: float = TIMEOUT_S) -> bytes:
    return _request(sandbox_id, "PUT", url, body, timeout_s)


def do_post(sandbox_id: str, url: str, body: bytes, *, timeout_s: float = TIMEOUT_S) -> bytes:
    return _request(sandbox_id, "POST", url, body, timeout_s)


def _request(sandbox_id: str, method: str, url: str, body: bytes | None, timeout_s: float) -> bytes:
    if not sandbox_id or "/" in sandbox_id or sandbox_id in (".", ".."):
        raise InvalidArgumentError(f"sandbox id {sandbox_id!r}: expected the id of a pod")
    connection = _Connection(sandbox_id, timeout_s)
    try:
        connection.request(method, url, body)
        answer = connection.getresponse()
        text = answer.read()
    except (FileNotFoundError, ConnectionRefusedError):
        path = persist.management_socket(sandbox_id)
        raise NotFoundError(f"sandbox {sandbox_id}: nobody serves {path}") from None
    except (OSError, http.client.HTTPException) as error:
        raise KataError(f"sandbox {sandbox_id}: {method} {url}: {error or 'no answer'}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise KataError(f"sandbox {sandbox_id}: {method} {url}: {text.decode(errors='replace').strip()}")
    return text
