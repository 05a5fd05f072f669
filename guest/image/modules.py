"""Kernel modules: which ones, in which order, and the index files that modprobe reads."""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from guest.image import elf

# Every machine needs these before it can hear anything: the bus, and both ways the host may talk to the
# agent.
BOOT = ("virtio_pci", "virtio_console", "vmw_vsock_virtio_transport")

# Loaded by name, by the agent or by the kernel through /sbin/modprobe. The kernel must have them.
REQUIRED = (
    "9p",
    "9pnet_virtio",
    "virtiofs",
    "overlay",
    "ext4",
    "xfs",
    "loop",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "virtio_net",
    "veth",
    "virtio_balloon",
)

# Taken where the kernel has them.
OPTIONAL = (
    "virtio_mem",
    "virtio_rng",
    "vmgenid",
    "vfat",
    "nls_ascii",
    "nls_cp437",
    "nls_utf8",
    "isofs",
    "squashfs",
    "erofs",
    "dummy",
    "tun",
    "bridge",
    "macvlan",
    "ipvlan",
    "af_packet",
    "ipv6",
    "crc32c_generic",
    "crc32c_intel",
    "ip_tables",
    "iptable_filter",
    "iptable_mangle",
    "iptable_nat",
    "iptable_raw",
    "ip6_tables",
    "ip6table_filter",
    "ip6table_mangle",
    "ip6table_nat",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
    "nft_ct",
    "nft_limit",
    "nft_masq",
    "nft_nat",
    "nft_reject_inet",
    "nf_conntrack",
    "xt_addrtype",
    "xt_comment",
    "xt_connmark",
    "xt_conntrack",
    "xt_limit",
    "xt_LOG",
    "xt_mark",
    "xt_MASQUERADE",
    "xt_multiport",
    "xt_nat",
    "xt_owner",
    "xt_REDIRECT",
    "xt_state",
    "xt_statistic",
    "xt_tcpudp",
    "ipt_REJECT",
    "ip6t_REJECT",
)


class ModuleError(Exception):
    """A module that must be there is not, or its file cannot be read."""


@dataclass(frozen=True)
class Module:
    path: str  # below /lib/modules/RELEASE, without the compression's suffix: kernel/fs/9p/9p.ko
    data: bytes
    depends: tuple[str, ...]
    soft_depends: tuple[str, ...]
    aliases: tuple[str, ...]

    @property
    def name(self) -> str:
        return module_name(self.path)


def module_name(path: str) -> str:
    """As the kernel spells it: no directory, no suffix, no dash."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


class Tree:
    """The modules of one kernel, as its packages bring them."""

    def __init__(self, directory: Path, *, decompress_zstd: Callable[[bytes], bytes]) -> None:
        """`directory` is .../lib/modules/RELEASE."""
        self.directory = directory
        self.decompress_zstd = decompress_zstd
        files = sorted(path for path in directory.rglob("*.ko*") if path.is_file())
        self.files = {module_name(path.name): path for path in files}
        builtin = directory / "modules.builtin"
        self.builtin = (
            {module_name(line) for line in builtin.read_text().split()} if builtin.exists() else set()
        )

    def load(self, name: str) -> Module:
        path = self.files[name]
        relative = path.relative_to(self.directory).as_posix()
        match path.suffix:
            case ".ko":
                data = path.read_bytes()
            case ".xz":
                data = lzma.decompress(path.read_bytes())
            case ".zst":
                data = self.decompress_zstd(path.read_bytes())
            case suffix:
                raise ModuleError(f"{relative}: compressed with {suffix}, expected .xz, .zst or nothing")
        try:
            information = elf.module_information(data)
        except elf.ElfError as error:
            raise ModuleError(f"{relative}: {error}") from error
        depends = [one for value in information.get("depends", ()) for one in value.split(",") if one]
        soft = [
            one
            for value in information.get("softdep", ())
            for one in value.split()
            if one not in ("pre:", "post:")
        ]
        return Module(
            path=relative.partition(".ko")[0] + ".ko",
            data=data,
            depends=tuple(module_name(one) for one in depends),
            soft_depends=tuple(module_name(one) for one in soft),
            aliases=tuple(information.get("alias", ())),
        )


def closure(tree: Tree, required: Iterable[str], optional: Iterable[str]) -> dict[str, Module]:
    """The modules and all they depend on, softly too, by name. What is built into the kernel is left out.

    ModuleError when a required module, or a hard dependency of any, is neither a file nor built in.
    """
    found: dict[str, Module] = {}
    waiting = [(name, "") for name in required] + [(name, None) for name in optional]
    while waiting:
        name, user = waiting.pop(0)
        if name in found or name in tree.builtin:
            continue
        if name not in tree.files:
            if user is None:
                continue
            by = f", which {user} depends on" if user else ""
            raise ModuleError(f"the kernel in {tree.directory} has no module {name}{by}")
        module = found[name] = tree.load(name)
        waiting += [(other, name) for other in module.depends]
        waiting += [(other, None) for other in module.soft_depends]
    return dict(sorted(found.items()))


def load_order(modules: dict[str, Module], names: Iterable[str]) -> list[Module]:
    """The named modules with all they depend on, each after what it depends on. Names that are not among the
    modules are built in."""
    ordered: dict[str, Module] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in ordered or name not in modules:
            return
        if name in path:
            raise ModuleError(f"modules depend on each other: {' -> '.join((*path, name))}")
        for other in modules[name].depends:
            visit(other, (*path, name))
        ordered[name] = modules[name]

    for name in names:
        visit(name, ())
    return list(ordered.values())


def index_dependencies(modules: dict[str, Module]) -> str:
    """modules.dep as kmod writes it: `path: dependencies`, the ones to load first standing last."""
    lines = []
    for name, module in sorted(modules.items()):
        dependencies = [other.path for other in reversed(load_order(modules, [name])[:-1])]
        lines.append(" ".join([module.path + ":", *dependencies]))
    return "".join(line + "\n" for line in lines)


def index_aliases(modules: dict[str, Module]) -> str:
    """modules.alias: by these names the kernel asks for a module when it needs one."""
    return "".join(
        f"alias {alias} {name}\n" for name, module in sorted(modules.items()) for alias in module.aliases
    )
