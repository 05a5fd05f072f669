"""One machine, made by the library in this fresh process as the shim makes it: when does its agent answer?

`bench_agent.py time ID`: reads KATA_CONF_FILE, prints JSON: seconds from the decision to make the machine to
the agent's first answer, and until it is fit for a container (a clone has new randomness and the time then).
The machine is gone when it ends. What the shim has imported by then is imported before the clock starts.

`bench_agent.py hotplug ID`: the same machine gets a vCPU and a DIMM. Prints JSON: seconds from the request to
QEMU's last answer, and until the guest uses all of both.

`bench_agent.py plan ID DIRECTORY`: prints what hack/bench_floor.py needs to do the same without the library,
from the template that there is.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import shim.service  # noqa: F401 - the shim's imports
from agent_client.protocols import health_pb2
from katautils.config import RuntimeConfig, load_configuration
from katautils.factory import handle_factory
from ttrpc import framing
from ttrpc.chardev import escape
from ttrpc.request_pb2 import Request
from virtcontainers.config import SharedFS
from virtcontainers.fs_share import FilesystemShare
from virtcontainers.hypervisor.base import Persisted
from virtcontainers.vm import VM, VMConfig

Times = dict[str, float]


def vm_config(config: RuntimeConfig) -> VMConfig:
    return VMConfig(hypervisor=config.hypervisor, agent=config.agent)


async def timed(machine_id: str, measure: Callable[[VM], Awaitable[Times]] | None = None) -> Times:
    """Of its start, or what `measure` finds."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    config = load_configuration(None)
    share = FilesystemShare(machine_id)
    answered: list[float] = []
    connect = VM.connect

    async def connected(self: VM, timeout_s: float) -> None:
        await connect(self, timeout_s)
        answered.append(time.monotonic())

    VM.connect = connected  # type: ignore[method-assign]
    shared: list[str] = []

    def on_planned(persisted: Persisted, share_of: str | None = None) -> None:
        if share_of is not None:
            share.take_over(share_of)
        elif not shared:
            share.prepare()
        shared.append(machine_id)

    gc.collect()
    gc.freeze()
    began = time.monotonic()
    try:
        factory = await handle_factory(config)
        vm = await factory.get_vm(
            machine_id, vm_config(config), shared_path=share.shared_path, on_planned=on_planned
        )
        ready = time.monotonic()
        try:
            measured = await measure(vm) if measure else None
        finally:
            await vm.stop()
    finally:
        share.cleanup()
    if measured:
        return measured
    # A cache that hands over the connection with the machine has no first answer for us: the next counts.
    return {"answer": (answered[0] if answered else ready) - began, "ready": ready - began}


async def hotplug(vm: VM) -> Times:
    began = time.monotonic()
    if not await vm.add_cpus(1):
        raise SystemExit("no vCPU could be plugged")
    await vm.add_memory(512)
    plugged = time.monotonic()
    await vm.online_cpu_memory()
    return {"plugged": plugged - began, "online": time.monotonic() - began}


def plan(machine_id: str, directory: Path) -> dict[str, Any]:
    from dataclasses import replace

    from virtcontainers.factory.fingerprint import template_hypervisor
    from virtcontainers.factory.template import Template

    config = load_configuration(None)
    assert config.hypervisor.shared_fs is SharedFS.VIRTIO_9P
    template = Template.fetch(config.factory.template_path, vm_config(config))
    hypervisor = replace(
        template_hypervisor(config.hypervisor, template.info.directory),
        boot_to_be_template=False,
        boot_from_template=True,
    )
    shared = directory / "shared"
    shared.mkdir()
    vm = VM.new(machine_id, VMConfig(hypervisor, config.agent), shared_path=shared, run_vc=directory)
    vm.hypervisor.directory.mkdir(parents=True)
    # Numbers that str.format puts in their places: no other brace may be in the command line.
    fds: Any = {"qmp": "{qmp}", "agent": "{agent}"}
    argv = vm.hypervisor.command_line.argv(fds)
    method = health_pb2.DESCRIPTOR.services_by_name["Health"].methods_by_name["Check"]
    envelope = Request(
        service=method.containing_service.full_name,
        method=method.name,
        payload=health_pb2.CheckRequest().SerializeToString(),
    )
    request = framing.encode(1, framing.REQUEST, 0, envelope.SerializeToString())
    return {
        "argv": argv,
        "directory": str(vm.hypervisor.directory),
        "state": str(template.info.state),
        "environment": {"PATH": os.defpath},
        "hail": (b"\x7e" + os.urandom(16).hex().encode() + b"\n").hex(),
        "request": escape(request).hex(),
        # Of an answer to stream 1; all of the response that does not depend on the agent.
        "response": b"\x00\x00\x00\x01\x02".hex(),
    }


def main() -> None:
    match sys.argv[1:]:
        case ["time", machine_id]:
            result: dict[str, Any] = asyncio.run(timed(machine_id))
        case ["hotplug", machine_id]:
            result = asyncio.run(timed(machine_id, hotplug))
        case ["plan", machine_id, directory]:
            result = plan(machine_id, Path(directory))
        case _:
            raise SystemExit(__doc__)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
