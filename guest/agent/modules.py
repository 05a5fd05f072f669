"""Kernel modules, without kmod: the boot list in load order, others by name with what they depend on."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterable

from guest.agent import linux

log = logging.getLogger(__name__)

BOOT_LIST = "/etc/kata-py/modules"


def load_boot_modules(path: str = BOOT_LIST) -> None:
    """Load the files the image lists, one path a line; what fails is logged, the machine may do without."""
    try:
        with open(path) as file:
            paths = [line for line in (raw.strip() for raw in file) if line and not line.startswith("#")]
    except FileNotFoundError:
        return
    for module in paths:
        try:
            linux.finit_module(module)
        except OSError as error:
            if error.errno != errno.EEXIST:
                log.warning("module %s: %s", module, error.strerror)


def load_module(name: str, parameters: Iterable[str] = ()) -> None:
    """Raises FileNotFoundError for a module the image does not have, OSError when the kernel refuses it."""
    directory = f"/lib/modules/{os.uname().release}"
    wanted = name.replace("-", "_")
    if _is_live(wanted):
        return
    found = find_module(directory, wanted)
    if found is None:
        if _is_builtin(directory, wanted):
            return
        raise FileNotFoundError(errno.ENOENT, f"no kernel module {name} in the guest image", directory)
    *dependencies, path = found
    for dependency in dependencies:
        _load(f"{directory}/{dependency}")
    _load(f"{directory}/{path}", " ".join(parameters))


def _is_live(name: str) -> bool:
    """Loaded, and not just being loaded; what is built in has no state."""
    try:
        with open(f"/sys/module/{name}/initstate") as file:
            return file.read().strip() == "live"
    except FileNotFoundError:
        return os.path.exists(f"/sys/module/{name}")


def _load(path: str, parameters: str = "") -> None:
    with contextlib.suppress(FileExistsError):
        linux.finit_module(path, parameters)


def _stem(path: str) -> str:
    return os.path.basename(path).partition(".ko")[0].replace("-", "_")


def find_module(directory: str, name: str) -> list[str] | None:
    """Files of modules.dep to load for `name`, in order, the module itself last."""
    with open(f"{directory}/modules.dep") as file:
        for line in file:
            path, _, dependencies = line.partition(":")
            if _stem(path) == name:
                return [*reversed(dependencies.split()), path]
    return None


def _is_builtin(directory: str, name: str) -> bool:
    try:
        with open(f"{directory}/modules.builtin") as file:
            return any(_stem(line.strip()) == name for line in file)
    except FileNotFoundError:
        return False
