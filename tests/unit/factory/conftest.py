"""Templates made of small files: all of one but a machine."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from virtcontainers.config import Accel, AgentConfig, AgentTransport, HypervisorConfig, SharedFS
from virtcontainers.factory.fingerprint import made_of
from virtcontainers.factory.template import TemplateInfo
from virtcontainers.vm import VMConfig

WriteTemplate = Callable[..., Path]


@pytest.fixture
def vm_config(tmp_path: Path) -> VMConfig:
    """Its files are there, and its QEMU is none that could be started."""
    host = tmp_path / "host"
    host.mkdir()
    for name in ("kernel", "initrd", "qemu", "firmware"):
        (host / name).write_text(name)
    hypervisor = HypervisorConfig(
        path=host / "qemu",
        kernel=host / "kernel",
        initrd=host / "initrd",
        accel=Accel.TCG,
        default_vcpus=1,
        default_maxvcpus=4,
        default_memory_mib=256,
        default_maxmemory_mib=1024,
        shared_fs=SharedFS.VIRTIO_9P,
    )
    return VMConfig(hypervisor, AgentConfig(transport=AgentTransport.SERIAL, dial_timeout_s=1))


@pytest.fixture
def write_template(vm_config: VMConfig) -> WriteTemplate:
    """`write_template(path)`: a template of `vm_config` in `path`, which is no tmpfs."""

    def write(path: Path, name: str = "one") -> Path:
        build = path / "builds" / name
        build.mkdir(parents=True, mode=0o700)
        (build / "memory").write_bytes(bytes(1 << 20))
        # Whoever writes to it makes it younger, however soon that is.
        os.utime(build / "memory", (0, 0))
        state = b"a machine's devices"
        (build / "state").write_bytes(state)
        memory = (build / "memory").stat()
        info = TemplateInfo(
            directory=build,
            created=time.time(),
            made_of=made_of(vm_config),
            memory_bytes=memory.st_size,
            memory_allocated_bytes=memory.st_blocks * 512,
            memory_mtime_ns=memory.st_mtime_ns,
            state_bytes=len(state),
            state_crc32=zlib.crc32(state),
            booted_bytes=0,
            given_back_bytes=0,
            zero_bytes=0,
        )
        written = {key: value for key, value in asdict(info).items() if key != "directory"}
        (build / "template.json").write_text(json.dumps(written))
        (path / "current").unlink(missing_ok=True)
        (path / "current").symlink_to(f"builds/{name}")
        return build

    return write
