"""virtiofsd, in both its flavours: the C one that QEMU brought up to 7.2, and the Rust one since."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from virtcontainers.config import HypervisorConfig
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.hypervisor.base import HypervisorError

DAEMONS = (
    Path("/usr/libexec/virtiofsd"),
    Path("/usr/lib/qemu/virtiofsd"),
    Path("/usr/libexec/kata-py/virtiofsd"),
)
_CACHE_MODES = ("auto", "always", "metadata", "never")
_VERSION_TIMEOUT_S = 10.0

# What Kata's configuration files pass to the Rust daemon, in the words of the C one.
_C_ARGUMENTS = {
    "--announce-submounts": ("-o", "announce_submounts"),
    "--xattr": ("-o", "xattr"),
    "--posix-acl": ("-o", "posix_acl"),
    "--writeback": ("-o", "writeback"),
    "--no-readdirplus": ("-o", "no_readdirplus"),
    "--allow-direct-io": ("-o", "allow_direct_io"),
}


class Flavour(Enum):
    C = "C"
    RUST = "Rust"


@dataclass(frozen=True, kw_only=True)
class Virtiofsd:
    """One daemon that exports one directory. The listening socket is passed to it, so that QEMU can connect
    before it is up."""

    path: Path
    flavour: Flavour
    shared_path: Path
    cache: str = "auto"
    extra_args: tuple[str, ...] = ()

    def argv(self, socket_fd: int) -> list[str]:
        if self.flavour is Flavour.RUST:
            arguments = [
                f"--shared-dir={self.shared_path}",
                f"--cache={self.cache}",
                "--log-level=warn",
                *self.extra_args,
            ]
        else:
            cache = {"never": "none", "metadata": "none"}.get(self.cache, self.cache)
            arguments = [
                "-f",
                *("-o", f"source={self.shared_path}"),
                *("-o", f"cache={cache}"),
                *("-o", "log_level=warn"),
                *_in_c(self.extra_args),
            ]
        return [str(self.path), f"--fd={socket_fd}", *arguments]


def find_virtiofsd(config: HypervisorConfig, candidates: Sequence[Path] = DAEMONS) -> Path:
    """The configured daemon, or the first there is. Raises InvalidArgumentError with the way out."""
    if config.virtio_fs_cache not in _CACHE_MODES:
        raise InvalidArgumentError(
            f'virtio_fs_cache "{config.virtio_fs_cache}": expected one of {", ".join(_CACHE_MODES)}'
        )
    if config.virtio_fs_daemon is not None:
        if not config.virtio_fs_daemon.is_file():
            raise InvalidArgumentError(
                f"virtiofsd {config.virtio_fs_daemon} (virtio_fs_daemon) does not exist: install it, or set "
                'shared_fs = "virtio-9p"'
            )
        return config.virtio_fs_daemon
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InvalidArgumentError(
        'shared_fs = "virtio-fs" needs virtiofsd, and none of '
        f"{', '.join(map(str, candidates))} exists: install it, set virtio_fs_daemon, or set "
        'shared_fs = "virtio-9p"'
    )


def detect_flavour(path: Path) -> Flavour:
    """By asking its version. Raises HypervisorError when it cannot be run."""
    try:
        result = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_VERSION_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise HypervisorError(f"virtiofsd {path}: {error}") from error
    # "virtiofsd version 7.2.0 ..." is the C one's, "virtiofsd 1.10.0" the Rust one's.
    return Flavour.C if "virtiofsd version" in result.stdout + result.stderr else Flavour.RUST


def _in_c(arguments: Sequence[str]) -> list[str]:
    translated: list[str] = []
    for argument in arguments:
        translated += _C_ARGUMENTS.get(argument, (argument,))
    return translated
