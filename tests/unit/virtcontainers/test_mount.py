"""Reading fstab options; mounting itself is tested with root in tests/integration."""

import pytest

from virtcontainers import mount


@pytest.mark.parametrize(
    ("options", "flags", "propagation", "data"),
    [
        ([], 0, [], ""),
        (["rbind", "ro"], mount.MS_BIND | mount.MS_REC | mount.MS_RDONLY, [], ""),
        (["ro", "rw"], 0, [], ""),
        (
            ["nosuid", "nodev", "size=4k", "mode=755"],
            mount.MS_NOSUID | mount.MS_NODEV,
            [],
            "size=4k,mode=755",
        ),
        (["bind", "rslave"], mount.MS_BIND, [mount.MS_SLAVE | mount.MS_REC], ""),
        (["lowerdir=/a:/b", "upperdir=/u"], 0, [], "lowerdir=/a:/b,upperdir=/u"),
    ],
)
def test_options_are_split(options: list[str], flags: int, propagation: list[int], data: str) -> None:
    assert mount.parse_options(options) == (flags, propagation, data)
