"""An image of one layer as an OCI archive, which `ctr images import` takes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any


def write_archive(path: Path, name: str, layer: bytes, config: dict[str, Any]) -> None:
    """`layer` is a tar; `config` the OCI image configuration's `config`. Same input, same bytes."""
    blobs: dict[str, bytes] = {}

    def blob(data: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}

    def as_json(value: object) -> bytes:
        return json.dumps(value, sort_keys=True).encode()

    layer_blob = blob(layer, "application/vnd.oci.image.layer.v1.tar")
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [layer_blob["digest"]]},
    }
    manifest = blob(
        as_json(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": blob(as_json(image), "application/vnd.oci.image.config.v1+json"),
                "layers": [layer_blob],
            }
        ),
        "application/vnd.oci.image.manifest.v1+json",
    )
    manifest["annotations"] = {"io.containerd.image.name": name}
    index = {"schemaVersion": 2, "manifests": [manifest]}
    partial = path.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for entry, data in {
            "oci-layout": as_json({"imageLayoutVersion": "1.0.0"}),
            "index.json": as_json(index),
            **blobs,
        }.items():
            info = tarfile.TarInfo(entry)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    partial.rename(path)
