from pathlib import Path

import pytest

from virtcontainers.config import HypervisorConfig
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.hypervisor.virtiofsd import Flavour, Virtiofsd, detect_flavour, find_virtiofsd

KATA_EXTRA_ARGS = ("--thread-pool-size=1", "--announce-submounts")


def daemon(flavour: Flavour, cache: str = "auto", extra_args: tuple[str, ...] = KATA_EXTRA_ARGS) -> list[str]:
    virtiofsd = Virtiofsd(
        path=Path("/d"), flavour=flavour, shared_path=Path("/s"), cache=cache, extra_args=extra_args
    )
    return virtiofsd.argv(7)


def test_the_rust_daemon_gets_long_options() -> None:
    assert daemon(Flavour.RUST) == [
        *("/d", "--fd=7", "--shared-dir=/s", "--cache=auto", "--sandbox=namespace", "--seccomp=kill"),
        *("--inode-file-handles=never", "--log-level=warn", *KATA_EXTRA_ARGS),
    ]


def test_the_rust_daemon_gets_no_option_twice() -> None:
    given = (
        "--sandbox",
        "chroot",
        "--inode-file-handles=prefer",
        "-o",
        "xattr,seccomp=kill",
        "--log-level=debug",
    )
    assert daemon(Flavour.RUST, extra_args=given) == [
        "/d",
        "--fd=7",
        "--shared-dir=/s",
        "--cache=auto",
        *given,
    ]


def test_the_c_daemon_gets_the_same_in_its_words() -> None:
    argv = " ".join(daemon(Flavour.C))
    assert argv.startswith("/d --fd=7 -f -o source=/s -o cache=auto -o sandbox=namespace -o log_level=warn")
    assert argv.endswith("--thread-pool-size=1 -o announce_submounts")


@pytest.mark.parametrize(
    ("rust", "in_c"),
    [
        (["--xattr"], "-o xattr"),
        (["--xattrmap", ":map::user.virtiofs.:"], "-o xattrmap=:map::user.virtiofs.:"),
        (["--xattrmap=:map::a=b.:"], "-o xattrmap=:map::a=b.:"),
        (["--sandbox=chroot"], "-o sandbox=chroot"),
        (["--posix-acl"], "-o posix_acl"),
        (["--posix-acl=always"], "-o posix_acl"),
        (["--log-level", "error"], "-o log_level=err"),
        (["--no-announce-submounts", "--seccomp", "log", "--inode-file-handles=never"], ""),
        (["--rlimit-nofile=5000"], "--rlimit-nofile=5000"),
        (["-o", "xattr", "-d"], "-o xattr -d"),
    ],
)
def test_options_of_the_rust_daemon_in_the_c_ones_words(rust: list[str], in_c: str) -> None:
    argv = " ".join(daemon(Flavour.C, extra_args=tuple(rust)))
    assert argv.partition("-o log_level=warn")[2].strip() == in_c


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--shared-dir=/",), "--shared-dir=/"),
        (("--shared-dir", "/"), "--shared-dir"),
        (("-o", "xattr,source=/"), "-o source=/"),
        (("-osource=/",), "-o source=/"),
        (("--fd=3",), "--fd=3"),
        (("--socket-path=/s",), "--socket-path=/s"),
        (("--cache=always",), "--cache=always, expected it in virtio_fs_cache"),
        (("-o", "cache=always"), "-o cache=always, expected it in virtio_fs_cache"),
        (("--daemonize",), "--daemonize"),
        (("-V",), "-V"),
    ],
)
def test_what_is_shared_with_whom_is_not_an_argument(
    tmp_path: Path, arguments: tuple[str, ...], found: str
) -> None:
    (tmp_path / "a").touch()
    config = HypervisorConfig(virtio_fs_extra_args=arguments)
    with pytest.raises(InvalidArgumentError, match=f"virtio_fs_extra_args: found {found}"):
        find_virtiofsd(config, [tmp_path / "a"])


@pytest.mark.parametrize(("cache", "in_c"), [("never", "none"), ("metadata", "none"), ("always", "always")])
def test_cache_modes_the_c_daemon_does_not_have(cache: str, in_c: str) -> None:
    assert f"cache={in_c}" in daemon(Flavour.C, cache)


@pytest.mark.parametrize(
    ("version", "flavour"),
    [("virtiofsd version 7.2.22 (Debian 1:7.2)", Flavour.C), ("virtiofsd 1.13.2", Flavour.RUST)],
)
def test_the_flavour_is_told_by_the_version(tmp_path: Path, version: str, flavour: Flavour) -> None:
    program = tmp_path / "virtiofsd"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    assert detect_flavour(program) is flavour


def test_the_first_daemon_there_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b").touch()
    candidates = [tmp_path / "a", tmp_path / "b"]
    assert find_virtiofsd(HypervisorConfig(), candidates) == tmp_path / "b"


def test_no_daemon_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"install it.*virtio-9p"):
        find_virtiofsd(HypervisorConfig(), [tmp_path / "a"])


def test_a_configured_daemon_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"/a \(virtio_fs_daemon\) does not exist"):
        find_virtiofsd(HypervisorConfig(virtio_fs_daemon=tmp_path / "a"))


def test_a_configured_daemon_must_be_a_program(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(InvalidArgumentError, match=r"/a \(virtio_fs_daemon\) is not executable"):
        find_virtiofsd(HypervisorConfig(virtio_fs_daemon=tmp_path / "a"))


def test_an_unknown_cache_mode_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match='virtio_fs_cache "sometimes": expected one of auto'):
        find_virtiofsd(HypervisorConfig(virtio_fs_cache="sometimes"))
