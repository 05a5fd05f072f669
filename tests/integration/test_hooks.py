"""Hooks of the runtime, while the machine they are for dies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from harness import TIMEOUT_S, new_id, processes_of
from private_containerd import Settings, write_kata_config
from processes import wait_gone
from test_sandbox import container_config, spec

from katautils.create import create_container, create_sandbox, start_container
from virtcontainers.config import RootFs
from virtcontainers.errors import UnavailableError

CRI = "io.kubernetes.cri."


def shell(script: str) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script]}


@pytest.fixture
def configuration(machines: Settings, tmp_path: Path) -> Path:
    return write_kata_config(tmp_path / "configuration.toml", machines)


def bundle(directory: Path, container_id: str, given: dict[str, Any]) -> tuple[Path, RootFs]:
    made = container_config(directory, container_id, given)
    (made.bundle / "config.json").write_text(json.dumps(given))
    return made.bundle, made.rootfs


@pytest.mark.parametrize("stage", ["createRuntime", "createRuntime of another container", "poststart"])
def test_a_hook_is_cut_short_by_the_machines_death_which_is_the_reason(
    tmp_path: Path, configuration: Path, stage: str
) -> None:
    pod = new_id("pod")
    name, _, of_another = stage.partition(" ")
    # The machine's pid is in the state.
    kill = 'kill -9 $(sed "s/.*\\"pid\\": \\([0-9]*\\).*/\\1/"); exec sleep 100000'
    hooks = {name: [shell(f"echo $$ >{tmp_path}/hook; {kill}")], "poststop": [shell(f"touch {tmp_path}/end")]}
    kind = {f"{CRI}container-type": "sandbox", f"{CRI}sandbox-id": pod}
    first = {**spec("sleep", "1000"), "annotations": kind, **({} if of_another else {"hooks": hooks})}
    kind = {f"{CRI}container-type": "container", f"{CRI}sandbox-id": pod}
    other = {**spec("sleep", "1000"), "annotations": kind, "hooks": hooks}

    async def body() -> None:
        directory, rootfs = bundle(tmp_path, pod, first)
        sandbox = await create_sandbox(directory, pod, rootfs.mounts, configuration, terminal=False)
        try:
            if of_another:
                directory, rootfs = bundle(tmp_path, f"{pod}-2", other)
                await create_container(sandbox, directory, f"{pod}-2", rootfs.mounts, terminal=False)
            else:
                await start_container(sandbox.containers[pod])
        finally:
            assert list(sandbox.containers) == [pod]
            await sandbox.delete()

    async def in_time() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await body()

    with pytest.raises(UnavailableError, match=f"sandbox {pod} is dead: qemu .*SIGKILL"):
        asyncio.run(in_time())
    wait_gone([int((tmp_path / "hook").read_text())])
    assert processes_of(pod, "qemu-system") == []
    # As after any failure of a creation; of what was created it is for the end.
    assert (tmp_path / "end").exists() is (name == "createRuntime")
