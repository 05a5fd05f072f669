"""The persisted state survives a round trip and bad bytes."""

from pathlib import Path

import pytest

from virtcontainers import persist
from virtcontainers.errors import NotFoundError


@pytest.fixture(autouse=True)
def run_vc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(persist, "RUN_VC", tmp_path)
    return tmp_path


def test_what_is_stored_is_loaded() -> None:
    state = persist.SandboxState(id="pod", shim_pid=7, hypervisor={"dir": "/x"}, rootfs={"c": "/r"})
    persist.store(state)
    assert persist.load("pod") == state


def test_destroyed_state_is_not_found_and_destroy_repeats(run_vc: Path) -> None:
    persist.store(persist.SandboxState(id="pod", shim_pid=7))
    persist.destroy("pod")
    persist.destroy("pod")
    assert not list((run_vc / "sbs").iterdir())
    with pytest.raises(NotFoundError, match="pod is not known"):
        persist.load("pod")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"unknown": 1}'])
def test_unreadable_state_is_not_found_with_its_path(run_vc: Path, content: str) -> None:
    persist.store(persist.SandboxState(id="pod", shim_pid=7))
    (run_vc / "sbs/pod/persist.json").write_text(content)
    with pytest.raises(NotFoundError, match=r"sbs/pod/persist\.json is not readable"):
        persist.load("pod")
