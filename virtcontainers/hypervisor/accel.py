"""KVM or TCG: decided once, with a reason a person can read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from virtcontainers.config import Accel

KVM_DEVICE = Path("/dev/kvm")
CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class AccelDecision:
    """`accel` is KVM or TCG, never AUTO; `reason` is a sentence without its full stop."""

    accel: Accel
    reason: str


def decide_accel(
    wanted: Accel = Accel.AUTO, *, kvm_device: Path = KVM_DEVICE, cpuinfo: Path = CPUINFO
) -> AccelDecision:
    """KVM where its device opens and the CPU has the flag; TCG elsewhere. A wish is granted unchecked.

    The flag is asked for beside the device: inside some machines /dev/kvm opens, but serves only guests
    with a paravirtual kernel, and a stock one hangs.
    """
    if wanted is not Accel.AUTO:
        return AccelDecision(wanted, f"{wanted.value} is configured")
    try:
        os.close(os.open(kvm_device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return AccelDecision(Accel.TCG, f"{kvm_device} does not open: {error.strerror}")
    if (flag := _virtualization_flag(cpuinfo)) is None:
        return AccelDecision(
            Accel.TCG, f"{kvm_device} opens, but neither vmx nor svm is among the flags in {cpuinfo}"
        )
    return AccelDecision(Accel.KVM, f"{kvm_device} opens and the CPU has {flag}")


def _virtualization_flag(cpuinfo: Path) -> str | None:
    try:
        text = cpuinfo.read_text()
    except OSError:
        return None
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return next((word for word in (flags[1].split() if flags else ()) if word in ("vmx", "svm")), None)
