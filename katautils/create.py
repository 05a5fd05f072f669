"""From an OCI bundle to a sandbox and its containers, after Kata's katautils/create.go."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path

import virtcontainers.sandbox
from katautils import log as katautils_log
from katautils import oci
from katautils.config import load_configuration
from katautils.factory import handle_factory
from katautils.hooks import run_hooks
from virtcontainers.config import ContainerConfig, ContainerType, Mount, OCISpec
from virtcontainers.container import Container
from virtcontainers.errors import FailedPreconditionError, InvalidArgumentError, KataError
from virtcontainers.sandbox import Sandbox

log = logging.getLogger(__name__)


async def create_sandbox(
    bundle: Path,
    container_id: str,
    rootfs: Sequence[Mount],
    runtime_config_path: Path | None,
    *,
    terminal: bool,
) -> Sandbox:
    """Make the pod of a bundle: machine, sandbox, and its first container, not started.

    `runtime_config_path` is containerd's ConfigPath; None: KATA_CONF_FILE, then the usual places. `terminal`
    is what containerd was asked for. Raises KataError's classes, and then nothing of the pod is left.
    """
    spec = oci.load_spec(bundle)
    sandbox_id = oci.sandbox_id(spec, container_id)
    if sandbox_id != container_id:
        raise FailedPreconditionError(
            f"container {container_id} belongs to sandbox {sandbox_id}, which has not been created"
        )
    config = load_configuration(runtime_config_path, spec.get("annotations"))
    if config.enable_debug:
        katautils_log.set_debug(True)
    for warning in config.warnings:
        log.warning("%s", warning, extra={"sandbox": sandbox_id})
    _check_terminal(spec, container_id, terminal)
    sandbox_config = oci.sandbox_config(spec, config, bundle, container_id, rootfs)
    factory = await handle_factory(config)
    have_hooks_begun = False

    async def prestart(sandbox: Sandbox) -> None:
        nonlocal have_hooks_begun
        have_hooks_begun = True
        await _create_hooks(sandbox, sandbox_config.container)

    try:
        return await virtcontainers.sandbox.create_sandbox(sandbox_config, factory, prestart=prestart)
    except BaseException:
        if have_hooks_begun:
            await asyncio.shield(_post_stop_hooks(sandbox_config.container))
        raise


async def create_container(
    sandbox: Sandbox, bundle: Path, container_id: str, rootfs: Sequence[Mount], *, terminal: bool
) -> Container:
    """Make one more container of a pod, not started.

    Raises KataError's classes, and then nothing of the container is left.
    """
    spec = oci.load_spec(bundle)
    if oci.container_type(spec) is not ContainerType.POD_CONTAINER:
        raise InvalidArgumentError(
            f"container {container_id}: found a sandbox of its own, expected a container of {sandbox.id}"
        )
    if (wanted := oci.sandbox_id(spec, container_id)) != sandbox.id:
        raise InvalidArgumentError(f"container {container_id}: found sandbox {wanted}, expected {sandbox.id}")
    _check_terminal(spec, container_id, terminal)
    config = oci.container_config(spec, bundle, container_id, rootfs)
    container = await sandbox.create_container(config)
    try:
        await _create_hooks(sandbox, config)
    except BaseException:
        await asyncio.shield(_give_up(container))
        raise
    return container


async def _give_up(container: Container) -> None:
    try:
        await container.delete()
    except KataError as error:
        # Why it is given up is what the caller is told.
        log.error("of container %s, which was given up, something stays: %s", container.id, error)
    await post_stop_hooks(container)


async def start_container(container: Container) -> None:
    """Start it and run its poststart hooks, whose failures are warnings. Raises as `Container.start`."""
    await container.start()
    await _hooks("poststart", container.sandbox, container.config)


async def post_stop_hooks(container: Container) -> None:
    """For a container that has been deleted. Raises nothing: failures are warnings."""
    await _post_stop_hooks(container.config)


async def _create_hooks(sandbox: Sandbox, config: ContainerConfig) -> None:
    for stage in ("prestart", "createRuntime"):
        await _hooks(stage, sandbox, config)


async def _hooks(stage: str, sandbox: Sandbox, config: ContainerConfig) -> None:
    pid = sandbox.hypervisor_pid
    hooks = run_hooks(stage, config.spec, container_id=config.id, bundle=config.bundle, pid=pid)
    await sandbox.while_alive(hooks)


async def _post_stop_hooks(config: ContainerConfig) -> None:
    # Also of a creation that ends after other hooks have run: runtime-spec, runtime.md#lifecycle.
    await run_hooks("poststop", config.spec, container_id=config.id, bundle=config.bundle, pid=0)


def _check_terminal(spec: OCISpec, container_id: str, terminal: bool) -> None:
    found = bool(spec["process"].get("terminal"))
    if found is not terminal:
        log.warning(
            "process.terminal is %s in the spec and %s in the request: the spec's counts",
            str(found).lower(),
            str(terminal).lower(),
            extra={"container": container_id},
        )
