"""`kata-py direct-volume`: volumes that the guest mounts, after `kata-runtime direct-volume`."""

from __future__ import annotations

import json
from urllib.parse import quote

from katautils.shim_client import do_get, do_post
from virtcontainers import direct_volume
from virtcontainers.errors import NotFoundError


def add(volume_path: str, mount_info: str) -> int:
    """Raises KataError, as all here do."""
    direct_volume.add(volume_path, mount_info)
    return 0


def remove(volume_path: str) -> int:
    direct_volume.remove(volume_path)
    return 0


def stats(volume_path: str) -> int:
    """Print what CSI's NodeGetVolumeStats wants to know, in JSON."""
    sandbox_id = direct_volume.sandbox_id_for_volume(volume_path)
    # Quoted twice, as Kata's: a path with a percent sign arrives as it is.
    path = quote(quote(_device(volume_path), safe=""), safe="")
    print(do_get(sandbox_id, f"/direct-volume/stats?path={path}").decode())
    return 0


def resize(volume_path: str, size_bytes: int) -> int:
    """Of a volume whose device has grown already; an image file grows with it."""
    sandbox_id = direct_volume.sandbox_id_for_volume(volume_path)
    asked = {"VolumePath": _device(volume_path), "Size": size_bytes}
    do_post(sandbox_id, "/direct-volume/resize", json.dumps(asked).encode())
    return 0


def _device(volume_path: str) -> str:
    info = direct_volume.volume_mount_info(volume_path)
    if info is None:
        raise NotFoundError(f"direct volume {volume_path} is not known: see `direct-volume add`")
    return info.device
