"""The files for Kubernetes, as containerd itself reads them."""

import subprocess
from pathlib import Path

import pytest
from private_containerd import REPO, Containerd


def test_containerd_knows_the_runtime_from_the_file_for_it(
    every_containerd: Containerd, tmp_path: Path
) -> None:
    program = every_containerd.binaries / "containerd"
    version = subprocess.run(
        [program, "--version"], capture_output=True, text=True, check=True
    ).stdout.split()[2]
    drop_in = REPO / "hack/kubernetes" / f"containerd-{version.lstrip('v')[0]}.x.toml"
    config = tmp_path / "config.toml"
    if version.lstrip("v").startswith("1."):
        config.write_text(f"version = 2\n{drop_in.read_text()}")
    else:
        config.write_text(f'version = 3\nimports = ["{drop_in}"]\n')
    dump = subprocess.run(
        [program, "--config", config, "config", "dump"], capture_output=True, text=True, check=True
    ).stdout
    sections = [line.strip() for line in dump.splitlines() if line.strip().endswith("runtimes.kata-py]")]
    assert len(sections) == 1
    ours = dump.partition(sections[0])[2].partition("\n\n")[0].replace("'", '"')
    assert 'runtime_type = "io.containerd.kata-py.v2"' in ours
    assert 'pod_annotations = ["io.katacontainers.*"]' in ours


@pytest.mark.parametrize("name", ["runtimeclass.yaml", "pod.yaml"])
def test_runtime_class_and_containerd_agree_on_the_handler(name: str) -> None:
    text = (REPO / "hack/kubernetes" / name).read_text()
    assert "handler: kata-py\n" in text or "runtimeClassName: kata-py\n" in text
