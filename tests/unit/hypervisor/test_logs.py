import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from virtcontainers.hypervisor.logs import CONSOLE_LIMIT_BYTES, ConsoleLog, tail, with_tail


def test_tail_is_the_last_lines_without_empty_ones(tmp_path: Path) -> None:
    log = tmp_path / "qemu.log"
    log.write_text("".join(f"line {n}\n\n" for n in range(100)))
    assert tail(log, lines=2) == "line 98\nline 99"


def test_tail_of_a_long_log_reads_its_end_only(tmp_path: Path) -> None:
    log = tmp_path / "qemu.log"
    log.write_bytes(b"x" * (1 << 20) + b"\nlast\n")
    assert tail(log).endswith("\nlast")
    assert len(tail(log)) < 20_000


def test_a_guest_cannot_drive_the_users_terminal(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"\x1bc\x1b[2J\x1b[31mred\x07 \xff\x9b31m\r\n\x1b]0;title\x07")
    shown = tail(log)
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 for c in shown)
    assert "red" in shown


def test_no_log_no_tail(tmp_path: Path) -> None:
    assert with_tail("it died", tmp_path / "none.log") == "it died"


def test_the_message_names_the_log_it_shows(tmp_path: Path) -> None:
    (tmp_path / "qemu.log").write_text("why\n")
    assert with_tail("it died", tmp_path / "qemu.log") == "it died\n--- qemu.log:\nwhy"


def test_a_chatty_console_is_bounded_and_keeps_its_end(tmp_path: Path) -> None:
    async def body() -> None:
        console = ConsoleLog(tmp_path / "console.log")
        for n in range(3 * CONSOLE_LIMIT_BYTES // 1024):
            os.write(console.write_fd, f"{n:01023d}\n".encode())
            console.drain()
            assert console.path.stat().st_size <= CONSOLE_LIMIT_BYTES
        assert tail(console.path, lines=1) == f"{n:01023d}"
        assert console.path.stat().st_size >= CONSOLE_LIMIT_BYTES // 2
        console.close()
        console.close()

    asyncio.run(body())


def test_another_process_goes_on_with_a_console(tmp_path: Path) -> None:
    async def body() -> None:
        first = ConsoleLog(tmp_path / "console.log")
        guest = await asyncio.create_subprocess_exec("/bin/cat", stdin=subprocess.PIPE, stdout=first.write_fd)
        assert guest.stdin is not None
        first.started()

        async def say(text: str) -> None:
            assert guest.stdin is not None
            guest.stdin.write(f"{text}\n".encode())
            for _ in range(2000):
                if tail(first.path, lines=1) == text:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("waited 20 s")

        await say("hello")
        first.close()
        second = ConsoleLog(first.path, writer=guest.pid)
        await say("again")
        assert tail(first.path) == "hello\nagain"
        second.close()
        guest.stdin.close()
        await guest.wait()
        with pytest.raises(OSError):
            ConsoleLog(first.path, writer=guest.pid)

    asyncio.run(body())


def test_the_console_is_read_while_nobody_asks(tmp_path: Path) -> None:
    async def body() -> None:
        console = ConsoleLog(tmp_path / "console.log")
        os.write(console.write_fd, b"hello\n")
        for _ in range(1000):
            if tail(console.path) == "hello":
                break
            await asyncio.sleep(0.01)
        assert tail(console.path) == "hello"
        console.started()
        console.close()

    asyncio.run(body())
