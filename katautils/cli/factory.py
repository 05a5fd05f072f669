"""`kata-py factory init` and `destroy`: machines made before a pod asks for one, and removed."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING

from katautils.cli.output import Progress, local_time, mib
from katautils.config import RuntimeConfig, load_configuration
from virtcontainers.errors import FailedPreconditionError, KataError, UnimplementedError
from virtcontainers.vm import VMConfig

if TYPE_CHECKING:
    from virtcontainers.factory.template import Template


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

    def emit(self, record: logging.LogRecord) -> None:
        self._progress.say(f"kata-py: {record.levelname.lower()}: {record.getMessage()}")


async def _init(config: RuntimeConfig, *, force: bool) -> None:
    with Progress() as progress:
        logging.getLogger().addHandler(_Say(progress))
        for warning in config.warnings:
            progress.say(f"kata-py: warning: {warning}")
        if config.factory.enable_template:
            await _init_template(config, progress, force=force)
        if config.factory.vm_cache_number:
            await _serve_cache(config, progress)


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
    # First the server: it could ask the template for one machine more.
    await _destroy_cache(config)
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


async def _serve_cache(config: RuntimeConfig, progress: Progress) -> None:
    raise UnimplementedError("vm_cache_number in [factory]: there is no VM cache yet")


async def _destroy_cache(config: RuntimeConfig) -> None:
    return
