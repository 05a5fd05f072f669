"""Volumes that a CSI driver leaves to the guest to mount, after Kata's `pkg/direct-volume`: what is known of
each is a file that the driver, or `kata-py direct-volume add`, has written.

Beside the file stands an empty one with the name of the sandbox that has the volume.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtcontainers.errors import InvalidArgumentError, KataError, NotFoundError

DIRECT_VOLUMES = Path("/run/kata-containers/shared/direct-volumes")
_MOUNT_INFO = "mountInfo.json"

FS_GROUP = "fsGroup"
FS_GROUP_CHANGE_POLICY = "fsGroupChangePolicy"
_TYPES = ("block", "directvol")
"""The latter is what Kata's runtime-rs calls it."""


@dataclass(frozen=True, kw_only=True)
class MountInfo:
    """What the guest is to mount: `device` is a block device of the host, or a raw image file."""

    device: str
    fstype: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def parse_mount_info(text: str, what: str) -> MountInfo:
    """Raises InvalidArgumentError, beginning with `what`."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{what}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InvalidArgumentError(f"{what}: found {text[:60]!r}, expected a JSON object")

    def string(key: str) -> str:
        value = found.get(key)
        if not isinstance(value, str) or not value:
            raise InvalidArgumentError(f'{what}: "{key}": found {json.dumps(value)}, expected a string')
        return value

    def strings(key: str, value: Any) -> list[str]:
        items = value if isinstance(value, list) else list(value.values())
        if not all(isinstance(item, str) for item in items):
            raise InvalidArgumentError(f'{what}: "{key}": found {json.dumps(value)}, expected strings')
        return items

    if (kind := string("volume-type")) not in _TYPES:
        raise InvalidArgumentError(f'{what}: "volume-type": found "{kind}", expected "block"')
    if not (device := string("device")).startswith("/"):
        raise InvalidArgumentError(f'{what}: "device": found "{device}", expected an absolute path')
    options, metadata = found.get("options") or [], found.get("metadata") or {}
    if not isinstance(options, list) or not isinstance(metadata, dict):
        raise InvalidArgumentError(
            f'{what}: found another type, expected a list for "options" and an object for "metadata"'
        )
    strings("metadata", metadata)
    return MountInfo(
        device=device,
        fstype=string("fstype"),
        metadata=metadata,
        options=tuple(strings("options", options)),
    )


def _directory(volume_path: str) -> Path:
    return DIRECT_VOLUMES / base64.urlsafe_b64encode(os.fsencode(volume_path)).decode()


def add(volume_path: str, mount_info: str) -> None:
    """Register a volume; one that is registered is replaced. Raises KataError's classes."""
    if not volume_path:
        raise InvalidArgumentError("direct volume: found no volume path, expected one")
    parse_mount_info(mount_info, f"mount info of {volume_path}")
    directory = _directory(volume_path)
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Replaced in whole: a pod may be reading it.
        temporary = directory.with_name(f".{os.getpid()}.{_MOUNT_INFO}")
        temporary.write_text(mount_info)
        temporary.chmod(0o600)
        temporary.replace(directory / _MOUNT_INFO)
    except OSError as error:
        raise KataError(f"direct volume {volume_path}: {directory}: {error.strerror}") from error


def remove(volume_path: str) -> None:
    """Forget a volume; the pod that has it goes on. Idempotent. Raises KataError."""
    with contextlib.suppress(FileNotFoundError):
        try:
            shutil.rmtree(_directory(volume_path))
        except FileNotFoundError:
            raise
        except OSError as error:
            raise KataError(f"direct volume {volume_path}: {error.filename}: {error.strerror}") from error


def volume_mount_info(volume_path: str) -> MountInfo | None:
    """None for a path that is no direct volume. Raises InvalidArgumentError for what makes no sense."""
    try:
        path = _directory(volume_path) / _MOUNT_INFO
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None  # and so none was ever made
        raise InvalidArgumentError(f"{path}: {error.strerror}") from error
    return parse_mount_info(text, str(path))


def record_sandbox_id(sandbox_id: str, volume_path: str) -> None:
    """For a CSI driver to find whom to ask: `sandbox_id_for_volume`. Raises KataError's classes."""
    if sandbox_id == _MOUNT_INFO:
        raise InvalidArgumentError(
            f"direct volume {volume_path}: found a pod with the id {sandbox_id}, expected another: what is "
            "known of the volume has that name"
        )
    try:
        (_directory(volume_path) / sandbox_id).touch(mode=0o600)
    except OSError as error:
        raise KataError(f"direct volume {volume_path}: {error.filename}: {error.strerror}") from error


def forget_sandbox_id(sandbox_id: str, volume_path: str | None = None) -> None:
    """Of one volume, or of all; idempotent."""
    if sandbox_id == _MOUNT_INFO:
        return  # it has none
    pattern = "*" if volume_path is None else _directory(volume_path).name
    for path in DIRECT_VOLUMES.glob(f"{pattern}/{sandbox_id}"):
        path.unlink(missing_ok=True)


def sandbox_id_for_volume(volume_path: str) -> str:
    """Raises NotFoundError when no pod has it."""
    try:
        names = [path.name for path in _directory(volume_path).iterdir() if path.name != _MOUNT_INFO]
    except OSError:
        raise NotFoundError(f"direct volume {volume_path} is not known: see `direct-volume add`") from None
    if not names:
        raise NotFoundError(f"direct volume {volume_path}: no pod has it")
    return names[0]
