"""The process that serves a pod, from its first container to its last."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from pathlib import Path

from katautils import log as katautils_log
from shim.events import Publisher, forwarder
from shim.main import Flags
from shim.pod import Pod
from shim.service import TaskService, map_error
from ttrpc import Server

log = logging.getLogger(__name__)

_GRACE_S = 1.0
_EVENTS_S = 20.0

# <linux/prctl.h>, <linux/sched.h>
_PR_SCHED_CORE = 62
_PR_SCHED_CORE_CREATE = 1
_PR_SCHED_CORE_SCOPE_PROCESS_GROUP = 2


def serve(flags: Flags, listener_fd: int, path: str) -> int:
    """Serve on a listening socket, bound to `path`, until containerd says Shutdown or a signal does.

    The log goes to stderr. The socket's path is removed.
    """
    adjust_oom_score()
    if os.environ.get("SCHED_CORE"):
        share_core()
    katautils_log.setup(2, debug=flags.debug, sandbox=flags.id)
    # The bundle belongs to one container, we to all of them.
    os.chdir("/")
    # What is imported stays: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    try:
        asyncio.run(_serve(flags, socket.socket(fileno=listener_fd), path))
    except BaseException:
        log.exception("the shim dies")
        return 1
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()
    return 0


async def _serve(flags: Flags, listener: socket.socket, path: str) -> None:
    stopped = asyncio.Event()

    def shut_down() -> None:
        # Before containerd has its answer: it may then start another shim of this name.
        with contextlib.suppress(FileNotFoundError):
            Path(path).unlink()
        stopped.set()

    def on_signal(number: signal.Signals) -> None:
        log.warning("%s: the pod ends", number.name)
        stopped.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    forward = forwarder(os.environ.get("TTRPC_ADDRESS", ""), flags.publish_binary, flags.address)
    publisher = Publisher(flags.namespace, forward)
    pod = Pod(flags.namespace, publisher)
    server = Server(map_error=map_error)
    TaskService(pod, shut_down).register(server)
    serving = asyncio.create_task(server.serve(listener))
    log.info("serving %s in namespace %s", flags.id, flags.namespace)
    await stopped.wait()
    # The connections are the last to go: containerd calls `delete` when they do.
    await pod.close()
    await publisher.close(_EVENTS_S)
    await server.shutdown(_GRACE_S)
    await serving


def adjust_oom_score() -> None:
    """One above containerd's, which is inherited: the shim goes before it."""
    with contextlib.suppress(OSError), Path("/proc/self/oom_score_adj").open("r+") as file:
        score = int(file.read())
        file.seek(0)
        file.write(str(min(score + 1, 1000)))


def share_core() -> None:
    """containerd's `sched_core`: our processes share a core with nobody else's."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, 0, _PR_SCHED_CORE_SCOPE_PROCESS_GROUP, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SCHED_CORE)")
