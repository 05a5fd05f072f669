"""A pod without containerd whose container can become root of its machine, for tests to drive."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness import TIMEOUT_S, new_id, wait_for
from templates import Pods
from test_sandbox import booting, sandbox_config, spec

from virtcontainers.config import GUEST_SHARED_DIR
from virtcontainers.container import Container, Process
from virtcontainers.sandbox import Sandbox, create_sandbox

T = TypeVar("T")

_ENDED = re.compile(r"\nstatus \d+\n\Z")

_CAPABILITIES = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT",
    "SYS_PTRACE", "SYS_ADMIN", "SYS_BOOT", "SYS_RESOURCE", "MKNOD", "SETFCAP",
)  # fmt: skip

_APPLETS = (
    "dd", "find", "kill", "ls", "md5sum", "mkdir", "mount", "rm", "seq", "sort", "stat", "sync", "wc",
    "xargs",
)  # fmt: skip


def bind(source: Path, destination: str, *options: str) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": "bind",
        "source": str(source),
        "options": ["rbind", *options],
    }


def privileged(*command: str, mounts: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """An OCI spec of a container that may do all in its machine."""
    given = spec(*command, mounts=list(mounts))
    names = [f"CAP_{name}" for name in _CAPABILITIES]
    given["process"]["capabilities"] = dict.fromkeys(("bounding", "effective", "permitted"), names)
    given["linux"]["resources"] = {"devices": [{"allow": True, "access": "rwm"}]}
    return given


class Pod:
    """`sandbox` and what comes from it belong to the loop of another thread, see `call`."""

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop) -> None:
        self.directory = directory
        self.id = new_id("pod")
        self._loop = loop
        self.sandbox: Sandbox

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(3 * TIMEOUT_S)

    @property
    def container(self) -> Container:
        return self.sandbox.containers[self.id]

    @property
    def upper(self) -> Path:
        """On the host, what the container has changed of its root."""
        return self.directory / self.id / "upper"

    @property
    def shared(self) -> Path:
        """On the host, what the guest has at GUEST_SHARED_DIR."""
        return self.sandbox.fs_share.shared_path

    @property
    def root_in_guest(self) -> str:
        return f"{GUEST_SHARED_DIR}{self.id}/rootfs"

    def volume(self, name: str) -> Path:
        """On the host, in the share, the volume that the container has at /NAME."""
        (found,) = self.shared.glob(f"{self.id}-*-{name}")
        return found

    def volume_in_guest(self, name: str) -> str:
        return GUEST_SHARED_DIR + self.volume(name).name

    def run(self, script: str) -> tuple[int, str]:
        """A line of sh in the container: its status, and what it wrote, stderr last."""
        return self.call(self._run(script))

    async def _run(self, script: str) -> tuple[int, str]:
        process = await self.container.enter(
            new_id("exec"), {**self.container.config.spec["process"], "args": ["/bin/sh", "-c", script]}
        )
        return await everything(process)

    def sh(self, script: str) -> str:
        """As `run`, of one that must succeed."""
        status, output = self.run(script)
        assert status == 0, output
        return output

    def as_guests_root(self, code: str) -> str:
        """Run Python as root of the machine, outside of any container; returns what it printed.

        It gets there as a privileged container does who wants to: by the kernel's core_pattern.
        """
        name = new_id("root")
        script = f"""exec >{self.root_in_guest}/{name}.out 2>&1
/usr/bin/python3.11 - <<'PYTHON'
import errno, os, sys
def error(call, *arguments, **more):
    try:
        return call(*arguments, **more)
    except OSError as found:
        return errno.errorcode[found.errno]
{code}
PYTHON
printf '\nstatus %d\n' $?
cat >/dev/null
"""
        self.sh(
            f"echo {shlex.quote(script)} >/{name}; "
            f"echo '|/proc/%P/root/bin/busybox sh /proc/%P/root/{name}' >/proc/sys/kernel/core_pattern; "
            "sh -c 'kill -SEGV $$'; true"
        )
        output = wait_for(
            "the guest's root",
            # There may be no such file yet, or a part of it.
            lambda: found if _ENDED.search(found := self.run(f"cat /{name}.out")[1]) else None,
        )
        output, _, status = output.rpartition("\nstatus ")
        assert int(status) == 0, output
        return output


async def everything(process: Process) -> tuple[int, str]:
    async def read(piece: Callable[[int], Coroutine[Any, Any, bytes]]) -> bytes:
        data = b""
        while more := await piece(65536):
            data += more
        return data

    out, err, status = await asyncio.gather(
        read(process.read_stdout), read(process.read_stderr), process.wait()
    )
    return status, (out + err).decode(errors="replace")


@contextlib.contextmanager
def root_pod(
    directory: Path,
    guest_image: Path,
    mounts: Sequence[dict[str, Any]] = (),
    *,
    fill: Callable[[Path], None] = lambda root: None,
    factory: Pods = booting,
    **hypervisor: Any,
) -> Iterator[Pod]:
    """`fill` makes more of the container's root."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    pod = Pod(directory, loop)
    try:
        given = privileged("sleep", "100000", mounts=mounts)
        config = sandbox_config(directory, guest_image, pod.id, given, **hypervisor)
        lower = directory / pod.id / "lower"
        for name in _APPLETS:
            with contextlib.suppress(FileExistsError):
                (lower / "bin" / name).symlink_to("busybox")
        fill(lower)
        pod.sandbox = pod.call(create_sandbox(config, factory(config)))
        try:
            pod.call(pod.container.start())
            yield pod
        finally:
            pod.call(pod.sandbox.delete())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
