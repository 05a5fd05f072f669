"""Packages of the distribution, fetched and unpacked without installing any of them.

Everything goes through apt with the host's configuration: its sources, keys and proxies (and $APT_CONFIG).
apt checks the signatures, and we check what it wrote against the hashes it had announced.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_DEPENDS = re.compile(r"^ [ |](?:Pre)?Depends: (?P<name>[a-z0-9][a-z0-9.+-]*)(?::any)?$")


class AptError(Exception):
    """apt could not name, fetch or unpack a package. The text says which, and what to do."""


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    section: str
    size: int
    sha256: str


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise AptError(f"{command[0]} is not on this host: expected Debian or Ubuntu") from error


def _complaints(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line[3:] for line in result.stderr.splitlines() if line.startswith("E: ")]
    return "; ".join(lines) or result.stderr.strip() or f"exit status {result.returncode}"


def update() -> None:
    """The lists of packages, anew."""
    result = _run(["apt-get", "update"])
    if result.returncode:
        raise AptError(
            f"apt-get update: {_complaints(result)}\nCheck the network and /etc/apt/sources.list*."
        )


def parse_dependencies(text: str) -> dict[str, list[str]]:
    """Output of `apt-cache depends --recurse`: package -> what it depends on. An alternative counts too."""
    graph: dict[str, list[str]] = {}
    dependencies: list[str] = []
    for line in text.splitlines():
        if line and line[0] not in " <":
            dependencies = graph.setdefault(line.strip(), [])
        elif match := _DEPENDS.match(line):
            dependencies.append(match["name"])
    return graph


def parse_packages(text: str) -> dict[str, Package]:
    """Output of `apt-cache show`: stanzas of `Field: value` with an empty line between them."""
    packages: dict[str, Package] = {}
    for stanza in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in stanza.splitlines() if re.match(r"[A-Za-z0-9-]+: ", line)
        )
        # A package that is installed but in no source any more has no hash, and cannot be fetched.
        if "SHA256" in fields:
            packages.setdefault(
                fields["Package"],
                Package(
                    name=fields["Package"],
                    version=fields["Version"],
                    section=fields.get("Section", "").rpartition("/")[2],
                    size=int(fields["Size"]),
                    sha256=fields["SHA256"],
                ),
            )
    return packages


def resolve(roots: Iterable[str], follow: Callable[[Package], bool]) -> list[Package]:
    """The packages `roots` in the versions that apt would install, with those dependencies, and theirs, that
    `follow` takes; sorted by name."""
    roots = list(roots)
    options = [
        f"--no-{kind}" for kind in ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    ]
    result = _run(["apt-cache", "depends", "--recurse", *options, *roots])
    graph = parse_dependencies(result.stdout)
    missing = [root for root in roots if root not in graph]
    if missing:
        raise AptError(
            f"apt knows no package {', '.join(missing)}\n"
            "Run `apt-get update`; on Ubuntu enable the component `universe`."
        )
    known = parse_packages(_run(["apt-cache", "show", "--no-all-versions", *graph]).stdout)
    chosen: dict[str, Package] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        package = known.get(name)
        if name in chosen or (name not in roots and (package is None or not follow(package))):
            continue
        if package is None:
            raise AptError(
                f"package {name} is in no source of apt, so it cannot be fetched\nRun `apt-get update`."
            )
        chosen[name] = package
        waiting += graph.get(name, ())
    return [chosen[name] for name in sorted(chosen)]


def known(name: str) -> bool:
    """Whether apt could fetch a package of this very name (a virtual one does not count)."""
    return bool(parse_packages(_run(["apt-cache", "show", "--no-all-versions", name]).stdout))


def file_of(package: Package, store: Path) -> Path:
    return store / f"{package.name}_{package.sha256[:16]}.deb"


def fetch(packages: Sequence[Package], store: Path, report: Callable[[str], None]) -> None:
    """Put the .deb files of the packages into `store`, where file_of() finds them; those there are kept.

    `report` hears now and then how far it is.
    """
    wanted = [package for package in packages if not file_of(package, store).exists()]
    if not wanted:
        return
    total = sum(package.size for package in wanted)
    with tempfile.TemporaryDirectory(dir=store, prefix="download-") as name:
        directory = Path(name)
        # As root apt would download as user _apt, who may not enter the cache.
        command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"]
        command += [f"{package.name}={package.version}" for package in wanted]
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(
                command, cwd=directory, env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            ) as process,
        ):
            try:
                while process.poll() is None:
                    done = sum(file.stat().st_size for file in directory.glob("**/*") if file.is_file())
                    report(f"{done >> 20} of {total >> 20} MiB")
                    time.sleep(0.1)
            except BaseException:
                process.kill()
                raise
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.startswith("E: ")]
        hashes = {hashlib.sha256(file.read_bytes()).hexdigest(): file for file in directory.glob("*.deb")}
        for package in wanted:
            if file := hashes.get(package.sha256):
                file.rename(file_of(package, store))
    failed = [
        f"{package.name} {package.version}" for package in wanted if not file_of(package, store).exists()
    ]
    if failed:
        reasons = (
            "; ".join(line[3:] for line in lines) or "apt-get download gave other files than it had announced"
        )
        raise AptError(
            f"could not fetch {', '.join(failed)}: {reasons}\nCheck the network and apt's sources."
        )


def unpack(packages: Iterable[Package], store: Path, directory: Path) -> None:
    """All files of the packages into one tree; no maintainer script runs."""
    for package in packages:
        result = _run(["dpkg-deb", "-x", str(file_of(package, store)), str(directory)])
        if result.returncode:
            raise AptError(
                f"package {package.name} {package.version} does not unpack: {result.stderr.strip()}"
            )
