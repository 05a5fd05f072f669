"""`io.katacontainers.*` annotations of a pod, over the configuration's settings.

Whoever may create a pod may write annotations: one of the hypervisor's counts only when `enable_annotations`
has an expression that matches its name, and a path only when the matching `valid_*` list allows it.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, NoReturn

from katautils.config.files import ParsedConfig, Setting, check_value
from katautils.config.schema import AGENT, HYPERVISOR, RUNTIME, Key, Table, Value
from katautils.config.warn import nearest
from virtcontainers.errors import InvalidArgumentError

PREFIX = "io.katacontainers."
CONFIG_PREFIX = PREFIX + "config."
HYPERVISOR_PREFIX = CONFIG_PREFIX + "hypervisor."
RUNTIME_PREFIX = CONFIG_PREFIX + "runtime."
AGENT_PREFIX = CONFIG_PREFIX + "agent."

VCPUS_PINNING = PREFIX + "enable_vcpus_pinning"
ASSET_HASH_TYPE = PREFIX + "asset_hash_type"

_HASHED = {
    "kernel_hash": "kernel",
    "image_hash": "image",
    "initrd_hash": "initrd",
    "hypervisor_hash": "path",
    "path_hash": "path",  # runtime-rs
    "firmware_hash": "firmware",
    "firmware_volume_hash": "firmware_volume",
    "jailer_hash": "jailer_path",
}
"""Annotation -> the annotation whose file must have that SHA-512."""

_OTHERS = (
    PREFIX + "pkg.oci.bundle_path",
    PREFIX + "pkg.oci.container_type",
    PREFIX + "container.resource.swappiness",
    PREFIX + "container.resource.swap_in_bytes",
    ASSET_HASH_TYPE,
    HYPERVISOR_PREFIX + "asset_hash_type",
)
"""Kata's, and no configuration."""


def apply_annotations(parsed: ParsedConfig, annotations: Mapping[str, str]) -> str:
    """Put the annotations' values over those of `parsed`; return the one warning about annotations that have
    no effect, or "".

    Raises InvalidArgumentError naming the annotation.
    """
    ours = {name: text for name, text in annotations.items() if name.startswith(PREFIX)}
    if not ours:
        return ""
    ignored: list[str] = []
    for name, text in ours.items():
        if name.startswith(HYPERVISOR_PREFIX):
            _require_enabled(parsed, name)
        table, key_name, key = _find(name)
        if key is None:
            if not _is_known_otherwise(name):
                match = nearest(name, _all_names())
                ignored.append(f"unknown {name}" + (f" (nearest: {match})" if match else ""))
            continue
        value = _value(parsed, name, text, key)
        _check_bounds(name, key_name, value)
        settings = parsed.tables[table]
        if key_name == "kernel_params":
            value = _replace_params(settings, value)
        elif key_name == "virtio_fs_extra_args" and key_name in settings:
            value = settings[key_name].value + value
        elif key_name in ("initrd", "image") and value:
            # The pod's guest replaces the configured one, whatever its kind was.
            if not all(ours.get(HYPERVISOR_PREFIX + kind) for kind in ("initrd", "image")):
                settings.pop("image" if key_name == "initrd" else "initrd", None)
        elif key_name in ("hot_plug_vfio", "cold_plug_vfio"):
            settings.pop("cold_plug_vfio" if key_name == "hot_plug_vfio" else "hot_plug_vfio", None)
        settings[key_name] = Setting(value, f"annotation {name}")
        if not key.is_implemented and not key.is_idle(value):
            ignored.append(f"{name} is not implemented")
    _check_hashes(ours)
    return f"annotations without effect: {', '.join(ignored)}" if ignored else ""


def _require_enabled(parsed: ParsedConfig, name: str) -> None:
    import re

    setting = parsed.tables["hypervisor.qemu"].get("enable_annotations")
    expressions: tuple[str, ...] = setting.value if setting else ()
    base = name.removeprefix(HYPERVISOR_PREFIX)
    for expression in expressions:
        try:
            if re.search(expression, base):
                return
        except re.error as error:
            assert setting
            raise InvalidArgumentError(
                f'{setting.where}: found "{expression}", expected regular expressions: {error}'
            ) from None
    where = setting.where if setting else f"{parsed.path}: [hypervisor.qemu] enable_annotations"
    raise InvalidArgumentError(
        f'annotation {name} is not enabled: found no expression that matches "{base}" in {where}'
    )


def _find(name: str) -> tuple[str, str, Key | None]:
    """The annotation's table, key name and key."""
    if name == VCPUS_PINNING:
        return "runtime", "enable_vcpus_pinning", RUNTIME["enable_vcpus_pinning"]
    for prefix, table, schema in _prefixes():
        if name.startswith(prefix):
            base = name.removeprefix(prefix)
            for key_name, key in schema.items():
                if base == key.annotation:
                    return table, key_name, key
    return "", "", None


def _prefixes() -> tuple[tuple[str, str, Table], ...]:
    return (
        (HYPERVISOR_PREFIX, "hypervisor.qemu", HYPERVISOR),
        (RUNTIME_PREFIX, "runtime", RUNTIME),
        (AGENT_PREFIX, "agent.kata", AGENT),
    )


def _is_known_otherwise(name: str) -> bool:
    return name in _OTHERS or name.removeprefix(HYPERVISOR_PREFIX) in _HASHED


def _all_names() -> list[str]:
    names = [prefix + key.annotation for prefix, _, t in _prefixes() for key in t.values() if key.annotation]
    return [*names, *_OTHERS, VCPUS_PINNING, *(HYPERVISOR_PREFIX + base for base in _HASHED)]


def _refuse(name: str, found: str, expected: str) -> NoReturn:
    raise InvalidArgumentError(f'annotation {name}: found "{found}", expected {expected}')


def _value(parsed: ParsedConfig, name: str, text: str, key: Key) -> Value:
    if name == AGENT_PREFIX + "policy":
        try:
            return base64.b64decode(text, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            _refuse(name, text[:40], "UTF-8 text in base64")
    try:
        value: Any = key.kind.from_text(text)
    except ValueError:
        _refuse(name, text, key.kind.expected)
    value = check_value(key.kind, value, f"annotation {name}")
    if key.allowed_by and value:
        _require_allowed(parsed, name, value, key.allowed_by)
    return value


def _require_allowed(parsed: ParsedConfig, name: str, path: str, list_key: str) -> None:
    setting = parsed.tables["hypervisor.qemu"].get(list_key)
    patterns: tuple[str, ...] = setting.value if setting else ()
    if ".." not in PurePath(path).parts and any(_matches(path, pattern) for pattern in patterns):
        if os.path.lexists(path):
            return
        _refuse(name, path, "a path that exists")
    where = setting.where if setting else f"{list_key} of {parsed.path}, which is not set"
    _refuse(name, path, f"a path that {where} allows")


def _matches(path: str, pattern: str) -> bool:
    """As glob(3): a wildcard never spans a "/"."""
    from fnmatch import fnmatchcase

    components, patterns = path.split("/"), pattern.split("/")
    return len(components) == len(patterns) and all(map(fnmatchcase, components, patterns))


def _check_bounds(name: str, key_name: str, value: Value) -> None:
    """Where Kata is stricter with an annotation than with the file."""
    host_cpus = os.cpu_count() or 1
    match key_name:
        case "default_vcpus" if value < 0 or value > host_cpus:
            _refuse(name, str(value), f"a number from 0 to the host's {host_cpus} CPUs")
        case "default_maxvcpus" if value > host_cpus:
            _refuse(name, str(value), f"at most the host's {host_cpus} CPUs")
        case "default_memory" if value < 256:
            _refuse(name, str(value), "at least 256 (MiB)")
        case "msize_9p" if value == 0:
            _refuse(name, str(value), "a positive integer")
        case "shared_fs" if value not in ("virtio-fs", "virtio-9p"):
            _refuse(name, value, '"virtio-fs" or "virtio-9p"')
        case "virtio_fs_extra_args":
            from virtcontainers.hypervisor.virtiofsd import weakening

            if found := weakening(value):
                _refuse(name, found, "no argument that changes the sandbox of virtiofsd")
        case "indep_iothreads" if not 1 <= value <= 50:
            _refuse(name, str(value), "an integer from 1 to 50")


def _replace_params(settings: dict[str, Setting], text: str) -> str:
    """The configured kernel parameters without those that `text` sets, and then `text`."""
    new = text.split()
    names = {param.partition("=")[0] for param in new}
    old = settings["kernel_params"].value.split() if "kernel_params" in settings else []
    return " ".join([param for param in old if param.partition("=")[0] not in names] + new)


def _check_hashes(ours: Mapping[str, str]) -> None:
    for hash_name, base in _HASHED.items():
        wanted, path = ours.get(HYPERVISOR_PREFIX + hash_name), ours.get(HYPERVISOR_PREFIX + base)
        if not wanted or not path:
            continue
        hash_type = ours.get(ASSET_HASH_TYPE) or ours.get(HYPERVISOR_PREFIX + "asset_hash_type") or "sha512"
        if hash_type != "sha512":
            _refuse(ASSET_HASH_TYPE, hash_type, '"sha512"')
        import hashlib

        try:
            with open(path, "rb") as file:  # noqa: PTH123
                found = hashlib.file_digest(file, "sha512").hexdigest()
        except OSError as error:
            raise InvalidArgumentError(
                f"annotation {HYPERVISOR_PREFIX}{base}: {path}: {error.strerror}"
            ) from error
        if found != wanted.lower():
            _refuse(HYPERVISOR_PREFIX + hash_name, wanted, f"{found}, which is the SHA-512 of {path}")
