"""The agent's entry point.

As PID 1, `main()` boots the machine and serves for ever; the kernel's command line says how:

    agent.transport=serial|vsock    where the host is listened for; both when it says nothing
    agent.log=LEVEL                 of the log on the console, "info" if not given

Elsewhere, `python -m guest.agent.main --listen unix:PATH` serves on a unix socket, with everything else real:
it needs root, cgroup v2 at /sys/fs/cgroup, and mount, UTS, IPC and PID namespaces of its own. Never without:
CreateSandbox sets the hostname, and writes to /etc/resolv.conf, which has to be a mount of its own.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

AGENT_PORT = 1024
SERIAL_PORT = "agent.channel.0"

_VMADDR_CID_ANY = 0xFFFFFFFF
_DEVICE_POLL_S = 0.05
_LISTEN_TIMEOUT_S = 30.0


def _set_up_imports() -> None:
    """Leave out what nothing here uses; together it is a third of the time until we listen."""
    # asyncio does without TLS.
    sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]
    # protobuf imports its implementation in Python beside the one in C that it then uses.
    try:
        import google._upb._message  # noqa: F401
    except ImportError:
        return
    sys.modules.setdefault("google.protobuf.internal.python_message", type(sys)("python_message"))


def _set_up_logging(level: str) -> None:
    import logging

    class Logfmt(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            extra = "".join(
                f" {k}={record.__dict__[k]}" for k in ("sandbox", "container") if k in record.__dict__
            )
            message = record.getMessage().replace("\n", "\\n")
            line = f"agent: {time.monotonic():.3f} {record.levelname.lower()} {record.name}: {message}{extra}"
            return line + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Logfmt())
    logging.root.addHandler(handler)
    levels = {"trace": 10, "debug": 10, "info": 20, "warn": 30, "warning": 30, "error": 40, "critical": 50}
    logging.root.setLevel(levels.get(level, 20))
    logging.raiseExceptions = False


def _find_serial_port() -> str | None:
    # The names in /dev/virtio-ports are udev's, which is not here.
    directory = "/sys/class/virtio-ports"
    try:
        for port in os.listdir(directory):
            with open(f"{directory}/{port}/name") as file:
                if file.read().strip() == SERIAL_PORT:
                    return f"/dev/{port}"
    except OSError:
        pass
    return None


async def serve(listen: str, *, is_init: bool) -> None:
    """Serve for ever. `listen` is "serial", "vsock", "unix:PATH", or "" for what the machine has."""
    import asyncio
    import logging
    import socket

    from agent_client.protocols import agent_pb2, health_pb2, port_forward_pb2
    from guest.agent.reaper import Reaper
    from guest.agent.rpc import AgentService, HealthService, PortForwardService, map_error
    from guest.agent.sandbox import Sandbox
    from ttrpc import Server
    from ttrpc.framing import READ_LIMIT

    log = logging.getLogger(__name__)
    reaper = Reaper()
    reaper.start()
    server = Server(map_error=map_error)
    sandbox = Sandbox(reaper)
    service = AgentService(sandbox, is_init=is_init)
    server.register(agent_pb2.DESCRIPTOR.services_by_name["AgentService"], service)
    server.register(health_pb2.DESCRIPTOR.services_by_name["Health"], HealthService())
    server.register(port_forward_pb2.DESCRIPTOR.services_by_name["PortForward"], PortForwardService())

    had_host = False

    async def serve_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal had_host
        # A host that is not answered in time begins anew: it has not gone.
        if await server.serve_connection(reader, writer) and not had_host:
            had_host = True
            from guest.agent.warm import warm_up

            warm_up(sandbox, is_init=is_init)

    async def serve_socket(family: int, address: str | tuple[int, int]) -> None:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.bind(address)
        # Not Server.serve: asyncio's servers of unix sockets refuse vsock's.
        listening = await asyncio.start_server(serve_connection, sock=sock, limit=READ_LIMIT)
        log.info("listening on %s", address)
        await listening.serve_forever()

    async def serve_serial() -> None:
        from ttrpc.chardev import ChardevListener

        deadline = time.monotonic() + _LISTEN_TIMEOUT_S
        while (path := _find_serial_port()) is None or not os.path.exists(path):
            if time.monotonic() > deadline:
                raise FileNotFoundError(f"no virtio port {SERIAL_PORT}")
            await asyncio.sleep(_DEVICE_POLL_S)
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        serial = ChardevListener(fd)
        log.info("listening on %s (%s)", path, SERIAL_PORT)
        while True:
            reader, writer = await serial.accept()
            try:
                await serve_connection(reader, writer)
            except Exception:
                log.exception("connection on %s", path)

    async def guarded(name: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OSError as error:
            log.warning("%s: %s", name, error)

    async def load_drivers() -> None:
        from guest.agent.uevent import DriverLoader

        await asyncio.sleep(0)
        await DriverLoader(reaper).run()

    if listen.startswith("unix:"):
        await serve_socket(socket.AF_UNIX, listen.removeprefix("unix:"))
        return
    tasks = []
    if listen in ("", "vsock"):
        vsock = serve_socket(socket.AF_VSOCK, (_VMADDR_CID_ANY, AGENT_PORT))
        tasks.append(guarded("vsock", vsock))
    if listen in ("", "serial"):
        tasks.append(guarded("serial", serve_serial()))
    listeners = asyncio.gather(*tasks)
    # After the listeners: nobody waits for these.
    drivers = asyncio.ensure_future(guarded("drivers", load_drivers()))
    await listeners
    log.error("no transport left: the host cannot reach this machine")
    await drivers


def _run_as_init() -> None:
    import signal

    os.environ["PATH"] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    # A signal must not become an exception in the only process that may not end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    from guest.agent.boot import boot, kernel_command_line

    _set_up_logging("info")
    boot()
    options = kernel_command_line()
    import asyncio
    import logging

    logging.root.setLevel("DEBUG" if options.get("agent.log") in ("debug", "trace") else "INFO")
    asyncio.run(serve(options.get("agent.transport", ""), is_init=True))


def main() -> None:
    _set_up_imports()
    arguments = sys.argv[1:]
    if "--listen" in arguments:
        from guest.agent import linux

        _set_up_logging("debug" if "--debug" in arguments else "info")
        linux.set_child_subreaper()
        import asyncio

        asyncio.run(serve(arguments[arguments.index("--listen") + 1], is_init=False))
        return
    if os.getpid() != 1:
        sys.exit(f"usage: python -m guest.agent.main --listen unix:PATH [--debug]\n{__doc__}")
    try:
        _run_as_init()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        # The kernel would panic when we returned; so the host sees a machine that has ended, and why.
        from guest.agent import linux

        linux.power_off()


if __name__ == "__main__":
    main()
