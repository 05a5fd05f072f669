from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katautils.config import load_configuration

Tables = dict[str, dict[str, Any]]


def toml(tables: Tables) -> str:
    """What JSON writes for strings, numbers, booleans and lists is TOML too."""
    return "".join(
        f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for table, keys in tables.items()
    )


@pytest.fixture
def write_config(tmp_path: Path) -> Callable[..., Path]:
    """Writes a configuration.toml that loads, with the tables given over it."""

    def write(**tables: dict[str, Any]) -> Path:
        merged: Tables = {"hypervisor.qemu": {"kernel": "/k", "initrd": "/i", "default_memory": 256}}
        for table, keys in tables.items():
            name = table.replace("__", ".")
            merged[name] = {k: v for k, v in {**merged.get(name, {}), **keys}.items() if v is not None}
        path = tmp_path / "configuration.toml"
        path.write_text(toml(merged))
        return path

    return write


@pytest.fixture
def load(write_config: Callable[..., Path]) -> Callable[..., Any]:
    """Loads a configuration of the tables given."""

    def load(annotations: dict[str, str] | None = None, **tables: dict[str, Any]) -> Any:
        return load_configuration(write_config(**tables), annotations)

    return load


@pytest.fixture
def host_cpus(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    return 8


@pytest.fixture
def spec() -> dict[str, Any]:
    """A bundle's spec, as small as it can be."""
    return {
        "ociVersion": "1.2.0",
        "process": {"args": ["sh"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "network"}]},
    }


@pytest.fixture
def write_bundle(tmp_path: Path, spec: dict[str, Any]) -> Callable[[dict[str, Any]], Path]:
    def write(changes: dict[str, Any]) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**spec, **changes}))
        return tmp_path

    return write
