"""What QEMU's driver refuses before it starts anything, and what it makes of ends and failures."""

import asyncio
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agent_client.transports import SerialAddress
from virtcontainers.config import Accel, AgentConfig, AgentTransport, HypervisorConfig, SharedFS
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.hypervisor.base import HypervisorError, QMPFailed, QMPTimeout, RestoreFailed, VMState
from virtcontainers.hypervisor.process import MachineProcess, find_processes
from virtcontainers.hypervisor.qemu import Qemu, remove_directory
from virtcontainers.hypervisor.qmp import QMP


@pytest.fixture
def config(tmp_path: Path) -> HypervisorConfig:
    for name in ("kernel", "initrd", "qemu"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").touch()
    (tmp_path / "qemu").chmod(0o755)
    return HypervisorConfig(
        path=tmp_path / "qemu",
        kernel=tmp_path / "kernel",
        initrd=tmp_path / "initrd",
        shared_fs=SharedFS.VIRTIO_9P,
        accel=Accel.TCG,
    )


def machine(tmp_path: Path, config: HypervisorConfig) -> Qemu:
    agent = AgentConfig(transport=AgentTransport.SERIAL)
    return Qemu("pod", config, agent, shared_path=tmp_path, run_vc=tmp_path / "vc")


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"path": "none"}, r"QEMU .*/none \(path in \[hypervisor.qemu\]\) does not exist"),
    ({"path": "kernel"}, r"QEMU .*/kernel \(path in .* is not executable"),
    ({"kernel": None}, "no guest kernel: set kernel"),
    ({"kernel": "none"}, r"guest kernel .*/none \(kernel in .* does not exist"),
    ({"kernel": "empty"}, r"guest kernel .*/empty .* is empty: 0 bytes"),
    ({"kernel": "."}, "is not a file"),
    ({"initrd": "empty"}, r"guest initrd .*/empty \(initrd in \[hypervisor.qemu\]\) is empty: 0 bytes"),
    ({"initrd": "none"}, r"guest initrd .* does not exist"),
    ({"initrd": None}, "one of initrd and image is needed .* neither is set"),
    ({"image": "kernel"}, "one of initrd and image is needed .* both are set"),
    ({"initrd": None, "image": "none"}, "guest image .* does not exist"),
    ({"firmware": "none"}, r"firmware .* \(firmware in .* does not exist"),
    ({"entropy_source": "none"}, r"entropy source .* \(entropy_source in .* does not exist"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_a_missing_file_is_named_with_its_key(
    tmp_path: Path, config: HypervisorConfig, changes: dict[str, Any], message: str
) -> None:
    paths = {key: tmp_path / name if name else None for key, name in changes.items()}
    with pytest.raises(InvalidArgumentError, match=message):
        machine(tmp_path, replace(config, **paths)).create_vm()


def test_another_machine_type_is_refused(tmp_path: Path, config: HypervisorConfig) -> None:
    with pytest.raises(InvalidArgumentError, match='machine_type "microvm": expected "q35"'):
        machine(tmp_path, replace(config, machine_type="microvm")).create_vm()


def test_an_id_that_is_too_long_for_its_sockets_is_refused(config: HypervisorConfig) -> None:
    """containerd's have 76 bytes at most, which fit in any case."""

    def plan(size: int, shared_fs: SharedFS) -> None:
        agent = AgentConfig(transport=AgentTransport.SERIAL)
        daemon = Path("/bin/true")
        Qemu(
            "x" * size,
            replace(config, shared_fs=shared_fs, virtio_fs_daemon=daemon),
            agent,
            shared_path=Path("/shared"),
        ).create_vm()

    for shared_fs, most, name in (
        (SharedFS.VIRTIO_9P, 85, "agent.sock"),
        (SharedFS.VIRTIO_FS, 81, "virtiofsd.sock"),
    ):
        plan(most, shared_fs)
        too_long = "x" * (most + 2)
        with pytest.raises(InvalidArgumentError) as refused:
            plan(most + 2, shared_fs)
        assert str(refused.value) == (
            f"id '{too_long}' is 2 bytes too long: found a socket's path of 109 bytes, "
            f"/run/vc/vm/{too_long}/{name}, expected at most 107"
        )


@pytest.mark.parametrize("has_dax", [True, False])
def test_a_cache_size_needs_a_qemu_that_has_it(
    tmp_path: Path, config: HypervisorConfig, has_dax: bool
) -> None:
    for name, shown in (("qemu", "cache-size=<size>" if has_dax else "queue-size=<uint16>"), ("daemon", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{shown}'\n")
        (tmp_path / name).chmod(0o755)
    daemon: dict[str, Any] = {"shared_fs": SharedFS.VIRTIO_FS, "virtio_fs_daemon": tmp_path / "daemon"}
    qemu = machine(tmp_path, replace(config, **daemon, virtio_fs_cache_size_mib=64))
    if has_dax:
        qemu.create_vm()
        argv = " ".join(qemu.command_line.argv({"qmp": 3, "agent": 4, "memory": -1}))
        assert f"cache-size={64 << 20}" in argv
        return
    with pytest.raises(InvalidArgumentError, match=r"virtio_fs_cache_size in .*: found 64, expected 0"):
        qemu.create_vm()


def test_planning_touches_nothing(
    tmp_path: Path, config: HypervisorConfig, caplog: pytest.LogCaptureFixture
) -> None:
    before = set(tmp_path.iterdir())
    qemu = machine(tmp_path, config)
    with pytest.raises(HypervisorError, match="the machine is new"):
        qemu.save()
    with caplog.at_level(logging.WARNING):
        qemu.create_vm()
    assert qemu.state is VMState.CREATED
    assert qemu.agent_address == SerialAddress(tmp_path / "vc/vm/pod/agent.sock")
    assert qemu.save()["directory"] == str(tmp_path / "vc/vm/pod")
    assert qemu.get_pids() == []
    assert set(tmp_path.iterdir()) == before
    assert [record.message for record in caplog.records if record.name != "asyncio"] == [
        "the machine is emulated (TCG), which is slow: tcg is configured"
    ]


# What a QEMU does whose guest panics: it may be gone before anybody has asked it anything.
PANICS = """#!{python}
import re, socket, sys
print("Kernel panic", flush=True)
if {greets}:
    fd = int(re.search(r"id=qmp,[^ ]*fd=([0-9]+)", " ".join(sys.argv))[1])
    connection, _ = socket.socket(fileno=fd).accept()
    connection.sendall(b'{{"QMP": {{"version": {{}}, "capabilities": []}}}}\\r\\n')
    connection.recv(1000)
    connection.sendall(b'{{"return": {{}}}}\\r\\n')
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="machines need root")
@pytest.mark.parametrize("greets", [False, True])
def test_a_guest_that_ends_while_its_qemu_starts_has_the_last_word(
    tmp_path: Path, config: HypervisorConfig, monkeypatch: pytest.MonkeyPatch, greets: bool
) -> None:
    monkeypatch.setattr("virtcontainers.hypervisor.qemu._LAST_WORDS_TIMEOUT_S", 60)
    (tmp_path / "qemu").write_text(PANICS.format(python=sys.executable, greets=greets))
    qemu = machine(tmp_path, config)
    qemu.create_vm()
    expected = r"qemu did not start: qemu \(pid \d+\) exited with status 0\n--- console.log:\nKernel panic$"
    with pytest.raises(HypervisorError, match=expected):
        asyncio.run(qemu.start_vm(60))
    assert not qemu.directory.exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [(QMPFailed("a broken state"), RestoreFailed), (QMPTimeout("no answer"), HypervisorError)],
)
def test_a_qemu_that_is_slow_tells_nothing_of_its_template(
    tmp_path: Path, config: HypervisorConfig, error: QMPFailed, told: type[HypervisorError]
) -> None:
    class Monitor(QMP):
        def __init__(self) -> None:
            pass

        async def migrate_incoming(self, path: Path, *, timeout_s: float) -> None:
            raise error

    async def body() -> None:
        qemu = machine(tmp_path, replace(config, devices_state_path=tmp_path / "state"))
        qemu.directory.mkdir(parents=True)
        qemu._qemu = MachineProcess.start("qemu", ["/bin/true"], directory=qemu.directory)
        qemu._qmp = Monitor()
        with pytest.raises(HypervisorError) as raised:
            await qemu._restore(60)
        assert type(raised.value) is told

    asyncio.run(body())


def test_what_a_daemon_has_forked_ends_with_the_machine(tmp_path: Path, config: HypervisorConfig) -> None:
    # It forks and execs nothing more: a new program's environment is seen a moment later.
    os.mkfifo(tmp_path / "never")
    words = f": >{tmp_path}/forked; read line <>{tmp_path}/never"

    async def body() -> None:
        qemu = machine(tmp_path, config)
        qemu.directory.mkdir(parents=True)
        script = f"setsid sh -c '{words}' & wait"
        daemon = qemu._start_daemon("virtiofsd", ["/bin/sh", "-c", script])
        while not (tmp_path / "forked").exists():
            assert daemon.running
            await asyncio.sleep(0.01)
        assert len(find_processes(qemu.directory)) == 2
        await qemu.stop_vm()
        assert find_processes(qemu.directory) == []
        assert not qemu.directory.exists()

    asyncio.run(body())


def test_a_directory_in_which_a_file_is_made_meanwhile_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmdir = Path.rmdir
    late = ["owner"]

    def remove(path: Path) -> None:
        if late:
            (path / late.pop()).touch()
        rmdir(path)

    monkeypatch.setattr(Path, "rmdir", remove)
    (tmp_path / "vm").mkdir()
    remove_directory(tmp_path / "vm")
    assert not late and not (tmp_path / "vm").exists()


def test_no_more_slots_are_given_than_the_bridges_have(tmp_path: Path, config: HypervisorConfig) -> None:
    qemu = machine(tmp_path, replace(config, default_bridges=2))
    slots = [qemu.take_slot() for _ in range(60)]
    assert len({slot.pci_path for slot in slots}) == 60
    with pytest.raises(
        HypervisorError, match=r"all 60 slots of the PCI bridges are used \(default_bridges in"
    ):
        qemu.take_slot()
    qemu.give_back_slot(slots[7])
    assert qemu.take_slot() == slots[7]
