"""The guest's Python: the distribution's interpreter, the part of its library that an agent may want,
protobuf and our own packages, all compiled, and all but what starts the interpreter in one file (see
importer.py)."""

from __future__ import annotations

import importlib.util
import json
import marshal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Top-level modules and packages of the standard library that stay out, for their size: nothing an agent does
# without a person, a display, a database or TLS needs them. asyncio and hashlib do without ssl and _hashlib.
STDLIB_PRUNED = _words(
    """
    __phello__ _aix_support _osx_support _pyrepl _sysconfigdata__linux_x86_64-linux-gnu
    _sysconfigdata__x86_64-linux-gnu aifc antigravity audioop bdb cProfile cgi cgitb chunk code codeop
    compileall crypt curses dbm distutils doctest ensurepip ftplib idlelib imaplib imghdr lib2to3
    mailbox mailcap msilib netrc nntplib nturl2path optparse pdb pickletools pipes poplib profile pstats
    pyclbr pydoc pydoc_data sched shelve site-packages sitecustomize smtpd smtplib sndhdr sqlite3 ssl
    sunau symtable sysconfig tabnanny telnetlib test this tkinter trace tracemalloc turtle turtledemo
    unittest uu venv wave webbrowser wsgiref xdrlib xml xmlrpc zipapp
    """
)

# The interpreter imports these before it could import our importer, and knows its library by os.
STARTUP = _words("encodings/__init__ encodings/aliases encodings/utf_8 os")

# Codecs of these are found when somebody asks for one by name.
_ENCODINGS = _words(
    """
    __init__ aliases ascii idna latin_1 raw_unicode_escape unicode_escape utf_8 utf_8_sig
    """
)

# Extension modules that the library needs and that Debian or Ubuntu do not build into the interpreter.
EXTENSIONS = _words(
    """
    _asyncio _bisect _blake2 _contextvars _csv _ctypes _datetime _heapq _json _md5 _multiprocessing
    _opcode _pickle _posixsubprocess _queue _random _sha1 _sha2 _sha256 _sha3 _sha512 _socket
    _statistics _struct _typing _zoneinfo array binascii fcntl grp math mmap resource select syslog
    termios unicodedata zlib
    """
)

# The first bytes of a .pyc file, before the code: its magic number and what it was made of.
_HEADER_BYTES = 16

# What of our own goes into the guest, and what of protobuf does not.
OWN_PACKAGES = ("guest.agent", "ttrpc", "agent_client.protocols")
PROTOBUF_PRUNED = frozenset({"compiler", "testdata", "util"})

_COMPILE = """
import json, py_compile, sys
mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
for source, target, shown, optimize in json.load(sys.stdin):
    try:
        py_compile.compile(source, target, shown, True, optimize, mode)
    except Exception as error:
        sys.exit(f"{source} does not compile for the guest: {error!r}")
"""


class PythonError(Exception):
    """A part of the guest's Python is not there, or does not compile."""


@dataclass(frozen=True)
class Source:
    path: Path
    module: str  # where it goes, below the guest's library: asyncio/events

    @property
    def optimize(self) -> int:
        """Docstrings of the library cost reading; dataclasses compute theirs, slowly, when they have none."""
        return 0 if self.module.startswith(("guest/", "ttrpc/", "agent_client/")) else 2


def standard_library(directory: Path) -> list[Source]:
    """`directory` is .../usr/lib/python3.X."""
    sources = []
    for path in sorted(directory.rglob("*.py")):
        relative = path.relative_to(directory)
        top = relative.parts[0].removesuffix(".py")
        if top in STDLIB_PRUNED or top.startswith("config-"):
            continue
        if top == "encodings" and relative.stem not in _ENCODINGS:
            continue
        if {"test", "tests", "idle_test"} & set(relative.parts):
            continue
        sources.append(Source(path, relative.with_suffix("").as_posix()))
    return sources


def extension_modules(directory: Path) -> list[Path]:
    """Those of lib-dynload that go into the guest."""
    return sorted(
        path for path in (directory / "lib-dynload").glob("*.so") if path.name.split(".")[0] in EXTENSIONS
    )


def _package_directory(name: str) -> Path:
    specification = importlib.util.find_spec(name)
    if specification is None or not specification.submodule_search_locations:
        raise PythonError(
            f"{sys.executable} cannot import {name}\nUse the interpreter of kata-py's environment."
        )
    return Path(next(iter(specification.submodule_search_locations)))


def own_sources() -> list[Source]:
    """Our packages as the running interpreter finds them."""
    sources = {}
    for name in OWN_PACKAGES:
        directory = _package_directory(name)
        relative = name.replace(".", "/")
        for path in sorted(directory.rglob("*.py")):
            module = f"{relative}/{path.relative_to(directory).with_suffix('').as_posix()}"
            sources[module] = Source(path, module)
        if "." in name:
            parent = name.partition(".")[0]
            sources[f"{parent}/__init__"] = Source(directory.parent / "__init__.py", f"{parent}/__init__")
    return [sources[module] for module in sorted(sources)]


def protobuf() -> tuple[list[Source], Path]:
    """Sources of the running interpreter's protobuf, and its extension module, which any Python 3 can
    load."""
    directory = _package_directory("google.protobuf")
    extension = directory.parent / "_upb" / "_message.abi3.so"
    if not extension.is_file():
        raise PythonError(
            f"protobuf in {directory} has no {extension.name}\nInstall protobuf's wheel for this machine."
        )
    sources = []
    for path in sorted(directory.rglob("*.py")):
        relative = path.relative_to(directory)
        if relative.parts[0] not in PROTOBUF_PRUNED:
            sources.append(Source(path, f"google/protobuf/{relative.with_suffix('').as_posix()}"))
    return sources, extension


def compile_sources(
    interpreter: Sequence[str], sources: Iterable[Source], shown: str, work: Path
) -> dict[str, bytes]:
    """Bytecode by module. `interpreter` is the command of the guest's own Python; tracebacks will name the
    sources below `shown`. The same sources give the same bytes: one process, one order, one hash seed."""
    jobs = []
    targets: dict[str, Path] = {}
    for source in sources:
        targets[source.module] = work / f"{source.module}.pyc"
        jobs.append(
            (str(source.path), str(targets[source.module]), f"{shown}/{source.module}.py", source.optimize)
        )
    result = subprocess.run(
        [*interpreter, "-ISB", "-c", _COMPILE],
        input=json.dumps(jobs),
        env={"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise PythonError(lines[-1])
    return {module: target.read_bytes() for module, target in targets.items()}


def bundle(bytecode: Mapping[str, bytes]) -> bytes:
    """One file of many modules' bytecode, for importer.py."""
    index: dict[str, tuple[int, int, bool]] = {}
    code = bytearray()
    # marshal's version 2 shares no objects, so equal indexes are equal bytes.
    for module, data in sorted(bytecode.items()):
        path = module.removesuffix("/__init__")
        content = data[_HEADER_BYTES:]
        index[path.replace("/", ".")] = (len(code), len(content), path != module)
        code += content
    header = marshal.dumps(dict(sorted(index.items())), 2)
    return len(header).to_bytes(8, "little") + header + bytes(code)
