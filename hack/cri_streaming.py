"""The client's side of exec, attach and port-forward: streams over SPDY/3.1, as the kubelet asks for them.

From the draft of SPDY/3.1, Kubernetes' `v4.channel.k8s.io` (one SPDY stream for each of error, stdin, stdout,
stderr and resize) and its `portforward.k8s.io` (two for each connection: error and data). Standard library
only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios
import tty
import zlib
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlsplit

_SYN_STREAM, _SYN_REPLY, _RST_STREAM, _PING, _GOAWAY = 1, 2, 3, 6, 7
_FIN = 1
_END = (0, b"", True)
_NOTHING = (0, b"", False)
_PROTOCOL = "v4.channel.k8s.io"
_FORWARD_PROTOCOL = "portforward.k8s.io"


class StreamingError(Exception):
    """The process could not be run or joined, in containerd's words."""


def run(url: str, *, stdin: bool, tty: bool) -> int:
    """Join our stdin, stdout and stderr to the process's; its exit status. Raises StreamingError."""
    with contextlib.ExitStack() as stack:
        connection = _Spdy(stack, url)
        error = connection.open("error")
        inputs = connection.open("stdin") if stdin else 0
        outputs = {connection.open("stdout"): 1}
        if not tty:
            outputs[connection.open("stderr")] = 2
        else:
            resize = connection.open("resize")  # waited for, whether it is used or not
            if sys.stdin.isatty():
                stack.enter_context(_raw_terminal())
                stack.enter_context(_on_resize(lambda size: connection.send(resize, size)))
        return _exit_status(_pump(connection, error, inputs, outputs))


def forward(url: str, ports: Mapping[int, int]) -> None:
    """Listen on 127.0.0.1, and carry every connection to the pod, for ever: `ports` are the pod's, with our
    own (0: any that is free). Raises StreamingError."""
    with contextlib.ExitStack() as stack:
        connection = _Spdy(stack, url, _FORWARD_PROTOCOL)
        listeners = {}
        for remote, local in ports.items():
            listener = stack.enter_context(socket.create_server(("127.0.0.1", local)))
            listeners[listener] = remote
            print(f"Forwarding from 127.0.0.1:{listener.getsockname()[1]} -> {remote}", flush=True)
        _Forwarding(connection).run(listeners)


class _Forwarding:
    def __init__(self, connection: _Spdy) -> None:
        self._connection = connection
        self._by_stream: dict[int, socket.socket] = {}
        self._by_socket: dict[socket.socket, int] = {}
        """Those that have not ended on our side."""
        self._errors: dict[int, int] = {}
        """An error stream's port."""

    def run(self, listeners: Mapping[socket.socket, int]) -> None:
        spdy = self._connection
        while True:
            sources = [spdy.socket, *listeners, *self._by_socket]
            readable, _, _ = select.select(sources, [], [], 0 if spdy.is_ready() else None)
            for each in readable:
                if each in listeners:
                    self._accept(each.accept()[0], listeners[each])
                elif each in self._by_socket:
                    self._read(each)
            if spdy.socket in readable or spdy.is_ready():
                self._receive(*spdy.receive())

    def _accept(self, sock: socket.socket, port: int) -> None:
        names = {"port": str(port), "requestid": str(sock.fileno() << 32 | len(self._errors))}
        error = self._connection.open("error", **names)
        self._connection.send(error, b"", end=True)
        self._errors[error] = port
        data = self._connection.open("data", **names)
        self._by_stream[data], self._by_socket[sock] = sock, data

    def _read(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(16384)
        except OSError:
            data = b""
        stream = self._by_socket[sock]
        self._connection.send(stream, data, end=not data)
        if not data:
            del self._by_socket[sock]

    def _receive(self, stream: int, data: bytes, ended: bool) -> None:
        if (stream, data, ended) == _END:
            raise StreamingError("the connection ended")
        if stream in self._errors and data:
            text = data.decode(errors="replace")
            print(f"an error occurred forwarding {self._errors[stream]}: {text}", file=sys.stderr, flush=True)
        if (sock := self._by_stream.get(stream)) is None:
            return
        try:
            sock.sendall(data)
        except OSError:
            ended = True
        if ended:
            del self._by_stream[stream]
            self._by_socket.pop(sock, None)
            sock.close()


class _Spdy:
    """The connection, and the frames of it that are used here."""

    def __init__(self, stack: contextlib.ExitStack, url: str, protocol: str = _PROTOCOL) -> None:
        parts = urlsplit(url)
        address = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.socket = stack.enter_context(socket.create_connection(address))
        self._received = stack.enter_context(self.socket.makefile("rb"))
        self._compressor = zlib.compressobj()
        self._next_id = 1
        self._accepted: set[int] = set()
        self._early: list[tuple[int, bytes, bool]] = []
        """Received while streams were being opened."""
        request = (
            f"POST {parts.path}?{parts.query} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Connection: Upgrade",
            "Upgrade: SPDY/3.1",
            f"X-Stream-Protocol-Version: {protocol}",
            "Content-Length: 0",
        )
        self.socket.sendall("\r\n".join((*request, "", "")).encode())
        status = self._received.readline().decode().strip()
        while self._received.readline().strip():
            pass
        if " 101 " not in f"{status} ":
            raise StreamingError(f"{url}: found {status!r}, expected 101 Switching Protocols")

    def open(self, kind: str, **more: str) -> int:
        """A new stream; its id."""
        stream, self._next_id = self._next_id, self._next_id + 2
        headers = struct.pack(">I", 1 + len(more))
        for name, value in {"streamtype": kind, **more}.items():
            for text in (name.encode(), value.encode()):
                headers += struct.pack(">I", len(text)) + text
        # The dictionary of the draft may be left out: zlib's header says which one was used. What the server
        # compresses with it, the headers of its answers, is not read.
        block = self._compressor.compress(headers) + self._compressor.flush(zlib.Z_SYNC_FLUSH)
        self._control(_SYN_STREAM, struct.pack(">IIBB", stream, 0, 0, 0) + block)
        # The server would lose what comes for a stream that it does not know yet.
        while stream not in self._accepted:
            self._early.append(self._receive())
            if self._early[-1] == _END:
                raise StreamingError(f"the connection ended before {kind} was accepted")
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        self.socket.sendall(struct.pack(">II", stream, (_FIN if end else 0) << 24 | len(data)) + data)

    def receive(self) -> tuple[int, bytes, bool]:
        """The next frame: stream, bytes, whether they were its last; `_NOTHING` when there was no data in it,
        `_END` at the end of the connection."""
        return self._early.pop(0) if self._early else self._receive()

    def _receive(self) -> tuple[int, bytes, bool]:
        head = self._received.read(8)
        if len(head) < 8:
            return _END
        first, second = struct.unpack(">II", head)
        flags, length = second >> 24, second & 0xFFFFFF
        body = self._received.read(length)
        if not first & 0x80000000:
            return first, body, bool(flags & _FIN)
        kind = first & 0xFFFF
        if kind == _GOAWAY:
            return _END
        if kind == _RST_STREAM:
            return struct.unpack(">I", body[:4])[0], b"", True
        if kind == _SYN_REPLY:
            self._accepted.add(struct.unpack(">I", body[:4])[0])
        elif kind == _PING:
            self._control(_PING, body)
        return _NOTHING

    def is_ready(self) -> bool:
        """Something has been read already, where select(2) does not see it."""
        if self._early:
            return True
        self.socket.setblocking(False)
        try:
            return bool(self._received.peek(1))
        except BlockingIOError:
            return False
        finally:
            self.socket.setblocking(True)

    def _control(self, kind: int, body: bytes) -> None:
        self.socket.sendall(struct.pack(">HHI", 0x8003, kind, len(body)) + body)


def _pump(connection: _Spdy, error: int, stdin: int, outputs: dict[int, int]) -> bytes:
    """Until the process has ended; what came on the error stream."""
    message, is_open = b"", {error, *outputs}
    sources = [connection.socket, *([sys.stdin.buffer.fileno()] if stdin else [])]
    while is_open:
        readable, _, _ = select.select(sources, [], [], 0 if connection.is_ready() else None)
        if stdin and sys.stdin.buffer.fileno() in readable:
            data = os.read(sys.stdin.buffer.fileno(), 16384)
            with contextlib.suppress(OSError):  # it has ended
                connection.send(stdin, data, end=not data)
            if not data:
                sources = [connection.socket]
        if connection.socket in readable or connection.is_ready():
            stream, data, ended = connection.receive()
            if (stream, data, ended) == _END:
                break
            if stream == error:
                message += data
            elif stream in outputs:
                _write(outputs[stream], data)
            if ended:
                is_open.discard(stream)
    return message


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _exit_status(message: bytes) -> int:
    """Of the `Status` object that Kubernetes' API has for this; nothing at all is a success."""
    if not message:
        return 0
    try:
        status = json.loads(message)
    except ValueError:
        raise StreamingError(message.decode(errors="replace")) from None
    if status.get("status") == "Success":
        return 0
    for cause in (status.get("details") or {}).get("causes") or []:
        if cause.get("reason") == "ExitCode":
            return int(cause["message"])
    raise StreamingError(status.get("message") or message.decode(errors="replace"))


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    before = termios.tcgetattr(sys.stdin)
    tty.setraw(sys.stdin, termios.TCSADRAIN)  # what has been typed already stays
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _on_resize(send: Callable[[bytes], None]) -> Iterator[None]:
    def tell(*_: object) -> None:
        rows, columns, _, _ = struct.unpack("HHHH", fcntl.ioctl(sys.stdin, termios.TIOCGWINSZ, b"\0" * 8))
        send(json.dumps({"Width": columns, "Height": rows}).encode())

    before = signal.signal(signal.SIGWINCH, tell)
    try:
        tell()
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
