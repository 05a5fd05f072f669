"""virtiofsd, in both its flavours: the C one that QEMU brought up to 7.2, and the Rust one since."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from virtcontainers.config import HypervisorConfig
from virtcontainers.errors import InvalidArgumentError
from virtcontainers.hypervisor import capabilities
from virtcontainers.hypervisor.base import HypervisorError
from virtcontainers.hypervisor.capabilities import Capability

DAEMONS = (
    Path("/usr/libexec/virtiofsd"),
    Path("/usr/lib/qemu/virtiofsd"),
    Path("/usr/libexec/kata-py/virtiofsd"),
)
_CACHE_MODES = ("auto", "always", "metadata", "never")
_VERSION_TIMEOUT_S = 30.0

# Of the Rust daemon's options, `_` for `-`, those that the C one has as words after -o.
_C_OPTIONS = frozenset((
    "allow_direct_io", "announce_submounts", "killpriv_v2", "log_level", "modcaps", "no_killpriv_v2",
    "no_readdirplus", "posix_acl", "sandbox", "security_label", "writeback", "xattr", "xattrmap",
))  # fmt: skip
_C_WORDS = {
    "log_level=error": "log_level=err",
    "log_level=off": "log_level=err",
    "log_level=trace": "log_level=debug",
    "posix_acl=always": "posix_acl",
    "posix_acl=auto": "posix_acl",
    "posix_acl=never": "no_posix_acl",
    "security_label=always": "security_label",
    "security_label=auto": "security_label",
    "security_label=never": "no_security_label",
}
"""Where the two differ in more than that."""
_NOT_IN_C = ("inode_file_handles", "no_announce_submounts", "preserve_noatime", "seccomp")
"""It has no file handles, announces nothing unasked, and always has its seccomp filter, which kills."""
_WITH_VALUE = ("inode_file_handles", "log_level", "modcaps", "sandbox", "seccomp", "xattrmap")
"""Their value may be the next argument."""

_OURS = ("fd", "shared_dir", "socket", "socket_group", "socket_path", "source", "tag")
_NO_DAEMON = ("daemonize", "help", "h", "print_capabilities", "version", "V")
_SANDBOX = ("allow_root", "inode_file_handles", "modcaps", "rlimit_nofile", "sandbox", "seccomp")


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
        """In its sandbox: namespaces of its own with nothing in them but the share, and a seccomp filter."""
        if self.flavour is Flavour.RUST:
            # It takes each option only once.
            given = {name for _, name in options(self.extra_args)}
            defaults = {
                "sandbox": "--sandbox=namespace",
                "seccomp": "--seccomp=kill",
                # With handles it would have CAP_DAC_READ_SEARCH, and with that all of each file system of
                # which it shares something.
                "inode_file_handles": "--inode-file-handles=never",
                "log_level": "--log-level=warn",
            }
            arguments = [
                f"--shared-dir={self.shared_path}",
                f"--cache={self.cache}",
                *(argument for name, argument in defaults.items() if name not in given),
                *self.extra_args,
            ]
        else:
            cache = {"never": "none", "metadata": "none"}.get(self.cache, self.cache)
            arguments = [
                "-f",
                *("-o", f"source={self.shared_path}"),
                *("-o", f"cache={cache}"),
                *("-o", "sandbox=namespace"),
                *("-o", "log_level=warn"),
                *_in_c(self.extra_args),
            ]
        return [str(self.path), f"--fd={socket_fd}", *arguments]

    @property
    def capabilities(self) -> frozenset[Capability] | None:
        """What it needs at its start; None: who knows."""
        given = {name for _, name in options(self.extra_args)}
        if "modcaps" in given:
            return None
        more = {"sandbox": Capability.SYS_CHROOT, "inode_file_handles": Capability.DAC_READ_SEARCH}
        return capabilities.VIRTIOFSD | {more[name] for name in given & more.keys()}


def find_virtiofsd(config: HypervisorConfig, candidates: Sequence[Path] = DAEMONS) -> Path:
    """The configured daemon, or the first there is. Raises InvalidArgumentError with the way out."""
    if config.virtio_fs_cache not in _CACHE_MODES:
        raise InvalidArgumentError(
            f'virtio_fs_cache "{config.virtio_fs_cache}": expected one of {", ".join(_CACHE_MODES)}'
        )
    for written, name in options(config.virtio_fs_extra_args):
        if name in (*_OURS, *_NO_DAEMON, "cache"):
            expected = "it in virtio_fs_cache" if name == "cache" else "nothing of what is shared with whom"
            if name in _NO_DAEMON:
                expected = "arguments of a daemon in the foreground"
            raise InvalidArgumentError(f"virtio_fs_extra_args: found {written}, expected {expected}")
    if config.virtio_fs_daemon is not None:
        if not config.virtio_fs_daemon.is_file():
            raise InvalidArgumentError(
                f"virtiofsd {config.virtio_fs_daemon} (virtio_fs_daemon) does not exist: install it, or set "
                'shared_fs = "virtio-9p"'
            )
        if not os.access(config.virtio_fs_daemon, os.X_OK):
            raise InvalidArgumentError(
                f"virtiofsd {config.virtio_fs_daemon} (virtio_fs_daemon) is not executable"
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


def options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each as written, and its name alone: `sandbox` of `--sandbox=chroot` as of `-o sandbox=chroot`."""
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--"):
            yield argument, argument[2:].partition("=")[0].replace("-", "_")
        elif argument.startswith("-o"):
            for word in (argument[2:] or next(rest, "")).split(","):
                yield f"-o {word}", word.partition("=")[0]
        elif argument.startswith("-"):
            yield argument, argument[1:2]


def weakening(arguments: Sequence[str]) -> str:
    """The first of the arguments that changes the daemon's sandbox, which is not a pod's to do; "": none."""
    return next((written for written, name in options(arguments) if name in _SANDBOX), "")


def _in_c(arguments: Sequence[str]) -> list[str]:
    translated: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, has_value, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or name not in (*_C_OPTIONS, *_NOT_IN_C):
            translated.append(argument)
            continue
        if not has_value and name in _WITH_VALUE:
            value = next(rest, "")
        if name not in _NOT_IN_C:
            word = f"{name}={value}" if value else name
            translated += "-o", _C_WORDS.get(word, word)
    return translated
