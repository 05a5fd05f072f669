"""Private containerds for a session, configuration files for a test, and a look at the host around each."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_state
import pytest
from cri import Crictl
from harness import TIMEOUT_S, Config, Ctr, new_id
from private_containerd import (
    CACHE,
    GUEST_IMAGE,
    REPO,
    TEST_IMAGE_ARCHIVE,
    Containerd,
    Settings,
    write_kata_config,
)
from private_cri import PAUSE_IMAGE_ARCHIVE
from templates import Pods, ReadyTemplates

from katautils.config import load_configuration
from virtcontainers.vm import VMConfig

SUITES = ("system", "trixie", "sid")
"""The machine's containerd (1.6 on Debian 12), 1.7 and 2.x; see hack/containerd-versions."""

READY_TEMPLATES = "KATA_PY_READY_TEMPLATES"
"""In the environment of all workers: where they find each other's templates."""

_started: list[Containerd] = []


def pytest_configure(config: pytest.Config) -> None:
    if READY_TEMPLATES in os.environ:
        return
    parent, prefix = Path(tempfile.gettempdir()), "kata-py-ready-templates-"
    with _locked(parent):
        for left in parent.glob(f"{prefix}*"):
            # Of a session that was killed: one that runs has its lock.
            with contextlib.suppress(OSError), _locked(left, fcntl.LOCK_NB):
                shutil.rmtree(left)
        directory = Path(tempfile.mkdtemp(prefix=prefix))
        ours = contextlib.ExitStack()
        ours.enter_context(_locked(directory))
    os.environ[READY_TEMPLATES] = str(directory)
    config.add_cleanup(ours.close)
    config.add_cleanup(lambda: shutil.rmtree(directory))


@contextlib.contextmanager
def _locked(directory: Path, flags: int = 0) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(fd)


def _state_directories() -> frozenset[Path]:
    return frozenset(containerd.run / "state" for containerd in _started)


@pytest.fixture(scope="session")
def guest_image() -> Path:
    """Directory of vmlinuz and initrd.img."""
    if not (GUEST_IMAGE / "initrd.img").exists():
        pytest.skip(f"no guest image in {GUEST_IMAGE}: run hack/setup.sh")
    return GUEST_IMAGE


@pytest.fixture(scope="session")
def ready_templates(guest_image: Path) -> ReadyTemplates:
    if os.geteuid() != 0:
        pytest.skip("templates need root")
    return ReadyTemplates(Path(os.environ[READY_TEMPLATES]))


@pytest.fixture
def cloning(ready_templates: ReadyTemplates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    with ready_templates.cloning(tmp_path_factory.mktemp("t")) as factory:
        yield factory


@pytest.fixture(scope="session")
def machines(guest_image: Path, ready_templates: ReadyTemplates) -> Iterator[Settings]:
    """Of all containerds: pods are clones of one template. To boot takes over ten times as long."""
    if os.geteuid() != 0:
        pytest.skip("containerd needs root")
    for needed in (REPO / ".venv/bin/containerd-shim-kata-py-v2", TEST_IMAGE_ARCHIVE, PAUSE_IMAGE_ARCHIVE):
        if not needed.exists():
            pytest.skip(f"no {needed}: run hack/setup.sh")
    # Not in this session's directory: `host_state` would take it for left behind by its first user. In
    # /run, which goes with the isolated host of a session, however that ends.
    with tempfile.TemporaryDirectory(prefix="kata-py-machines-", dir="/run") as name:
        directory = Path(name)
        settings: Settings = {
            "factory": {"enable_template": True, "template_path": str(directory / "template")},
            "hypervisor.qemu": {"enable_annotations": ["enable_virtio_mem"]},
        }
        configuration = write_kata_config(directory / "configuration.toml", settings)
        found = load_configuration(configuration)
        try:
            ready_templates.put(directory / "template", VMConfig(found.hypervisor, found.agent))
            made = (directory / "template/current").readlink()
            yield settings
            assert (directory / "template/current").readlink() == made, "all pods were clones of one template"
        finally:
            program = REPO / ".venv/bin/kata-py"
            subprocess.run([program, "factory", "destroy", "--config", configuration], check=True)


def _start(suite: str, directory: Path, settings: Settings, cri: bool = False) -> Containerd:
    binaries = Path("/usr/bin") if suite == "system" else CACHE / "containerd" / suite / "bin"
    if not (binaries / "containerd").exists():
        reason = CACHE / "containerd" / f"{suite}.missing"
        pytest.skip(reason.read_text().strip() if reason.exists() else "run hack/containerd-versions")
    containerd = Containerd(
        root=directory / "root", run=directory / "run", binaries=binaries, settings=settings, cri=cri
    )
    containerd.start()
    _started.append(containerd)
    return containerd


@pytest.fixture(scope="session")
def containerd(tmp_path_factory: pytest.TempPathFactory, machines: Settings) -> Iterator[Containerd]:
    """The machine's containerd, as a private instance."""
    instance = _start("system", tmp_path_factory.mktemp("c"), machines)
    yield instance
    instance.destroy()


@pytest.fixture(scope="session", params=SUITES)
def every_containerd(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, machines: Settings
) -> Iterator[Containerd]:
    """Each containerd that can be had, one after another."""
    if request.param == "system":
        yield request.getfixturevalue("containerd")
        return
    instance = _start(request.param, tmp_path_factory.mktemp("c"), machines)
    yield instance
    instance.destroy()


@pytest.fixture(scope="session")
def crictl(tmp_path_factory: pytest.TempPathFactory, machines: Settings) -> Iterator[Crictl]:
    """crictl on the machine's containerd with the CRI plugin, in a private instance."""
    with _cri_instance("system", tmp_path_factory.mktemp("cri"), machines) as found:
        yield found


@pytest.fixture(params=SUITES[1:])
def newer_crictl(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, machines: Settings
) -> Iterator[Crictl]:
    """As `crictl`, on each newer containerd that can be had."""
    with _cri_instance(request.param, tmp_path_factory.mktemp("cri"), machines) as found:
        yield found


@contextlib.contextmanager
def _cri_instance(suite: str, directory: Path, settings: Settings) -> Iterator[Crictl]:
    """Whatever it has for its pods is gone at the end."""
    instance = _start(suite, directory, settings, cri=True)
    try:
        yield Crictl(instance, directory)
        bridge = Path("/sys/class/net", instance.network.bridge)
        assert not list((bridge / "brif").iterdir()), "no pod is left on the bridge"
        assert not list(instance.run.glob("state/*/netns/*")), "no network namespace is left"
    finally:
        instance.destroy()
        assert not Path("/sys/class/net", instance.network.bridge).exists()


@pytest.fixture(scope="session")
def ctr(containerd: Containerd) -> Ctr:
    return Ctr(containerd)


@pytest.fixture(scope="session")
def every_ctr(every_containerd: Containerd) -> Ctr:
    return Ctr(every_containerd)


@pytest.fixture
def container_id(request: pytest.FixtureRequest) -> str:
    return new_id(request.node.name.removeprefix("test_"))


@pytest.fixture
def config(tmp_path: Path, guest_image: Path) -> Config:
    """`config({"hypervisor.qemu": {...}})`: options that make `ctr run` use a configuration of its own.

    Without more settings the pod's machine is booted.
    """

    def write(settings: Settings) -> tuple[str, ...]:
        path = write_kata_config(tmp_path / "configuration.toml", settings)
        return ("--runtime-config-path", str(path))

    return write


def _compare(earlier: host_state.HostState) -> None:
    __tracebackhide__ = True
    differences = host_state.differences_after(earlier, _state_directories(), timeout_s=TIMEOUT_S)
    if differences:
        pytest.fail(f"the host is not as it was before:\n{differences}", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def _own_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    host_state.own_directories.add(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module", autouse=True)
def _host_unchanged_by_module() -> Iterator[None]:
    """What a module shares between its tests is gone at its end."""
    earlier = host_state.look(_state_directories())
    yield
    _compare(earlier)


@pytest.fixture(autouse=True)
def host_unchanged(_host_unchanged_by_module: Any) -> Iterator[None]:
    """Every test leaves processes, mounts, links, cgroups, sockets and directories as it found them."""
    earlier = host_state.look(_state_directories())
    yield
    _compare(earlier)
