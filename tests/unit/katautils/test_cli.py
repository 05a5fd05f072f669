from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from katautils import __version__
from katautils.cli import check as cli_check
from katautils.cli import containerd
from katautils.cli.check import Finding, Status

WriteConfig = Callable[..., Path]

REPOSITORY = Path(__file__).parents[3]


def kata_py(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "katautils.cli.main", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=120,
    )


def on_a_terminal(*arguments: str | Path, **environment: str) -> str:
    """What a person sees on 80 columns."""
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "katautils.cli.main", *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={k: v for k, v in os.environ.items() if k != "NO_COLOR"}
        | {"TERM": "xterm", "COLUMNS": "80"}
        | environment,
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    os.close(main)
    process.wait(timeout=120)
    return seen.decode().replace("\r\n", "\n")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the programs that are asked for their versions."""
    monkeypatch.setattr(containerd, "_TIMEOUT_S", 120)


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Path]:
    """A program that prints one line, and exits with a status."""

    def make(name: str, line: str, status: int = 0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"#!/bin/sh\necho '{line}'\nexit {status}\n")
        path.chmod(0o755)
        return path

    return make


def findings(config_path: Path | None) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in cli_check.examine(config_path):
        found.setdefault(finding.name, []).append(finding)
    return found


def test_without_arguments_help_is_shown() -> None:
    result = kata_py()
    assert result.returncode == 0
    assert re.search(r"^  +check +\w", result.stdout, re.MULTILINE)
    assert re.search(r"^  +env +\w", result.stdout, re.MULTILINE)


def test_the_version() -> None:
    assert f'version = "{__version__}"' in (REPOSITORY / "pyproject.toml").read_text()
    for arguments in (("version",), ("--version",)):
        assert kata_py(*arguments).stdout == f"kata-py {__version__}\n"


def test_wrong_usage_is_status_2() -> None:
    result = kata_py("chekc")
    assert result.returncode == 2
    assert "check" in result.stderr


def test_asking_for_help_imports_nothing_big() -> None:
    code = "import sys, katautils.cli.main as m; m.main([]); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"asyncio", "tomllib", "google", "dataclasses", "subprocess"} & set(result.stdout.split())


# -- check


def test_check_on_a_pipe_is_plain_lines(write_config: WriteConfig) -> None:
    path = write_config(hypervisor__qemu={"kernel": "/does/not/exist", "shared_fs": "virtio-9p"})
    result = kata_py("check", "--config", path)
    assert result.returncode == 1
    assert result.stderr == ""
    for line in result.stdout.splitlines():
        assert re.match(r"(ok|warning|failure): [^:]+: \S", line), line
    names = [line.split(": ")[1] for line in result.stdout.splitlines()]
    for name in (
        "configuration",
        "Linux",
        "QEMU",
        "acceleration",
        "vsock",
        "TUN",
        "kernel",
        "initrd",
        "containerd",
    ):
        assert name in names
    assert "virtiofsd" not in names
    assert re.search(r"failure: kernel: /does/not/exist: No such file.*; set kernel in \[hyp", result.stdout)


def test_check_on_a_terminal_is_a_coloured_aligned_table(write_config: WriteConfig) -> None:
    path = write_config(hypervisor__qemu={"kernel": "/does/not/exist"})
    seen = on_a_terminal("check", "--config", path)
    assert "\033[31mfailure\033[0m  \033[1mkernel\033[0m " in seen
    plain = on_a_terminal("check", "--config", path, NO_COLOR="1")
    assert "\033" not in plain
    assert plain == re.sub(r"\033\[\d+m", "", seen)
    column = plain.index("/does/not/exist") - plain.rindex("\n", 0, plain.index("/does/not/exist")) - 1
    for line in plain.splitlines():
        assert len(line) <= 80 or " " not in line[column:]
        assert line[column - 2 : column] == "  "
        assert line[column] != " "
    assert "\033" not in on_a_terminal("check", "--config", path, TERM="dumb")


def test_check_without_a_configuration_still_looks_at_the_host() -> None:
    result = kata_py("check", "--config", "/does/not/exist")
    assert result.returncode == 1
    assert result.stdout.count("configuration: ") == 1
    assert "failure: configuration: configuration file /does/not/exist" in result.stdout
    assert ": QEMU: " in result.stdout
    assert ": kernel: " not in result.stdout


def test_check_lists_the_keys_one_by_one(write_config: WriteConfig) -> None:
    path = write_config(
        hypervisor__qemu={"defualt_vcpus": 1, "rootless": True, "default_memory": 7}, runtime={"xyzzy": 1}
    )
    found = findings(path)["configuration"]
    assert [(finding.status, finding.found) for finding in found] == [
        (Status.OK, str(path)),
        (Status.WARNING, "unknown: [hypervisor.qemu] defualt_vcpus (nearest: default_vcpus)"),
        (Status.WARNING, "unknown: [runtime] xyzzy"),
        (Status.WARNING, "without effect: [hypervisor.qemu] rootless = true"),
        (
            Status.WARNING,
            f"{path}: [hypervisor.qemu] default_memory: found 7, below 256 MiB; 2048 is taken, as in Kata",
        ),
    ]


def test_check_wants_a_kernel_that_can_share_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    uname = os.uname()

    def status(release: str) -> Status:
        there = os.uname_result((uname.sysname, uname.nodename, release, uname.version, uname.machine))
        monkeypatch.setattr(os, "uname", lambda: there)
        (finding,) = findings(None)["Linux"]
        assert finding.found.startswith(release)
        return finding.status

    for release in ("5.14.0-427.el9.x86_64", "6.1.0-56-amd64", "7.0-rc1"):
        assert status(release) is Status.OK
    for release in ("5.13.19-2-pve", "4.18.0-553.el8.x86_64"):
        assert status(release) is Status.FAILURE


@pytest.mark.parametrize(
    ("line", "status", "found"),
    [
        ("QEMU emulator version 7.2.19 (Debian 1:7.2)", Status.OK, " 7.2.19"),
        ("QEMU emulator version 11.0.50 (v11)", Status.OK, " 11.0.50"),
        ("QEMU emulator version 6.2.0", Status.WARNING, " 6.2.0"),
        ("hello", Status.FAILURE, " does not tell its version"),
    ],
)
def test_check_asks_qemu_for_its_version(
    write_config: WriteConfig, program: Callable[..., Path], line: str, status: Status, found: str
) -> None:
    path = program("qemu", line)
    (finding,) = findings(write_config(hypervisor__qemu={"path": str(path)}))["QEMU"]
    assert (finding.status, finding.found) == (status, f"{path}{found}")
    assert bool(finding.way_out) is (status is not Status.OK)


def test_check_without_qemu(write_config: WriteConfig, tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    config = write_config(hypervisor__qemu={"path": str(path)})
    (finding,) = findings(config)["QEMU"]
    assert (finding.status, finding.found) == (Status.FAILURE, f"{path} does not exist")
    path.touch()
    (finding,) = findings(config)["QEMU"]
    assert (finding.status, finding.found) == (Status.FAILURE, f"{path} is not executable")


def test_check_looks_at_the_guests_files(write_config: WriteConfig, tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(b"x" * (3 << 19))
    initrd.touch()
    found = findings(write_config(hypervisor__qemu={"kernel": str(kernel), "initrd": str(initrd)}))
    assert (found["kernel"][0].status, found["kernel"][0].found) == (Status.OK, f"{kernel} (1.5 MiB)")
    assert (found["initrd"][0].status, found["initrd"][0].found) == (Status.FAILURE, f"{initrd} is empty")
    assert "image" not in found


def test_check_wants_virtiofsd_where_it_is_used(
    write_config: WriteConfig, program: Callable[..., Path]
) -> None:
    daemon = program("virtiofsd", "virtiofsd 1.13.0")
    (finding,) = findings(write_config(hypervisor__qemu={"virtio_fs_daemon": str(daemon)}))["virtiofsd"]
    assert (finding.status, finding.found) == (Status.OK, f"{daemon} 1.13.0")
    (finding,) = findings(write_config(hypervisor__qemu={"virtio_fs_daemon": "/none"}))["virtiofsd"]
    assert finding.status is Status.FAILURE
    assert "/none" in finding.found
    assert "virtiofsd" not in findings(write_config(hypervisor__qemu={"shared_fs": "virtio-9p"}))


def test_check_says_why_it_would_emulate(write_config: WriteConfig) -> None:
    accelerated = findings(write_config(hypervisor__qemu={"machine_accelerators": "accel=tcg"}))
    assert accelerated["acceleration"] == [Finding("acceleration", Status.OK, "tcg: tcg is configured")]
    (finding,) = findings(write_config())["acceleration"]
    assert re.match(r"(kvm|tcg, which is slow): \S", finding.found)


def test_check_wants_the_vsock_that_is_configured(write_config: WriteConfig) -> None:
    has_vsock = os.access("/dev/vhost-vsock", os.R_OK | os.W_OK)

    def status(transport: str) -> Status:
        return findings(write_config(agent__kata={"transport": transport}))["vsock"][0].status

    assert status("serial") is Status.OK
    assert status("auto") is (Status.OK if has_vsock else Status.WARNING)
    assert status("vsock") is (Status.OK if has_vsock else Status.FAILURE)


def test_containerd_finds_the_shim_on_its_path_or_beside_itself(
    program: Callable[..., Path], tmp_path: Path
) -> None:
    daemon = program("sbin/containerd", "containerd github.com/containerd/containerd v2.1.4 75cb2b7")
    somewhere = containerd.Containerd(1, daemon, f"/usr/bin:{tmp_path}/bin")
    assert somewhere.find_shim() is None
    assert somewhere.version() == "2.1.4"
    shim = program(f"bin/{containerd.SHIM}", "")
    assert somewhere.find_shim() == shim
    shim.rename(tmp_path / "sbin" / containerd.SHIM)
    assert somewhere.find_shim() == tmp_path / "sbin" / containerd.SHIM


def test_a_containerd_that_runs_is_found_with_its_path(tmp_path: Path) -> None:
    """By the name that the kernel has for it, as the real one is."""
    double = tmp_path / "containerd"
    double.symlink_to("/bin/sleep")
    process = subprocess.Popen([double, "60"], env={"PATH": "/of/containerd"})
    try:
        # Popen returns in the middle of execve(2): name and environment may come a moment later.
        while not Path(f"/proc/{process.pid}/environ").read_bytes():
            time.sleep(0.01)
        (found,) = [each for each in containerd.find_containerds() if each.pid == process.pid]
        assert found.path == "/of/containerd"
        assert found.program == Path("/bin/sleep").resolve()
    finally:
        process.kill()
        process.wait()


def test_processes_of_any_name_are_no_containerds(tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.symlink_to("/bin/sleep")
    with subprocess.Popen([odd, "60"]) as process:
        try:
            while Path(f"/proc/{process.pid}/comm").read_bytes() != b"\xff\n":
                time.sleep(0.01)
            assert process.pid not in {each.pid for each in containerd.find_containerds()}
        finally:
            process.kill()


def test_a_shim_that_containerd_does_not_find_is_a_failure_with_the_way_out(
    program: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    daemon = program("sbin/containerd", "containerd x 1.7.24 y")

    def examine(path: str, pid: int = 7) -> list[tuple[str, Status, str]]:
        monkeypatch.setattr(
            containerd, "find_containerds", lambda: [containerd.Containerd(pid, daemon, path)]
        )
        found = findings(None)
        return [(f.name, f.status, f.found + f.way_out) for f in found["containerd"] + found["shim"]]

    (_, status, text), (_, shim_status, shim_text) = examine(f"{tmp_path}/bin")
    assert (status, text) == (Status.OK, f"{daemon} 1.7.24, pid 7")
    assert shim_status is Status.FAILURE
    assert f"not on the PATH for containerd, pid 7: {tmp_path}/bin" in shim_text
    assert "link it into one of these directories: " in shim_text
    assert examine("")[1][1] is Status.WARNING
    shim = program(f"bin/{containerd.SHIM}", "version", status=1)
    assert examine(f"{tmp_path}/bin")[1][1] is Status.FAILURE
    program(f"bin/{containerd.SHIM}", "version")
    assert examine(f"{tmp_path}/bin")[1] == ("shim", Status.OK, f"{shim} for containerd, pid 7")
    _, status, text = examine(f"{tmp_path}/bin", pid=0)[0]
    assert status is Status.WARNING
    assert "not running" in text


# -- env


def test_env_as_json(write_config: WriteConfig, tmp_path: Path) -> None:
    (tmp_path / "config.d").mkdir()
    (tmp_path / "config.d/1.toml").write_text('[agent.kata]\ntransport = "serial"\n')
    path = write_config(hypervisor__qemu={"shared_fs": "virtio-9p", "typo": 1})
    result = kata_py("env", "--json", "--config", path)
    assert result.returncode == 0
    found: dict[str, Any] = json.loads(result.stdout)
    assert list(found) == [
        "kata-py", "configuration", "hypervisor", "agent", "factory", "runtime", "host", "containerd",
    ]  # fmt: skip
    assert found["kata-py"]["version"] == __version__
    assert found["configuration"]["path"] == str(path)
    assert found["configuration"]["drop_ins"] == [f"{tmp_path}/config.d/1.toml"]
    assert "typo" in found["configuration"]["warnings"][0]
    assert found["hypervisor"]["shared_fs"] == "virtio-9p"
    assert found["hypervisor"]["default_memory_mib"] == 256
    assert found["hypervisor"]["kernel"] == "/k"
    assert found["agent"]["transport"] == found["host"]["transport"] == "serial"
    assert found["host"]["cpus"] == os.cpu_count()
    assert found["host"]["accel"] in ("kvm", "tcg")


def test_env_as_text(write_config: WriteConfig) -> None:
    path = write_config()
    text = kata_py("env", "--config", path).stdout
    assert f'\n[configuration]\npath = "{path}"\n' in text
    assert "\ndefault_memory_mib = 256\n" in text
    seen = on_a_terminal("env", "--config", path)
    assert "\033[1mhypervisor\033[0m" in seen
    plain = on_a_terminal("env", "--config", path, NO_COLOR="1")
    assert re.search(r"^  default_memory_mib +256$", plain, re.MULTILINE)
    columns = {len(m[0]) for m in re.finditer(r"^  (kernel|initrd|shared_fs) +", plain, re.MULTILINE)}
    assert len(columns) <= 2  # one for the hypervisor, one for the host's kernel


def test_env_of_a_bad_configuration_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "configuration.toml"
    path.write_text("[runtime]\nenable_debug = 1\n")
    result = kata_py("env", "--config", path)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"kata-py: {path}: [runtime] enable_debug: found 1, expected true or false\n"


def test_a_reader_that_has_seen_enough_is_no_traceback(write_config: WriteConfig) -> None:
    command = f"{sys.executable} -m katautils.cli.main env --config {write_config()} | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert result.stdout == "[kata-py]\n"
    assert result.stderr == ""


@pytest.mark.parametrize("command", ["env", "version", "--help"])
def test_a_reader_that_sees_nothing_is_no_traceback(write_config: WriteConfig, command: str) -> None:
    arguments = [command, "--config", str(write_config())] if command == "env" else [command]
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "katautils.cli.main", *arguments],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    finally:
        os.close(write)
    assert (result.returncode, result.stderr) == (1, "")
