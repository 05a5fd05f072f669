"""OCI hooks of the runtime namespace, run on the host: prestart, createRuntime, poststart, poststop.

createContainer and startContainer belong to the container's namespaces, which are in the guest.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from virtcontainers.config import OCISpec
from virtcontainers.errors import DeadlineExceededError, KataError

log = logging.getLogger(__name__)

_OUTPUT_TAIL = 4096

STATUS = {"prestart": "creating", "createRuntime": "creating", "poststart": "running", "poststop": "stopped"}
"""Stage -> `status` of the state (runtime-spec, runtime.md#state)."""


class HookError(KataError):
    """A hook could not be started, or ended with a failure; the message has the end of its output."""


class HookTimeout(HookError, DeadlineExceededError):
    """A hook was killed for it took longer than its `timeout`."""


async def run_hooks(stage: str, spec: OCISpec, *, container_id: str, bundle: Path, pid: int) -> None:
    """Run the stage's hooks in their order, each with the container's state on stdin.

    `pid` is the hypervisor's: the container's own is the guest's. Raises HookError for the first that fails;
    the others are not run. For `poststart` and `poststop` a failure is a warning, and the others run
    (runtime-spec 1.2, runtime.md#lifecycle).
    """
    hooks: list[dict[str, Any]] = spec.get("hooks", {}).get(stage, [])
    if not hooks:
        return
    state: dict[str, Any] = {
        "ociVersion": spec["ociVersion"],
        "id": container_id,
        "status": STATUS[stage],
        "bundle": str(bundle),
        "annotations": spec.get("annotations", {}),
    }
    if stage != "poststop":
        state["pid"] = pid
    for hook in hooks:
        try:
            await _run(stage, hook, json.dumps(state).encode())
        except HookError as error:
            if stage not in ("poststart", "poststop"):
                raise
            log.warning("%s", error, extra={"container": container_id})


async def _run(stage: str, hook: dict[str, Any], state: bytes) -> None:
    path, timeout_s = hook["path"], hook.get("timeout")
    # Files rather than pipes: a hook may leave a daemon behind that holds them open.
    with open(os.memfd_create("state"), "w+b") as stdin, open(os.memfd_create("output"), "w+b") as output:  # noqa: PTH123
        stdin.write(state)
        stdin.seek(0)
        try:
            process = await asyncio.create_subprocess_exec(
                *(hook.get("args") or [path]),
                executable=path,
                env=dict(variable.partition("=")[::2] for variable in hook["env"]) if "env" in hook else None,
                stdin=stdin,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise HookError(f"{stage} hook {path}: cannot be started: {reason}") from error
        try:
            async with asyncio.timeout(timeout_s):
                status = await process.wait()
        except TimeoutError:
            message = f"{stage} hook {path}: still running after its timeout of {timeout_s} s: killed"
            raise HookTimeout(message + _tail(output)) from None
        finally:
            if process.returncode is None:
                # All of it: a shell's children would go on. It may have ended without our having heard of it.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        if status:
            how = f"exit status {status}" if status > 0 else f"killed by signal {-status}"
            raise HookError(f"{stage} hook {path}: {how}{_tail(output)}")


def _tail(output: Any) -> str:
    size = output.seek(0, os.SEEK_END)
    output.seek(max(0, size - _OUTPUT_TAIL))
    text = output.read().decode(errors="replace").strip()
    return f": {text}" if text else ""
