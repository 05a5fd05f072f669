"""`kata-py`: what a person asks about this host and this installation."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from katautils import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 for a failure; argparse itself exits with 2 for wrong usage."""
    try:
        try:
            return _main(arguments)
        finally:
            # What is short is only written here. It is None where there is no stdout.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough; and the interpreter must not flush into it once more.
        sys.stdout = None
        return 1
    except KeyboardInterrupt:
        return 130  # as shells have it: 128 + SIGINT


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "version":
        print(f"kata-py {__version__}")
        return 0

    from virtcontainers.errors import KataError

    try:
        return _run(options)
    except KataError as error:
        print(f"kata-py: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "check":
            from katautils.cli.check import check

            return check(options.config)
        case "factory":
            return _factory(options)
        case "iptables":
            return _iptables(options)
        case "direct-volume":
            return _direct_volume(options)
        case _:
            from katautils.cli.env import env

            return env(options.config, as_json=options.json)


def _iptables(options: argparse.Namespace) -> int:
    from katautils.cli import iptables

    if options.action == "get":
        return iptables.get(options.sandbox_id, is_ipv6=options.v6)
    return iptables.set_(options.sandbox_id, options.file, is_ipv6=options.v6)


def _factory(options: argparse.Namespace) -> int:
    if options.action == "status":
        from katautils.cli.factory_status import status

        return status(options.config, as_json=options.json)
    from katautils.cli.factory import destroy, init

    return init(options.config, force=options.force) if options.action == "init" else destroy(options.config)


def _direct_volume(options: argparse.Namespace) -> int:
    from katautils.cli import direct_volume

    match options.action:
        case "add":
            return direct_volume.add(options.volume_path, options.mount_info)
        case "remove":
            return direct_volume.remove(options.volume_path)
        case "stats":
            return direct_volume.stats(options.volume_path)
        case _:
            return direct_volume.resize(options.volume_path, options.size)


def _size(text: str) -> int:
    size = int(text)
    if not 0 < size < 1 << 63:
        raise ValueError
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kata-py", description="Run each pod of containerd in a QEMU machine of its own."
    )
    parser.add_argument("--version", action="version", version=f"kata-py {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="the configuration.toml to read, instead of KATA_CONF_FILE's or the first of the usual places",
    )
    commands.add_parser(
        "check",
        parents=[config],
        help="say whether this host can run kata-py",
        description="Say whether this host can run kata-py, line by line: ok, warning or failure, with the "
        "way out. The exit status is 1 when there is a failure.",
    )
    env = commands.add_parser(
        "env",
        parents=[config],
        help="print the resolved configuration and versions",
        description="Print the resolved configuration, and the versions of what takes part.",
    )
    env.add_argument("--json", action="store_true", help="as JSON")
    factory = commands.add_parser(
        "factory",
        help="make, show or remove the template and the VM cache",
        description="The template that machines are cloned from, and the cache of machines that are ready.",
    )
    actions = factory.add_subparsers(dest="action", metavar="ACTION", required=True)
    init = actions.add_parser(
        "init",
        parents=[config],
        help="make the template, or serve the VM cache",
        description="Make the template that enable_template asks for, unless one is there that fits. With "
        "vm_cache_number, keep so many machines ready, until SIGTERM, Ctrl-C or `factory destroy`.",
    )
    init.add_argument("--force", action="store_true", help="make it anew, also when one is there that fits")
    actions.add_parser(
        "destroy",
        parents=[config],
        help="remove the template, and end the VM cache",
        description="Remove the template and its tmpfs, and end the VM cache. Pods go on.",
    )
    status = actions.add_parser(
        "status",
        parents=[config],
        help="show the template, its clones, and the VM cache",
        description="Show what the template is made of, whether it fits the configuration, which clones run "
        "and what they cost the host, and the machines of the VM cache.",
    )
    status.add_argument("--json", action="store_true", help="as JSON, with sizes in bytes")
    iptables = commands.add_parser(
        "iptables",
        help="get or set the packet filter of a pod's machine",
        description="The packet filter of a pod's machine, which its containers share.",
    )
    actions = iptables.add_subparsers(dest="action", metavar="ACTION", required=True)
    of_pod = argparse.ArgumentParser(add_help=False)
    of_pod.add_argument("--sandbox-id", required=True, metavar="ID", help="of the pod")
    of_pod.add_argument("--v6", action="store_true", help="IPv6's")
    actions.add_parser("get", parents=[of_pod], help="print it, as iptables-save does")
    set_ = actions.add_parser("set", parents=[of_pod], help="replace it, as iptables-restore does")
    set_.add_argument("file", type=Path, metavar="FILE", help="with the rules; - for stdin")
    volume = commands.add_parser(
        "direct-volume",
        help="volumes whose file systems the guest mounts",
        description="Volumes on block devices that a CSI driver leaves to the guest to mount.",
    )
    actions = volume.add_subparsers(dest="action", metavar="ACTION", required=True)
    of_volume = argparse.ArgumentParser(add_help=False)
    of_volume.add_argument(
        "--volume-path", required=True, metavar="PATH", help="where the volume is published to"
    )
    add = actions.add_parser("add", parents=[of_volume], help="have the guest mount it")
    add.add_argument(
        "--mount-info",
        required=True,
        metavar="JSON",
        help='{"volume-type": "block", "device": "/dev/...", "fstype": "ext4", "options": [...], '
        '"metadata": {"fsGroup": "..."}}',
    )
    actions.add_parser("remove", parents=[of_volume], help="forget it")
    actions.add_parser("stats", parents=[of_volume], help="print what is used of it")
    resize = actions.add_parser(
        "resize", parents=[of_volume], help="fit the guest to a device that has grown"
    )
    resize.add_argument("--size", required=True, type=_size, metavar="BYTES", help="what it has now")
    commands.add_parser("version", help="print the version", description="Print the version of kata-py.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
