"""The floor of a clone: a machine from a template and its agent's first answer, with nothing else around.

Reads a `plan` of hack/bench_agent.py on stdin: QEMU's command line, where the state is, and the bytes that
go to the agent. Raw sockets and the standard library, no event loop; every command that needs no answer of
the one before is sent with it. Prints what it took as JSON: seconds since the decision, by step.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 60.0
SEND_FD = b'{"execute": "getfd", "arguments": {"fdname": "state"}}\n'
COMMANDS = (
    {"execute": "qmp_capabilities"},
    {
        "execute": "migrate-set-capabilities",
        "arguments": {"capabilities": [{"capability": "x-ignore-shared", "state": True}]},
    },
)
RESTORE = b'{"execute": "migrate-incoming", "arguments": {"uri": "fd:state"}}\n'
LOOK = b'{"execute": "query-migrate"}\n'
CONTINUE = b'{"execute": "cont"}\n'


class Floor:
    """One machine, in `directory`, which must exist."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.steps: dict[str, float] = {}
        self.qemu: subprocess.Popen[bytes] | None = None
        self._left = b""

    def run(self) -> dict[str, float]:
        directory = Path(self.plan["directory"])
        began = time.monotonic()

        def passed(step: str) -> None:
            self.steps[step] = time.monotonic() - began

        listeners = {name: listening(directory / f"{name}.sock") for name in ("qmp", "agent")}
        numbers = {name: listener.fileno() for name, listener in listeners.items()}
        argv = [word.format(**numbers) for word in self.plan["argv"]]
        log = os.open(directory / "qemu.log", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.qemu = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=list(numbers.values()),
                env=self.plan["environment"],
            )
            for listener in listeners.values():
                listener.close()
            passed("exec")
            self._qmp = connected(directory / "qmp.sock")
            agent = connected(directory / "agent.sock")
            # QEMU keeps it until the guest reads.
            agent.sendall(bytes.fromhex(self.plan["hail"]) + bytes.fromhex(self.plan["request"]))
            self._answer("QMP")
            passed("greeting")
            self._qmp.sendall(b"".join(json.dumps(command).encode() + b"\n" for command in COMMANDS))
            state = os.open(self.plan["state"], os.O_RDONLY | os.O_CLOEXEC)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [state]))]
            self._qmp.sendmsg([SEND_FD], rights)
            self._qmp.sendall(RESTORE)
            for _ in range(4):
                self._answer("return")
            os.close(state)
            while (status := self._ask(LOOK).get("status")) != "completed":
                if status == "failed":
                    raise RuntimeError("the restore failed")
            passed("restored")
            self._ask(CONTINUE)
            passed("continued")
            hail, response = bytes.fromhex(self.plan["hail"]), bytes.fromhex(self.plan["response"])
            seen = b""
            while response not in seen.partition(hail)[2]:
                data = agent.recv(1 << 16)
                if not data:
                    raise EOFError("the agent's port closed")
                seen += data
                if hail in seen and "hail" not in self.steps:
                    passed("hail")
            passed("answer")
        finally:
            self._end()
            os.close(log)
        return self.steps

    def _ask(self, command: bytes) -> dict[str, Any]:
        self._qmp.sendall(command)
        answer: dict[str, Any] = self._answer("return")
        return answer

    def _answer(self, key: str) -> Any:
        """Of the next message that has `key`; events are passed over."""
        while True:
            while b"\n" not in self._left:
                data = self._qmp.recv(1 << 16)
                if not data:
                    raise EOFError("QMP closed")
                self._left += data
            line, _, self._left = self._left.partition(b"\n")
            message = json.loads(line)
            if "error" in message:
                raise RuntimeError(f"QMP: {message['error']}")
            if key in message:
                return message[key]

    def _end(self) -> None:
        if self.qemu is not None:
            self.qemu.kill()
            self.qemu.wait()


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT_S)
    connection.connect(str(path))
    return connection


def main() -> None:
    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    print(json.dumps(Floor(json.load(sys.stdin)).run()))


if __name__ == "__main__":
    main()
