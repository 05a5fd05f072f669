"""What a private containerd's configuration says; none is started."""

import dataclasses
import tomllib
from pathlib import Path

import private_containerd

from virtcontainers.config import FactoryConfig


def test_a_clone_shares_neither_template_nor_cache_with_what_is_installed(tmp_path: Path) -> None:
    containerd = private_containerd.of_this_clone()
    own = dataclasses.replace(
        containerd, root=tmp_path / "root", run=tmp_path / "run", binaries=Path("/"), cri=False
    )
    own.write_configuration()
    factory = tomllib.loads(own.kata_config.read_text())["factory"]
    installed = FactoryConfig()
    assert Path(factory["template_path"]).parent == containerd.run != installed.template_path.parent
    assert Path(factory["vm_cache_endpoint"]).parent == containerd.run != installed.vm_cache_endpoint.parent
