from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from processes import runs, wait_gone

from katautils.hooks import HookError, HookTimeout, run_hooks
from tests.unit import clock
from virtcontainers.errors import DeadlineExceededError


def run(stage: str, *hooks: dict[str, Any], **spec: Any) -> None:
    whole = {"ociVersion": "1.2.0", "hooks": {stage: list(hooks)}, **spec}
    asyncio.run(run_hooks(stage, whole, container_id="c1", bundle=Path("/bundle"), pid=4242))


def shell(script: str, **more: Any) -> dict[str, Any]:
    return {"path": "/bin/sh", "args": ["sh", "-c", script], **more}


@pytest.mark.parametrize(
    ("stage", "status"),
    [("prestart", "creating"), ("createRuntime", "creating"), ("poststart", "running")],
)
def test_a_hook_is_told_the_containers_state(tmp_path: Path, stage: str, status: str) -> None:
    run(stage, shell(f"cat > {tmp_path}/state"), annotations={"a": "b" * 100_000})
    assert json.loads((tmp_path / "state").read_text()) == {
        "ociVersion": "1.2.0",
        "id": "c1",
        "status": status,
        "pid": 4242,
        "bundle": "/bundle",
        "annotations": {"a": "b" * 100_000},
    }


def test_after_the_end_there_is_no_pid(tmp_path: Path) -> None:
    run("poststop", shell(f"cat > {tmp_path}/state"))
    state = json.loads((tmp_path / "state").read_text())
    assert state["status"] == "stopped"
    assert "pid" not in state


def test_arguments_and_environment_are_the_hooks_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_SHIM", "x")
    script = f'echo "$0 $1 $A $OF_THE_SHIM" >> {tmp_path}/out'
    run(
        "prestart",
        {"path": "/bin/sh", "args": ["anything", "-c", script, "zero", "one"], "env": ["A=b=c"]},
        {"path": "/bin/sh", "args": ["sh", "-c", script, "zero"]},
        {"path": "/bin/sh", "args": ["sh", "-c", script, "zero"], "env": []},
        {"path": "/bin/true"},
    )
    assert (tmp_path / "out").read_text() == "zero one b=c \nzero   x\nzero   \n"


def test_hooks_run_in_their_order_and_the_first_failure_ends_them(tmp_path: Path) -> None:
    with pytest.raises(HookError) as failed:
        run(
            "createRuntime",
            shell(f"sleep 0.1; echo 1 >> {tmp_path}/out"),
            shell(f"echo 2 >> {tmp_path}/out; echo to stdout; echo to stderr >&2; exit 3"),
            shell(f"echo 3 >> {tmp_path}/out"),
        )
    assert (tmp_path / "out").read_text() == "1\n2\n"
    assert str(failed.value) == "createRuntime hook /bin/sh: exit status 3: to stdout\nto stderr"


@pytest.mark.parametrize("stage", ["poststart", "poststop"])
def test_a_failure_afterwards_is_a_warning(
    tmp_path: Path, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(stage, shell("exit 1"), {"path": "/does/not/exist"}, shell(f"echo run > {tmp_path}/out"))
    assert (tmp_path / "out").read_text() == "run\n"
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert f"{stage} hook /bin/sh: exit status 1" in caplog.text
    assert f"{stage} hook /does/not/exist: cannot be started: No such file" in caplog.text
    assert caplog.records[0].__dict__["container"] == "c1"


def test_a_hook_that_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="prestart hook /does/not/exist: cannot be started: No such file"):
        run("prestart", {"path": "/does/not/exist"})
    with pytest.raises(HookError, match="cannot be started: Permission denied"):
        run("prestart", {"path": str(tmp_path)})


def test_a_hook_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(HookError, match="prestart hook /bin/sh: killed by signal 9"):
        run("prestart", shell("kill -9 $$"))


async def begun(hook: dict[str, Any], pid_file: Path) -> tuple[asyncio.Task[None], int]:
    """The hook at work, and the pid that it has written."""
    spec = {"ociVersion": "1.2.0", "hooks": {"prestart": [hook]}}
    task = asyncio.create_task(run_hooks("prestart", spec, container_id="c", bundle=Path("/b"), pid=1))
    while not pid_file.exists() or not pid_file.read_text().endswith("\n"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return task, int(pid_file.read_text())


def test_a_hook_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    async def body() -> None:
        hook = shell(f"echo waiting; sleep 100000 & echo $! > {tmp_path}/pid; wait", timeout=300)
        task, child = await begun(hook, tmp_path / "pid")
        clock.skip(300)
        with pytest.raises(HookTimeout) as failed:
            await task
        assert isinstance(failed.value, DeadlineExceededError)
        assert str(failed.value) == (
            "prestart hook /bin/sh: still running after its timeout of 300 s: killed: waiting"
        )
        wait_gone([child])

    clock.run(body())


def test_a_daemon_that_a_hook_leaves_holds_nothing_up(tmp_path: Path) -> None:
    run("createRuntime", shell(f"sleep 100000 & echo $! > {tmp_path}/pid"))
    daemon = int((tmp_path / "pid").read_text())
    assert runs(daemon)
    os.kill(daemon, 9)


def test_a_cancelled_hook_is_killed(tmp_path: Path) -> None:
    async def body() -> None:
        task, pid = await begun(shell(f"echo $$ > {tmp_path}/pid; exec sleep 100000"), tmp_path / "pid")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        wait_gone([pid])

    asyncio.run(body())


def test_only_the_end_of_much_output_is_shown() -> None:
    with pytest.raises(HookError) as failed:
        run("prestart", shell("yes | head -c 1000000; echo the end; exit 1"))
    assert len(str(failed.value)) < 5000
    assert str(failed.value).endswith("the end")


def test_without_hooks_nothing_happens() -> None:
    run("prestart")
    asyncio.run(run_hooks("prestart", {}, container_id="c", bundle=Path("/b"), pid=1))
