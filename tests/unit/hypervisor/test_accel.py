from pathlib import Path

import pytest

from virtcontainers.config import Accel
from virtcontainers.hypervisor.accel import decide_accel

FLAGS = "processor\t: 0\nmodel name\t: vmx-like name svm\nflags\t\t: fpu {} sse2\nbugs\t\t: \n"


@pytest.fixture
def kvm_device(tmp_path: Path) -> Path:
    device = tmp_path / "kvm"
    device.touch()
    return device


def cpuinfo(tmp_path: Path, flag: str) -> Path:
    path = tmp_path / "cpuinfo"
    path.write_text(FLAGS.format(flag))
    return path


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_kvm_needs_the_device_and_the_flag(tmp_path: Path, kvm_device: Path, flag: str) -> None:
    decision = decide_accel(kvm_device=kvm_device, cpuinfo=cpuinfo(tmp_path, flag))
    assert decision.accel is Accel.KVM
    assert flag in decision.reason


def test_a_device_without_the_flag_is_not_kvm(tmp_path: Path, kvm_device: Path) -> None:
    decision = decide_accel(kvm_device=kvm_device, cpuinfo=cpuinfo(tmp_path, "vmx_not"))
    assert decision.accel is Accel.TCG
    assert "neither vmx nor svm" in decision.reason


def test_the_flag_without_a_device_is_not_kvm(tmp_path: Path) -> None:
    decision = decide_accel(kvm_device=tmp_path / "none", cpuinfo=cpuinfo(tmp_path, "vmx"))
    assert decision.accel is Accel.TCG
    assert f"{tmp_path}/none does not open: No such file" in decision.reason


def test_an_unreadable_cpuinfo_is_tcg(tmp_path: Path, kvm_device: Path) -> None:
    assert decide_accel(kvm_device=kvm_device, cpuinfo=tmp_path / "none").accel is Accel.TCG


@pytest.mark.parametrize("wanted", [Accel.KVM, Accel.TCG])
def test_a_configured_accelerator_is_taken(tmp_path: Path, wanted: Accel) -> None:
    assert decide_accel(wanted, kvm_device=tmp_path / "none", cpuinfo=tmp_path / "none").accel is wanted
