"""The command line as containerd writes it, and as Go's flag package would read it."""

import pytest

from shim.main import UsageError, parse_flags


def test_containerd_1_6() -> None:
    line = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd"
    flags = parse_flags([*line.split(), "-id", "c1", "-debug", "start"])
    assert (flags.namespace, flags.id, flags.action) == ("k8s.io", "c1", "start")
    assert flags.address == "/run/containerd/containerd.sock"
    assert flags.publish_binary == "/usr/bin/containerd"
    assert flags.debug


@pytest.mark.parametrize("dashes", ["-", "--"])
def test_equals_sign_and_two_dashes(dashes: str) -> None:
    flags = parse_flags([f"{dashes}id=a=b", f"{dashes}debug=false", f"{dashes}namespace=", "delete"])
    assert (flags.id, flags.debug, flags.namespace, flags.action) == ("a=b", False, "", "delete")


def test_what_follows_the_action_is_not_ours() -> None:
    flags = parse_flags(["-id", "c1", "start", "-id", "c2"])
    assert (flags.id, flags.action) == ("c1", "start")
    assert parse_flags(["--", "start"]).action == "start"


@pytest.mark.parametrize("line", [["-id"], ["-what", "x"], ["-debug=maybe"]])
def test_a_wrong_line_is_refused(line: list[str]) -> None:
    with pytest.raises(UsageError, match=line[0].strip("-").partition("=")[0]):
        parse_flags(line)
