"""`start`: print where the shim of this container answers, and leave one behind there if there is none yet.

The parent binds the socket, forks and is done; the child becomes the server. containerd's first connection
waits in the socket's backlog while the child imports the rest. Imports next to nothing, see `shim.main`.
"""

from __future__ import annotations

import os
import stat
import sys
from _socket import AF_UNIX, SOCK_STREAM, socket

from shim.main import Flags
from shim.wire import decode, encode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

SIGKILL = 9
SOCKET_DIRECTORY = "/run/containerd/s"
SOCKET_PATH_LIMIT = 106
"""Of a sockaddr_un on every system that containerd knows."""

FD_LIMIT = 1 << 30
"""Above every descriptor: the kernel closes a range in one call."""

_STDIN_LIMIT = 10 << 20
_CONNECT_TIMEOUT_S = 0.1
_LOG_LEVEL_DEBUG = -4

# containerd's CRI plugin, CRI-O, dockershim: (is it a container of a pod, of which pod), as Kata knows them.
_POD_KEYS = (
    ("io.kubernetes.cri.container-type", "container", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "container", "io.kubernetes.cri-o.SandboxID"),
    ("io.kubernetes.docker.type", "container", "io.kubernetes.sandbox.id"),
)


class StartError(Exception):
    """`start` cannot; the message is for the user's terminal."""


class Bootstrap:
    """What containerd says in flags and environment, or, from 2.3 on, in a message on stdin."""

    def __init__(self, flags: Flags, stdin: bytes) -> None:
        self.address = flags.address
        self.socket_directory = SOCKET_DIRECTORY
        self.is_message = False
        maximum = os.environ.get("MAX_SHIM_VERSION", "")
        self.version = min(int(maximum), 3) if maximum.isdecimal() else 0
        """Of the task API; 0: containerd 1.6, which knows the plain address only."""
        params = decode(stdin)
        # Runtime options, which older ones send, decode as this message too: it must name the container.
        if params is None or params.get(1) != flags.id.encode() or params.get(2) != flags.namespace.encode():
            return
        self.is_message = True
        self.version = 3
        level = params.get(3, 0)
        if isinstance(level, int) and level >= 1 << 63:
            flags.debug = flags.debug or level - (1 << 64) <= _LOG_LEVEL_DEBUG
        for number, variable in ((5, "TTRPC_ADDRESS"), (6, "GRPC_ADDRESS")):
            if isinstance(value := params.get(number), bytes) and value:
                os.environ[variable] = value.decode()
        if isinstance(value := params.get(6), bytes) and value:
            self.address = value.decode()
        if isinstance(value := params.get(7), bytes) and value:
            flags.publish_binary = value.decode()
        if isinstance(value := params.get(9), bytes) and value:
            self.socket_directory = value.decode()

    def result(self, address: str) -> bytes:
        """What this containerd expects on stdout."""
        if self.is_message:
            return encode(1, self.version) + encode(2, address.encode()) + encode(3, b"ttrpc")
        if self.version >= 2:
            quoted = address.replace("\\", "\\\\").replace('"', '\\"')
            return f'{{"version":{self.version},"address":"{quoted}","protocol":"ttrpc"}}'.encode()
        return address.encode()


def start(flags: Flags) -> NoReturn:
    """Raises StartError. Neither of the two processes comes back from here otherwise."""
    bootstrap = Bootstrap(flags, read_stdin())
    bundle = os.getcwd()
    sandbox_id = pod_of(bundle)
    path = socket_path(bootstrap, flags.namespace, sandbox_id or flags.id)
    address = "unix://" + path
    listener = None
    if not answers(path):
        if sandbox_id not in (None, flags.id):
            raise StartError(f"sandbox {sandbox_id} has no shim: nobody answers on {path}")
        listener = listen(path)
    pid = 0
    try:
        write_file("address", address)
        if listener is not None:
            pid = os.fork()
            if pid == 0:
                become_server(flags, bundle, listener, path)
            write_file("shim.pid", str(pid))
    except BaseException:
        if pid:
            os.kill(pid, SIGKILL)
        if listener is not None:
            os.unlink(path)
        raise
    os.write(1, bootstrap.result(address))
    # What the interpreter would take down in order is nobody's any more.
    os._exit(0)


def serve_in_foreground(flags: Flags) -> int:
    from shim.server import serve

    listener = listen(flags.socket)
    return serve(flags, listener.detach(), flags.socket)


def become_server(flags: Flags, bundle: str, listener: socket, path: str) -> NoReturn:
    os.setsid()
    # Whoever called `start` through a wrapper waits for the end of what that one left open.
    os.closerange(3, listener.fileno())
    os.closerange(listener.fileno() + 1, FD_LIMIT)
    null = os.open("/dev/null", os.O_RDWR)
    log = open_log(bundle)
    # containerd reads `start`'s stdout and stderr to their end.
    for old, new in ((null, 0), (null, 1), (null if log is None else log, 2)):
        os.dup2(old, new)
    try:
        leave_out_modules()
        from shim.server import serve

        os._exit(serve(flags, listener.detach(), path))
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def open_log(bundle: str) -> int | None:
    """containerd's fifo for the shim's log; None without one.

    Writing never waits. We hold both ends: a containerd that restarts finds what is in it as it was.
    """
    path = f"{bundle}/log"
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            return os.open(path, os.O_RDWR | os.O_NONBLOCK)
    except FileNotFoundError:
        pass
    return None


def leave_out_modules() -> None:
    """Keep out what asyncio, protobuf and qemu.qmp import and we never use: TLS, OpenSSL's hashes, protobuf
    without its C part. 2 MB and 13 ms of CPU of every shim.
    """
    module = type(sys)
    for name in ("ssl", "_hashlib"):
        sys.modules[name] = None  # type: ignore[assignment] # an ImportError, which asyncio and hashlib expect
    sys.modules["google.protobuf.internal.python_message"] = module("python_message")
    import asyncio  # noqa: F401

    # qemu.qmp expects the name, for annotations.
    sys.modules["ssl"] = module("ssl")
    sys.modules["ssl"].SSLContext = object  # type: ignore[attr-defined]


def read_stdin() -> bytes:
    """All of it; nothing from a person's terminal."""
    if os.isatty(0):
        return b""
    pieces = []
    size = 0
    while piece := os.read(0, 65536):
        pieces.append(piece)
        size += len(piece)
        if size > _STDIN_LIMIT:
            raise StartError(f"more than {_STDIN_LIMIT >> 20} MiB on stdin")
    return b"".join(pieces)


def pod_of(bundle: str) -> str | None:
    """The id of the pod that the bundle's container joins; None when it is a pod of its own.

    Raises StartError for a config.json that is none.
    """
    path = f"{bundle}/config.json"
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from error
    if not any(key.encode() in text for _, _, key in _POD_KEYS):
        return None
    import json

    try:
        annotations = json.loads(text).get("annotations") or {}
        for type_key, container, sandbox_key in _POD_KEYS:
            if annotations.get(type_key) == container:
                sandbox_id = annotations.get(sandbox_key)
                if not sandbox_id or not isinstance(sandbox_id, str):
                    raise StartError(f"{path}: annotation {sandbox_key} is {sandbox_id!r}: expected an id")
                return sandbox_id
    except (ValueError, AttributeError) as error:
        raise StartError(f"{path}: {error}") from error
    return None


def socket_path(bootstrap: Bootstrap, namespace: str, sandbox_id: str) -> str:
    """containerd's rule: the SHA-256 of its own address, the namespace and the id that a pod shares."""
    try:
        from _sha2 import sha256  # type: ignore[import-not-found]
    except ImportError:  # before Python 3.12
        from _sha256 import sha256  # type: ignore[import-not-found]
    name = os.path.normpath("/".join(part for part in (bootstrap.address, namespace, sandbox_id) if part))
    return f"{bootstrap.socket_directory}/{sha256(name.encode()).hexdigest()}"


def answers(path: str) -> bool:
    """Whether a shim accepts connections there."""
    client = socket(AF_UNIX, SOCK_STREAM)
    client.settimeout(_CONNECT_TIMEOUT_S)
    try:
        client.connect(path)
    except OSError:
        return False
    finally:
        client.close()
    return True


def listen(path: str) -> socket:
    """A listening socket that only our user can connect to; what is there, and is dead, is replaced.

    Raises StartError.
    """
    if len(path.encode()) > SOCKET_PATH_LIMIT:
        raise StartError(f"{path}: longer than the {SOCKET_PATH_LIMIT} bytes of a socket's path")
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket(AF_UNIX, SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen()
    except OSError as error:
        raise StartError(f"{path}: {error.strerror}") from error
    finally:
        os.umask(umask)
    return listener


def write_file(name: str, text: str) -> None:
    """In the bundle; whole or not at all."""
    temporary = f".{name}"
    with open(temporary, "w") as file:
        file.write(text)
    os.rename(temporary, name)
