"""Bytes in and out of containers: whole, at the same time, over a terminal, into loggers."""

import codecs
import contextlib
import fcntl
import hashlib
import os
import re
import signal
import struct
import subprocess
import termios
from pathlib import Path

from harness import TIMEOUT_S, Ctr, new_id, wait_for

MIB = 1 << 20


def test_ten_megabytes_through_cat_come_back_whole(ctr: Ctr, container_id: str) -> None:
    data = os.urandom(10 * MIB)
    result = ctr.run(container_id, "cat", input=data)
    assert result.returncode == 0, result.stderr
    assert hashlib.sha256(result.stdout).hexdigest() == hashlib.sha256(data).hexdigest()


def test_two_outputs_of_fifty_megabytes_at_once_arrive_whole(ctr: Ctr, tmp_path: Path) -> None:
    block = os.urandom(MIB)
    (tmp_path / "block").write_bytes(block)
    expected = hashlib.sha256()
    for number in range(1, 51):
        expected.update(b"%d\n" % number + block)
    # Numbered blocks: neither loss, nor doubling, nor another order goes unseen.
    script = "for i in $(seq 50); do echo $i; cat /data/block; done"
    options = ("--rm", "--mount", f"type=bind,src={tmp_path},dst=/data,options=rbind:ro")
    outputs = [tmp_path / name for name in ("first", "second")]
    running = []
    for output in outputs:
        with output.open("wb") as file:
            command = ctr.run_command(new_id(output.name), "sh", "-c", script, options=options)
            running.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file))
    assert [process.wait(TIMEOUT_S) for process in running] == [0, 0]
    for output in outputs:
        with output.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == expected.hexdigest()


class Terminal:
    """A program on a pseudo-terminal, and a person at it."""

    def __init__(self, command: list[str], rows: int, columns: int) -> None:
        self._master, slave = os.openpty()
        self.resize(rows, columns, tell=False)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # What a shell runs in the background ignores it, and so do those whom that starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(slave)
        os.set_blocking(self._master, False)
        self.screen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def resize(self, rows: int, columns: int, *, tell: bool = True) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def shows(self, pattern: str) -> re.Match[str] | None:
        with contextlib.suppress(OSError):  # nothing to read, or EIO: the program has ended
            # One read gives 4 KiB at most.
            while text := os.read(self._master, 65536):
                self.screen += self._decoder.decode(text)
        return re.search(pattern, self.screen)

    def ended(self) -> bool:
        """Then all that it has written is on the screen."""
        ended = self.process.poll() is not None
        self.shows("")
        return ended

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_a_terminal_with_its_size_and_its_resizes(ctr: Ctr, container_id: str) -> None:
    terminal = Terminal(ctr.run_command(container_id, "sh", options=("--rm", "-t")), rows=33, columns=101)
    try:
        wait_for("a prompt", lambda: terminal.shows(r"[#$] "))
        terminal.type("test -t 0 && test -t 1 && echo is a $((1+1))-way terminal\n")
        wait_for("a terminal", lambda: terminal.shows("is a 2-way terminal"))

        def size() -> str:
            terminal.screen = ""
            terminal.type("stty size\n")
            return wait_for("an answer", lambda: terminal.shows(r"(\d+ \d+)\r*\n"))[1]

        wait_for("the terminal's size", lambda: size() == "33 101")

        def resized() -> bool:
            # ctr listens to SIGWINCH only some time after it has told the first size.
            terminal.resize(44, 120)
            return size() == "44 120"

        wait_for("the new size", resized)
        terminal.type("exit 9\n")
        wait_for("the end", terminal.ended)
        assert terminal.process.returncode == 9
    finally:
        terminal.close()
        ctr.remove(container_id)


def test_exec_with_a_terminal(ctr: Ctr, container_id: str) -> None:
    with ctr.detached(container_id, "sleep", "1000"):
        command = ctr.containerd.ctr_command(
            "tasks", "exec", "-t", "--exec-id", "terminal", container_id, "sh"
        )
        terminal = Terminal(command, rows=20, columns=70)
        try:
            wait_for("a prompt", lambda: terminal.shows(r"[#$] "))
            terminal.type("tty; exit 4\n")
            wait_for("the terminal's name", lambda: terminal.shows(r"/dev/pts/\d+|/dev/console"))
            wait_for("the end", terminal.ended)
            assert terminal.process.returncode == 4
        finally:
            terminal.close()


def test_output_into_a_file_logger(ctr: Ctr, container_id: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "echo out; echo err >&2"
    with ctr.detached(container_id, "sh", "-c", script, options=("--log-uri", f"file://{log}")):
        wait_for("the end", lambda: ctr.status(container_id) == "STOPPED")
        assert sorted(log.read_text().split()) == ["err", "out"]


def test_output_into_a_binary_logger(ctr: Ctr, container_id: str, tmp_path: Path) -> None:
    # containerd's contract: stdout is fd 3, stderr is fd 4, and closing fd 5 says "ready".
    logger = tmp_path / "logger"
    logger.write_text(
        f'#!/bin/sh\necho "$CONTAINER_NAMESPACE $CONTAINER_ID $1 $2" >{tmp_path}/called\n'
        f"exec >{tmp_path}/stdout 2>{tmp_path}/stderr 5>&-\ncat <&4 >&2 &\ncat <&3\nwait\n"
    )
    logger.chmod(0o755)
    script = "seq 1000; echo err >&2"
    with ctr.detached(
        container_id, "sh", "-c", script, options=("--log-uri", f"binary://{logger}?key=value")
    ):
        numbers = "".join(f"{number}\n" for number in range(1, 1001))
        wait_for("all of stdout", lambda: (tmp_path / "stdout").read_text() == numbers)
        wait_for("all of stderr", lambda: (tmp_path / "stderr").read_text() == "err\n")
        assert (tmp_path / "called").read_text() == f"default {container_id} key value\n"
