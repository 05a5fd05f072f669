"""`python -m guest.image.build --output DIR`: the guest's kernel and initrd. See guest.image for what is in
them."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from guest.image import apt, cpio, elf, kernel, modules, python
from guest.image.progress import Progress

DEFAULT_CACHE = Path("/var/cache/kata-py/guest")
_KEPT_IMAGES = 4

# The generic kernels; Debian's cloud kernel has neither 9p nor virtio-fs.
_KERNELS = ("linux-image-amd64", "linux-image-generic")
_ROOTS = (
    "busybox-static",
    "crun",
    "iptables",
    "libc6",
    "libgcc-s1",
    "libpython3-stdlib",
    "lz4",
    "python3-minimal",
    "zstd",
)
_FOLLOWED = re.compile(r"linux-(image|modules|binary)-.*|(lib)?python3\.\d+-(minimal|stdlib)")

LIBRARIES = "/usr/lib/x86_64-linux-gnu"
_LIBRARY_DIRECTORIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
# The C library opens it by name when a thread is cancelled; no NEEDED entry says so.
_OPENED_LIBRARIES = ("libgcc_s.so.1",)

# What rules can be told in: what the image has modules for, and what needs none.
_IPTABLES_EXTENSIONS = re.compile(
    r"libxt_(addrtype|comment|connmark|CONNMARK|conntrack|DNAT|limit|LOG|mark|MARK|MASQUERADE|multiport|NAT|owner"
    r"|REDIRECT|SNAT|standard|state|statistic|tcp|udp)\.so|libipt_(icmp|REJECT)\.so|libip6t_(icmp6|REJECT)\.so"
)
_IPTABLES = ("iptables", "iptables-save", "iptables-restore")

BUNDLE = "/usr/lib/kata-py/bundle"
IMPORTER = "kata_importer"

# Little is garbage while modules are imported, and looking for it takes its time. The threshold stays: what
# the agent drops later seldom has cycles.
_INIT = """#!{interpreter} -ISB
import gc
gc.set_threshold(50_000)
import {importer}
{importer}.install("{bundle}")
from guest.agent.main import main
main()
"""

BuildError = (apt.AptError, elf.ElfError, kernel.KernelError, modules.ModuleError, python.PythonError)


def _followed(package: apt.Package) -> bool:
    return package.section == "libs" or _FOLLOWED.fullmatch(package.name) is not None


def resolve_packages() -> list[apt.Package]:
    """All packages of the image, refreshing apt's lists when it has none."""
    for attempt in ("as it is", "updated"):
        found = next((name for name in _KERNELS if apt.known(name)), None)
        if found:
            return apt.resolve([found, *_ROOTS], _followed)
        if attempt == "as it is":
            apt.update()
    raise apt.AptError(
        f"apt knows none of the kernels {', '.join(_KERNELS)}: expected Debian or Ubuntu on amd64"
    )


def inputs(packages: Sequence[apt.Package]) -> dict[str, Any]:
    """Everything the image is made of, as JSON. Two equal inputs make equal images."""
    protobuf, extension = python.protobuf()
    return {
        "packages": {
            package.name: {"version": package.version, "sha256": package.sha256} for package in packages
        },
        "builder": _hash_files(sorted(Path(__file__).parent.glob("*.py"))),
        "sources": _hash_sources(python.own_sources()),
        "protobuf": _hash_sources([*protobuf, python.Source(extension, "google/_upb/_message")]),
    }


def key_of(made_of: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]


def _hash_files(paths: Sequence[Path]) -> str:
    return _hash_sources([python.Source(path, path.name) for path in paths])


def _hash_sources(sources: Sequence[python.Source]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(f"{source.module}\0{hashlib.sha256(source.path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


class Unpacked:
    """The packages' files, and the programs among them, which run without being installed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.libraries = [directory / name for name in _LIBRARY_DIRECTORIES]

    def one(self, *patterns: str) -> Path:
        for pattern in patterns:
            if found := sorted(self.directory.glob(pattern)):
                return found[-1]
        raise apt.AptError(
            f"none of the packages has a file {' or '.join(patterns)}: their layout is not known"
        )

    def command(self, program: Path) -> list[str]:
        """With the libraries and the dynamic linker of the tree, not those of the host."""
        linker = self.one(*(f"{name}/ld-linux-x86-64.so.2" for name in _LIBRARY_DIRECTORIES))
        return [str(linker), "--library-path", ":".join(map(str, self.libraries)), str(program)]

    def filter(self, program: str, *options: str, data: bytes) -> bytes:
        """What /usr/bin/`program` makes of the data."""
        command = [*self.command(self.directory / "usr/bin" / program), *options]
        result = subprocess.run(command, input=data, capture_output=True, check=False)
        if result.returncode:
            raise apt.AptError(f"{program} of the unpacked packages fails: {result.stderr.decode().strip()}")
        return result.stdout

    def decompress_zstd(self, data: bytes) -> bytes:
        return self.filter("zstd", "-dcq", data=data)


def build(packages: Sequence[apt.Package], store: Path, work: Path, progress: Progress) -> dict[str, Any]:
    """Writes work/vmlinuz and work/initrd.img from the fetched packages; returns what the manifest tells of
    them."""
    tree = Unpacked(work / "tree")
    with progress.step("unpacking packages"):
        for package in packages:
            progress.detail(package.name)
            apt.unpack([package], store, tree.directory)

    with progress.step("kernel and modules"):
        image = tree.one("boot/vmlinuz-*")
        release = image.name.removeprefix("vmlinuz-")
        elf_image = kernel.extract(image.read_bytes(), decompress_zstd=tree.decompress_zstd)
        if not kernel.has_pvh_entry(elf_image):
            raise kernel.KernelError(f"{image.name} has no PVH entry (CONFIG_PVH)")
        (work / "vmlinuz").write_bytes(elf_image)
        module_tree = modules.Tree(
            tree.one(f"lib/modules/{release}", f"usr/lib/modules/{release}"),
            decompress_zstd=tree.decompress_zstd,
        )
        wanted = modules.closure(module_tree, (*modules.BOOT, *modules.REQUIRED), modules.OPTIONAL)
        entries = list(module_entries(wanted, module_tree, release))

    with progress.step("programs and libraries"):
        interpreter = tree.one("usr/bin/python3.[0-9]*")
        library = f"/usr/lib/{interpreter.name}"
        stdlib = tree.directory / library[1:]
        protobuf, message = python.protobuf()
        programs = {
            f"/usr/bin/{interpreter.name}": interpreter,
            "/usr/bin/crun": tree.one("usr/bin/crun", "usr/sbin/crun"),
            "/usr/bin/busybox": tree.one("bin/busybox", "usr/bin/busybox"),
            f"{library}/google/_upb/_message.abi3.so": message,
        }
        iptables, links = iptables_files(tree)
        programs |= iptables
        entries += links
        programs |= {f"{library}/lib-dynload/{path.name}": path for path in python.extension_modules(stdlib)}
        entries += program_entries(programs, tree.libraries)

    with progress.step("bytecode"):
        empty = work / "empty.py"
        empty.touch()
        sources = [
            *python.standard_library(stdlib),
            *protobuf,
            # protobuf leaves these two without a file of their own.
            python.Source(empty, "google/__init__"),
            python.Source(empty, "google/_upb/__init__"),
            *python.own_sources(),
            python.Source(Path(__file__).with_name("importer.py"), IMPORTER),
        ]
        bytecode = python.compile_sources(tree.command(interpreter), sources, library, work / "bytecode")
        alone = {module: bytecode.pop(module) for module in (*python.STARTUP, IMPORTER)}
        entries += [cpio.file(f"{library}/{module}.pyc", data) for module, data in sorted(alone.items())]
        entries.append(cpio.file(BUNDLE, python.bundle(bytecode)))

    with progress.step("initrd"):
        entries += skeleton()
        init = _INIT.format(interpreter=f"/usr/bin/{interpreter.name}", importer=IMPORTER, bundle=BUNDLE)
        entries.append(cpio.file("/init", init.encode(), 0o755))
        # As fast to boot as an uncompressed one (zstd and gzip are not), and the machine touches less memory:
        # it holds both the archive and what comes out of it. -l is the format that the kernel reads.
        packed = tree.filter("lz4", "-l", "-9", "-c", data=cpio.pack(entries))
        # The zeros end the LZ4 stream, whatever comes after: another archive can be appended.
        (work / "initrd.img").write_bytes(packed + bytes(4 + -len(packed) % 4))
    shutil.rmtree(tree.directory)
    shutil.rmtree(work / "bytecode")
    empty.unlink()
    return {"kernel_release": release, "python": interpreter.name, "modules": sorted(wanted)}


def module_entries(
    wanted: dict[str, modules.Module], tree: modules.Tree, release: str
) -> Iterator[cpio.Entry]:
    directory = f"/usr/lib/modules/{release}"
    for module in wanted.values():
        yield cpio.file(f"{directory}/{module.path}", module.data)
    yield cpio.file(f"{directory}/modules.dep", modules.index_dependencies(wanted).encode())
    yield cpio.file(f"{directory}/modules.alias", modules.index_aliases(wanted).encode())
    yield cpio.file(
        f"{directory}/modules.builtin", "".join(f"{name}.ko\n" for name in sorted(tree.builtin)).encode()
    )
    boot = modules.load_order(wanted, modules.BOOT)
    yield cpio.file(
        "/etc/kata-py/modules", "".join(f"/lib/modules/{release}/{one.path}\n" for one in boot).encode()
    )


def iptables_files(tree: Unpacked) -> tuple[dict[str, Path], list[cpio.Entry]]:
    """The program, with nf_tables behind it, and its extensions; and the links to both.

    The kernel's part is loaded when it is first used.
    """
    files = {"/usr/sbin/xtables-nft-multi": tree.one("usr/sbin/xtables-nft-multi", "sbin/xtables-nft-multi")}
    links = [
        cpio.symlink(f"/usr/sbin/{name}", "xtables-nft-multi")
        for name in (*_IPTABLES, *(name.replace("ip", "ip6", 1) for name in _IPTABLES))
    ]
    directory = tree.one(*(f"{name}/xtables" for name in _LIBRARY_DIRECTORIES))
    for path in sorted(directory.iterdir()):
        if not _IPTABLES_EXTENSIONS.fullmatch(path.name):
            continue
        if path.is_symlink():
            links.append(cpio.symlink(f"{LIBRARIES}/xtables/{path.name}", str(path.readlink())))
        else:
            files[f"{LIBRARIES}/xtables/{path.name}"] = path
    return files, links


def program_entries(programs: dict[str, Path], libraries: Sequence[Path]) -> list[cpio.Entry]:
    """The programs and every library they need."""
    contents = {path: source.read_bytes() for path, source in programs.items()}
    found = elf.library_closure(contents, libraries, also=_OPENED_LIBRARIES)
    return [
        *(cpio.file(path, data, 0o755) for path, data in contents.items()),
        *(cpio.file(f"{LIBRARIES}/{name}", path.read_bytes(), 0o755) for name, path in found.items()),
    ]


def skeleton() -> list[cpio.Entry]:
    """Directories to mount on, links of a merged /usr, and the devices that must be there before devtmpfs
    is."""
    return [
        *(cpio.directory(path) for path in ("/dev", "/etc", "/proc", "/run", "/sys", "/var", "/mnt")),
        cpio.directory("/root", 0o700),
        cpio.directory("/tmp", 0o777 | stat.S_ISVTX),
        cpio.symlink("/var/run", "/run"),
        *(cpio.symlink(f"/{name}", f"usr/{name}") for name in ("bin", "lib", "lib64", "sbin")),
        cpio.symlink("/usr/lib64/ld-linux-x86-64.so.2", f"{LIBRARIES}/ld-linux-x86-64.so.2"),
        *(
            cpio.symlink(f"/usr/bin/{name}", "busybox")
            for name in ("sh", "cat", "ls", "mount", "ps", "dmesg")
        ),
        *(cpio.symlink(f"/usr/sbin/{name}", "../bin/busybox") for name in ("modprobe", "ip")),
        cpio.character_device("/dev/console", 5, 1),
        cpio.character_device("/dev/null", 1, 3, 0o666),
        # On a CPU without RDRAND the kernel has no random numbers yet, and Python turns to this one or dies.
        cpio.character_device("/dev/urandom", 1, 9, 0o666),
        cpio.file("/etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        cpio.file("/etc/group", b"root:x:0:\n"),
    ]


@contextlib.contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """One build in this cache at a time."""
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_FILES = ("vmlinuz", "initrd.img")


def is_whole(directory: Path, key: str) -> bool:
    """Whether `directory` holds the image of this key, undamaged."""
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        return bool(manifest["key"] == key) and all(
            _sha256(directory / name) == manifest["files"][name]["sha256"] for name in _FILES
        )
    except (OSError, ValueError, KeyError):
        return False


def make(cache: Path, progress: Progress) -> Path:
    """Directory in the cache with the image of this host's packages and our sources, built if need be."""
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache):
        for killed in cache.glob("build-*"):
            shutil.rmtree(killed)
        store = cache / "packages"
        store.mkdir(exist_ok=True)
        for lists in ("as they are", "updated"):
            with progress.step("packages' names and versions"):
                packages = resolve_packages()
            made_of = inputs(packages)
            key = key_of(made_of)
            image = cache / key
            if is_whole(image, key):
                os.utime(image / "manifest.json")
                progress.say(f"image {key} is in the cache")
                return image
            try:
                with progress.step(
                    f"fetching {sum(package.size for package in packages) >> 20} MiB of packages"
                ):
                    apt.fetch(packages, store, progress.detail)
                break
            except apt.AptError:
                # Old lists name packages that the mirrors have replaced.
                if lists == "updated":
                    raise
                with progress.step("updating apt's lists"):
                    apt.update()
        with tempfile.TemporaryDirectory(dir=cache, prefix="build-") as name:
            work = Path(name)
            facts = build(packages, store, work, progress)
            files = {
                file: {"size": (work / file).stat().st_size, "sha256": _sha256(work / file)}
                for file in _FILES
            }
            manifest = {"key": key, **facts, "files": files, "inputs": made_of}
            (work / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            work.chmod(0o755)
            shutil.rmtree(image, ignore_errors=True)
            work.rename(image)
            work.mkdir()  # for TemporaryDirectory to remove
        _forget_old(cache, packages)
    return image


def _forget_old(cache: Path, packages: Sequence[apt.Package]) -> None:
    """Leave the newest few images and the packages of the newest."""
    images = sorted(
        (path.parent for path in cache.glob("*/manifest.json")), key=lambda path: path.stat().st_mtime
    )
    for path in images[:-_KEPT_IMAGES]:
        shutil.rmtree(path)
    store = cache / "packages"
    kept = {apt.file_of(package, store) for package in packages}
    for path in store.glob("*.deb"):
        if path not in kept:
            path.unlink()


def install(image: Path, output: Path) -> None:
    """Copy the image to `output`, the manifest last: where it is whole, everything is. A machine that runs
    from the files that were there keeps them."""
    output.mkdir(parents=True, exist_ok=True)
    for name in (*_FILES, "manifest.json"):
        new = output / f".{name}.new"
        shutil.copyfile(image / name, new)
        new.replace(output / name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m guest.image.build",
        description="Build the guest's kernel and initrd from the packages of this host's distribution. "
        "Nothing is installed on the host.",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="gets vmlinuz, initrd.img, manifest.json"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=DEFAULT_CACHE,
        metavar="DIR",
        help="packages and images made before (%(default)s)",
    )
    options = parser.parse_args(arguments)
    progress = Progress()
    try:
        if platform.machine() != "x86_64":
            raise apt.AptError(f"the guest image is for x86_64, this host is {platform.machine()}")
        image = make(options.cache, progress)
        key = image.name
        if is_whole(options.output, key):
            progress.say(f"{options.output} is up to date")
        else:
            with progress.step(f"copying to {options.output}"):
                install(image, options.output)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'guest image'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
