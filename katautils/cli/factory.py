"""`kata-py factory init` and `destroy`: machines made before a pod asks for one, and removed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from katautils.cli.output import Progress, local_time, mib
from katautils.config import RuntimeConfig, load_configuration
from virtcontainers.errors import FailedPreconditionError, KataError
from virtcontainers.vm import VMConfig

if TYPE_CHECKING:
    from virtcontainers.factory.base import FactoryBase
    from virtcontainers.factory.template import Template


_QUIT_TIMEOUT_S = 60.0
"""For ending all machines of a cache."""


def machines(number: int) -> str:
    return "1 machine" if number == 1 else f"{number} machines"


def vm_config(config: RuntimeConfig) -> VMConfig:
    """The machine that a template or a cache is for."""
    return VMConfig(hypervisor=config.hypervisor, agent=config.agent)


def init(config_path: Path | None, *, force: bool) -> int:
    """Make the template, or be the cache's server until a signal or Quit. Raises KataError."""
    config = load_configuration(config_path)
    if not config.factory.enable_template and not config.factory.vm_cache_number:
        raise FailedPreconditionError(
            f"{config.path}: [factory]: found neither enable_template nor vm_cache_number, expected "
            "enable_template = true, or vm_cache_number above 0: there is nothing to make"
        )
    _require_root("factory init")
    return _run(_init(config, force=force))


def destroy(config_path: Path | None) -> int:
    """Remove the template, and end the cache's server and what one has left. Raises KataError."""
    config = load_configuration(config_path)
    _require_root("factory destroy")
    return _run(_destroy(config))


def _require_root(command: str) -> None:
    if os.geteuid() != 0:
        raise FailedPreconditionError(f"{command}: found user {os.geteuid()}, expected root: use sudo")


def _run(command: Coroutine[None, None, None]) -> int:
    """As asyncio.run, and SIGTERM leaves as little behind as SIGINT does."""

    async def run() -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        await command

    try:
        asyncio.run(run())
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    return 0


class _Say(logging.Handler):
    """What the library warns of, as lines that leave the progress alone."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        line = f"kata-py: {record.levelname.lower()}: {record.getMessage()}"
        if line != self._last:  # each machine warns of the same
            self._progress.say(line)
        self._last = line


async def _init(config: RuntimeConfig, *, force: bool) -> None:
    from virtcontainers.factory.direct import Direct

    with Progress() as progress:
        logging.getLogger().addHandler(_Say(progress))
        for warning in config.warnings:
            progress.say(f"kata-py: warning: {warning}")
        base: FactoryBase = Direct(vm_config(config))
        if config.factory.enable_template:
            base = await _init_template(config, progress, force=force)
        if config.factory.vm_cache_number:
            await _serve_cache(config, base, progress)


async def _init_template(config: RuntimeConfig, progress: Progress, *, force: bool) -> Template:
    from virtcontainers.factory.template import Template, TemplateMissing

    path, vm = config.factory.template_path, vm_config(config)
    if not force:
        try:
            template = Template.fetch(path, vm)
        except TemplateMissing:
            pass
        except KataError as error:
            progress.say(f"kata-py: {error}")
        else:
            made = local_time(template.info.created)
            size = mib(template.info.memory_allocated_bytes)
            progress.close(
                f"The template in {path} fits already: made {made}, {size}; --force makes it anew."
            )
            return template
    template = await Template.new(path, vm, force=force, retry=True, on_progress=progress.step)
    info = template.info
    size = f"{mib(info.memory_allocated_bytes)} of {mib(info.memory_bytes)}"
    progress.close(
        f"The template is in {path}, after {progress.elapsed_s:.1f} s: {size}; "
        f"{mib(info.given_back_bytes)} were given back, {mib(info.zero_bytes)} were zeros."
    )
    return template


async def _destroy(config: RuntimeConfig) -> None:
    logging.getLogger().addHandler(_Say(Progress()))
    failure: KataError | None = None
    # First the server: it could clone one machine more.
    for part in (_destroy_cache, _destroy_template):
        try:
            await part(config)
        except KataError as error:
            if failure is not None:
                print(f"kata-py: {failure}", file=sys.stderr)
            failure = error
    if failure is not None:
        raise failure


async def _destroy_template(config: RuntimeConfig) -> None:
    from virtcontainers.factory import template
    from virtcontainers.factory.clones import CloneMemory, find_clones

    path = config.factory.template_path
    if not await template.destroy(path):
        print(f"There was no template in {path}.")
        return
    print(f"The template in {path} is removed.")
    clones = [clone for clone in find_clones(path) if clone.memory is not CloneMemory.COPY]
    if clones:
        running = "1 is" if len(clones) == 1 else f"{len(clones)} are"
        print(f"Its memory stays until its last clone ends: {running} running.")


async def _serve_cache(config: RuntimeConfig, base: FactoryBase, progress: Progress) -> None:
    """Until SIGTERM, SIGINT or Quit. Raises KataError when it cannot listen."""
    from virtcontainers.factory.cache import CacheServer

    endpoint, number = config.factory.vm_cache_endpoint, config.factory.vm_cache_number
    filled = False

    def on_ready(ready: int) -> None:
        nonlocal filled
        if filled:
            return
        filled = ready >= number
        if filled:
            progress.close(
                f"The VM cache is at {endpoint}, after {progress.elapsed_s:.1f} s: {machines(number)} ready. "
                "SIGTERM, Ctrl-C or `kata-py factory destroy` ends it."
            )
        else:
            progress.step(f"making machine {ready + 1} of {number}")

    server = CacheServer(endpoint, number, base, vm_config(config), on_ready=on_ready)
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signal_number, server.stop)
    progress.step(f"making machine 1 of {number}")
    await server.run()
    progress.close("The VM cache has ended.")


async def _destroy_cache(config: RuntimeConfig) -> None:
    from virtcontainers.factory.cache import end_orphans
    from virtcontainers.factory.grpccache import quit_cache

    endpoint = config.factory.vm_cache_endpoint
    if await quit_cache(endpoint, _QUIT_TIMEOUT_S):
        print(f"The VM cache at {endpoint} has ended.")
    else:
        print(f"There was no VM cache at {endpoint}.")
    if orphans := await end_orphans():
        print(f"{machines(orphans)} of a cache that was killed, ended.")
