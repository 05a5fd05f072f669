"""`containerd-shim-kata-py-v2`: its flags and actions, as containerd 1.6, 1.7 and 2.x call it.

containerd waits for `start` and for `delete`, once each per container: they import next to nothing. What
looks home-made here and in `shim.start` stands for a module that costs more than the rest of them together
(argparse, dataclasses and json by way of re, hashlib by way of OpenSSL, socket by way of enum).
"""

from __future__ import annotations

import sys

NAME = "containerd-shim-kata-py-v2"


class UsageError(Exception):
    """The command line cannot be understood."""


class Flags:
    """containerd's flags, under its names; `socket` is ours to serve on a path without `start`."""

    def __init__(self) -> None:
        self.namespace = ""
        self.id = ""
        self.address = ""
        self.publish_binary = ""
        self.bundle = ""
        self.socket = ""
        self.debug = False
        self.version = False
        self.info = False
        self.action = ""


_STRINGS = {
    "namespace": "namespace",
    "id": "id",
    "address": "address",
    "publish-binary": "publish_binary",
    "bundle": "bundle",
    "socket": "socket",
}
_SWITCHES = {"debug": "debug", "v": "version", "version": "version", "info": "info"}
_TRUE = {"1", "t", "T", "true", "TRUE", "True"}
_FALSE = {"0", "f", "F", "false", "FALSE", "False"}


def parse_flags(arguments: list[str]) -> Flags:
    """Go's flag syntax: `-x v`, `-x=v`, `--x`; the first word that is none of these is the action.

    Raises UsageError.
    """
    flags = Flags()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--" or not word.startswith("-") or word == "-":
            flags.action = (rest[0] if rest else "") if word == "--" else word
            break
        name, has_value, value = word.removeprefix("-").removeprefix("-").partition("=")
        if name in _SWITCHES:
            if has_value and value not in _TRUE | _FALSE:
                raise UsageError(f"invalid boolean value {value!r} for -{name}")
            setattr(flags, _SWITCHES[name], not has_value or value in _TRUE)
        elif name in _STRINGS:
            if not has_value:
                if not rest:
                    raise UsageError(f"flag needs an argument: -{name}")
                value = rest.pop(0)
            setattr(flags, _STRINGS[name], value)
        else:
            raise UsageError(f"flag provided but not defined: -{name}")
    return flags


def main() -> int:
    try:
        flags = parse_flags(sys.argv[1:])
    except UsageError as error:
        sys.stderr.write(f"{NAME}: {error}\n")
        return 2
    if flags.version:
        from shim import __version__

        python = sys.version.partition(" ")[0]
        sys.stdout.write(f"{NAME}:\n  Version:  {__version__}\n  Python version: {python}\n\n")
        return 0
    if flags.info:
        from shim.info import print_info

        return print_info()
    for flag, value in (("namespace", flags.namespace), ("id", flags.id)):
        if not value or value.strip(".") == "" or "/" in value:
            sys.stderr.write(f"{NAME}: -{flag} is {value!r}: expected a name\n")
            return 1
    try:
        return run_action(flags)
    except Exception as error:
        sys.stderr.write(f"{NAME}: {flags.action or 'serve'} {flags.id}: {error}\n")
        return 1


def run_action(flags: Flags) -> int:
    if flags.action == "start":
        from shim.start import start

        start(flags)
    if flags.action == "delete":
        from shim.delete import delete

        return delete(flags)
    if flags.action == "" and flags.socket:
        from shim.start import serve_in_foreground

        return serve_in_foreground(flags)
    raise UsageError(f"action {flags.action!r}: expected start or delete")


if __name__ == "__main__":
    sys.exit(main())
