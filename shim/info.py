"""`-info`: what containerd 2.x asks a shim about itself."""

from __future__ import annotations

import sys

from google.protobuf.any_pb2 import Any

from shim import __version__
from shim.main import NAME
from shim.protocols.types_pb2 import RuntimeInfo, RuntimeVersion


def print_info() -> int:
    """A RuntimeInfo on stdout; the runtime options, an Any on stdin, come back in it."""
    info = RuntimeInfo(name=NAME, version=RuntimeVersion(version=__version__))
    options = sys.stdin.buffer.read()
    if options:
        info.options.CopyFrom(Any.FromString(options))
    sys.stdout.buffer.write(info.SerializeToString())
    return 0
