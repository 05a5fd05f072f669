"""`kata-py factory` for a person: a real template, real clones of it, and what the terminal says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import TIMEOUT_S, Ctr, new_id, processes_of, wait_for
from templates import KATA_PY, ReadyTemplates, Templates, builders_lock, templates
from test_ctr_failures import initrd_that_sleeps
from test_ctr_stdio import Terminal

from virtcontainers.config import HypervisorConfig

MIB = 1 << 20
SETTINGS = {"hypervisor.qemu": {"shared_fs": "virtio-9p"}}

STEPS = (
    "making room",
    "booting the machine",
    "giving memory back",
    "saving the machine",
    "punching out zero pages",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, ready_templates: ReadyTemplates) -> Iterator[Templates]:
    with templates(tmp_path_factory.mktemp("t"), SETTINGS) as found:
        found.put(ready_templates)
        yield found


@pytest.fixture
def template(shared: Templates) -> Iterator[Templates]:
    """One that is there, and fits."""
    shared.configure({})
    assert shared.factory("init").returncode == 0
    yield shared
    shared.configure({})


@pytest.fixture
def no_template(guest_image: Path, tmp_path: Path) -> Iterator[Templates]:
    if os.geteuid() != 0:
        pytest.skip("templates need root")
    with templates(tmp_path, SETTINGS) as found:
        yield found


def machines_of(template: Templates) -> list[int]:
    """QEMUs that make a template, or are its clones."""
    return processes_of(str(template.path), "qemu-system")


def slow(line: str) -> bool:
    """It tells what an emulated machine, or a busy host, makes slow."""
    return "emulated (TCG)" in line or "the guest gives no memory back: " in line


def test_a_life_in_a_pipe(no_template: Templates) -> None:
    path = no_template.path
    result = no_template.factory("status")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"\n  state +there is none\n", result.stdout)

    result = no_template.factory("init")
    assert result.returncode == 0
    assert all(map(slow, result.stderr.splitlines()))
    *steps, last = result.stdout.splitlines()
    assert [step.partition(" ... ")[0] for step in steps] == list(STEPS)
    assert all(re.fullmatch(r".* \.\.\. \d+\.\d s", step) for step in steps)
    assert re.fullmatch(
        rf"The template is in {path}, after \d+\.\d s: \d+\.\d MiB of 256\.0 MiB; "
        r"\d+\.\d MiB were given back, \d+\.\d MiB were zeros\.",
        last,
    )
    made = no_template.current

    result = no_template.factory("init")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"The template in {path} fits already: made ")
    assert no_template.current == made

    result = no_template.factory("destroy")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"The template in {path} is removed.\n" in result.stdout
    assert "Its memory stays" not in result.stdout
    # The mount, the folder, and what is beside it: of all this only the configuration was here before.
    assert list(path.parent.iterdir()) == [no_template.configuration]

    result = no_template.factory("destroy")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"There was no template in {path}.\n" in result.stdout
    assert list(path.parent.iterdir()) == [no_template.configuration]


def test_init_by_force_on_a_terminal(no_template: Templates, tmp_path: Path) -> None:
    held, qemu = tmp_path / "held", tmp_path / "qemu"
    qemu.write_text(
        f'#!/bin/sh\nwhile [ -e {held} ]; do sleep 0.1; done\nexec {HypervisorConfig.path} "$@"\n'
    )
    qemu.chmod(0o755)
    no_template.configure({"hypervisor.qemu": {"path": str(qemu)}})
    assert no_template.factory("init").returncode == 0
    earlier = no_template.current
    held.touch()
    terminal = Terminal(no_template.command("init", "--force"), rows=24, columns=80)
    try:
        wait_for("the progress", lambda: terminal.shows(r"\d+\.\d s  booting the machine"))
        # While the new one is being made there is the old one.
        assert no_template.current == earlier
        assert no_template.status()["template"]["state"] == "fits"
        held.unlink()
        wait_for("the end", terminal.ended)
    finally:
        terminal.close()
    assert terminal.process.returncode == 0
    assert no_template.current not in ("", earlier)
    # What the person sees at the end is one line; the steps have gone.
    lines = [line.rpartition("\r\x1b[K")[2] for line in terminal.screen.split("\r\n")]
    (line,) = (line for line in lines if line and not slow(line))
    assert line.startswith(f"The template is in {no_template.path}, after ")


def test_status_tells_what_it_is_made_of_and_what_it_costs(template: Templates) -> None:
    about = template.status()["template"]
    assert (about["enabled"], about["path"], about["state"]) == (True, str(template.path), "fits")
    assert about["memory_bytes"] == 256 * MIB
    memory = template.path / "memory"
    assert about["memory_allocated_bytes"] == memory.stat().st_blocks * 512
    assert about["state_bytes"] == (template.path / "state").stat().st_size
    assert 0 < about["memory_allocated_bytes"] < about["booted_bytes"]
    assert about["given_back_bytes"] + about["zero_bytes"] > 0
    assert 0 < about["created"] <= time.time()
    assert "vmlinuz" in about["made_of"]["kernel"]
    text = template.factory("status").stdout
    assert re.search(r"\n  enable_template +on\n", text)
    assert re.search(r"\n  state +fits the configuration\n", text)
    assert re.search(r"\n  memory +\d+\.\d MiB allocated of 256\.0 MiB\n", text)


def test_clones_are_shown_and_outlive_the_template(
    ctr: Ctr, container_id: str, no_template: Templates, ready_templates: ReadyTemplates
) -> None:
    other = new_id("other")
    no_template.put(ready_templates)
    with (
        ctr.detached(container_id, "sleep", "1000", options=no_template.options),
        ctr.detached(other, "sleep", "1000", options=no_template.options),
    ):
        found = {each["sandbox"]: each for each in no_template.status()["clones"]}
        for clone in (container_id, other):
            assert [found[clone]["pid"]] == processes_of(clone, "qemu-system")
            assert found[clone]["memory"] == "template"
            assert found[clone]["shared_bytes"] > 10 * MIB
            assert 0 < found[clone]["own_bytes"] < 300 * MIB
        text = no_template.factory("status").stdout
        assert re.search(rf"\n  {container_id} +\d+ +\d+\.\d +\d+\.\d  template\n", text)

        result = no_template.factory("destroy")
        assert (result.returncode, result.stderr) == (0, "")
        assert "Its memory stays until its last clone ends: 2 are running.\n" in result.stdout
        assert not no_template.path.exists()
        # Pages that it has not touched yet come from a file that nobody can open any more.
        script = "dd if=/dev/zero of=/dev/shm/f bs=1M count=50 2>&- && md5sum < /dev/shm/f && ls -R /etc"
        assert ctr.exec(container_id, "sh", "-c", script).stdout.startswith(
            b"25e317773f308e446cc84c503a6d1f85"
        )
        found = {each["sandbox"]: each["memory"] for each in no_template.status()["clones"]}
        assert (found[container_id], found[other]) == ("old template", "old template")
    assert no_template.status()["template"]["state"] == "missing"


def test_many_that_init_at_once_make_one(no_template: Templates) -> None:
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(builders_lock(no_template.path))
        terminals = [Terminal(no_template.command("init"), rows=24, columns=80) for _ in range(4)]
        for terminal in terminals:
            stack.callback(terminal.close)
        # All are read at each look: who is not is held up by what he has written.
        wait_for(
            "all to wait", lambda: sum(bool(each.shows("waiting for another")) for each in terminals) == 4
        )
        lock.close()
        wait_for("their end", lambda: sum(each.ended() for each in terminals) == 4)
    assert [terminal.process.returncode for terminal in terminals] == [0] * 4
    assert sum("booting the machine" in terminal.screen for terminal in terminals) == 1
    assert len(list((no_template.path / "builds").iterdir())) == 1


# -- when it goes wrong


def assert_refused(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 1
    assert result.stderr.startswith("kata-py: ")
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def never_ready(template: Templates, directory: Path, dial_timeout_s: int) -> None:
    """Its machine boots, and has no agent."""
    initrd = initrd_that_sleeps(directory / "no-agent.img")
    agent = {"dial_timeout": dial_timeout_s}
    template.configure({"hypervisor.qemu": {"initrd": str(initrd)}, "agent.kata": agent})


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_init_that_is_interrupted_leaves_nothing(
    no_template: Templates, tmp_path: Path, sent: signal.Signals, status: int
) -> None:
    never_ready(no_template, tmp_path, dial_timeout_s=TIMEOUT_S)
    terminal = Terminal(no_template.command("init"), rows=24, columns=80)
    try:
        wait_for("the boot", lambda: machines_of(no_template))
        if sent is signal.SIGINT:
            # As Ctrl-C: all in the foreground hear of it.
            os.killpg(terminal.process.pid, sent)
        else:
            terminal.process.send_signal(sent)
        wait_for("the end", terminal.ended)
    finally:
        terminal.close()
    assert terminal.process.returncode == status
    assert "Traceback" not in terminal.screen
    assert machines_of(no_template) == []
    assert list((no_template.path / "builds").iterdir()) == []
    assert no_template.status()["template"]["state"] == "missing"


def test_an_agent_that_never_answers_is_told_with_its_console(no_template: Templates, tmp_path: Path) -> None:
    never_ready(no_template, tmp_path, dial_timeout_s=8)

    def told() -> bool:
        result = no_template.factory("init")
        assert machines_of(no_template) == []
        assert no_template.current == ""
        # On a busy host QEMU's own start may take all of the time.
        if "QEMU did not greet" in result.stderr:
            return False
        assert_refused(result, "agent", "dial_timeout")
        return True

    wait_for("QEMU to be quicker than the timeout", told)


def test_a_guest_that_panics_is_told_with_its_console(no_template: Templates, tmp_path: Path) -> None:
    initrd = tmp_path / "nonsense.img"
    initrd.write_text("nonsense\n" * 100)
    no_template.configure({"hypervisor.qemu": {"initrd": str(initrd)}})
    assert_refused(no_template.factory("init"), "Kernel panic")
    # And it is tried again when a person asks again, with what is right now.
    no_template.configure({})
    assert no_template.factory("init").returncode == 0


def test_a_folder_of_somebodys_files_is_refused_and_left(no_template: Templates) -> None:
    no_template.path.mkdir()
    precious = no_template.path / "precious"
    precious.write_text("content")
    assert_refused(no_template.factory("init"), f"{no_template.path} is a folder with files in it")
    assert_refused(no_template.factory("destroy"), f"{no_template.path}: found precious")
    assert precious.read_text() == "content"
    precious.unlink()


def test_a_disk_is_refused(no_template: Templates, tmp_path: Path) -> None:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    no_template.path.mkdir()
    subprocess.run(["mount", "-o", "loop", image, no_template.path], check=True)
    try:
        (no_template.path / "lost+found").rmdir()
        assert_refused(no_template.factory("init"), f"{no_template.path} is on ext4, expected tmpfs")
        assert list(no_template.path.iterdir()) == []
    finally:
        subprocess.run(["umount", no_template.path], check=True)


def test_a_tmpfs_that_anybody_may_write_to_is_refused(no_template: Templates) -> None:
    no_template.path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "some", no_template.path], check=True)
    try:
        assert_refused(no_template.factory("init"), "mode 1777", "root alone")
        assert list(no_template.path.iterdir()) == []
        # Nor is one used that somebody has put there.
        (no_template.path / "current").symlink_to("builds/1")
        assert "mode 1777" in no_template.status()["template"]["problem"]
    finally:
        subprocess.run(["umount", no_template.path], check=True)


def test_a_path_that_cannot_be_made_is_refused(no_template: Templates) -> None:
    no_template.configure({"factory": {"template_path": "/proc/kata-py/template"}})
    assert_refused(no_template.factory("init"), "/proc/kata-py")


def test_without_root(template: Templates) -> None:
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    command = [*nobody, *template.command("init")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert_refused(result, f"{template.configuration}: Permission denied")
    # Who may read it may look at what is his, and no more.
    configuration = Path("/tmp") / f"{new_id('configuration')}.toml"
    shutil.copy(template.configuration, configuration)
    try:
        for action in ("init", "destroy", "status"):
            command = [*nobody, str(KATA_PY), "factory", action, "--config", str(configuration)]
            result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
            if action == "status":
                assert (result.returncode, result.stderr) == (0, "")
                assert "only root can tell" in result.stdout
            else:
                assert_refused(result, f"factory {action}: found user 65534, expected root")
    finally:
        configuration.unlink()


# The last only because each of the others would have its template made anew.
def test_status_tells_what_does_not_fit_and_init_mends_it(template: Templates) -> None:
    earlier = template.current
    template.configure({"hypervisor.qemu": {"default_memory": 300, "kernel_params": "kata.test=1"}})
    about = template.status()["template"]
    assert about["state"] == "misfit"
    assert {each["part"] for each in about["differences"]} == {"memory", "kernel_params", "devices"}
    text = template.factory("status").stdout
    assert re.search(r"\n  state +does not fit the configuration, and will be made anew\n", text)
    assert re.search(r"\n    memory +256M.*\n      expected +300M", text)
    assert template.current == earlier, "looking changes nothing"

    result = template.factory("init")
    assert result.returncode == 0
    line = result.stderr.splitlines()[0]
    assert line.startswith(f"kata-py: the template in {template.path} does not fit: ")
    assert "memory: found 256M" in line
    assert "kata.test=1" in line
    assert template.current not in ("", earlier)
    assert template.status()["template"]["state"] == "fits"
