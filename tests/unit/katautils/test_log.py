from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from katautils import log as katautils_log

TIME = r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"


class Log:
    def __init__(self, path: Path, **setup: object) -> None:
        self.path = path
        self.fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        katautils_log.setup(self.fd, **setup)  # type: ignore[arg-type]

    def lines(self) -> list[str]:
        return self.path.read_text().removesuffix("\n").split("\n") if self.path.stat().st_size else []


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


log = logging.getLogger("virtcontainers.vm")


def test_a_record_is_one_logfmt_line(tmp_path: Path) -> None:
    out = Log(tmp_path / "log", sandbox="s1")
    log.info("started in %d ms", 12)
    log.warning('say "hi"\nand\tmore', extra={"container": "c1"})
    log.error("of another", extra={"sandbox": "s 2"})
    first, second, third = out.lines()
    assert re.fullmatch(
        rf'{TIME} level=info msg="started in 12 ms" source=virtcontainers\.vm sandbox=s1', first
    )
    assert second.partition(" ")[2] == (
        r'level=warning msg="say \"hi\"\nand\tmore" source=virtcontainers.vm sandbox=s1 container=c1'
    )
    assert third.endswith('level=error msg="of another" source=virtcontainers.vm sandbox="s 2"')


def test_a_traceback_is_one_field(tmp_path: Path) -> None:
    out = Log(tmp_path / "log")
    try:
        raise ValueError('bad "value"\nsecond line')
    except ValueError:
        log.exception("it failed")
    (line,) = out.lines()
    error = json.loads(line.partition(" error=")[2])
    assert error.startswith("Traceback (most recent call last):\n")
    assert error.endswith('ValueError: bad "value"\nsecond line')
    assert "sandbox=" not in line


def test_debug_is_off_until_it_is_asked_for(tmp_path: Path) -> None:
    out = Log(tmp_path / "log")
    log.debug("one")
    katautils_log.set_debug(True)
    log.debug("two")
    logging.getLogger("asyncio").debug("not about containers")
    katautils_log.set_debug(False)
    log.debug("three")
    assert [re.search('msg="(.*?)"', line)[1] for line in out.lines()] == ["two"]  # type: ignore[index]
    out = Log(tmp_path / "other", debug=True)
    log.debug("four")
    assert "level=debug" in out.lines()[0]


def test_a_second_setup_replaces_the_first(tmp_path: Path) -> None:
    first, second = Log(tmp_path / "first"), Log(tmp_path / "second")
    log.info("x")
    assert (len(first.lines()), len(second.lines())) == (0, 1)


def test_no_line_is_too_long_for_the_fifo(tmp_path: Path) -> None:
    out = Log(tmp_path / "log")
    log.info("x" * 100_000)
    log.info("\n" * 100_000)
    for line in out.lines():
        assert len(line) <= 32 << 10
        assert line.endswith('..."')


@pytest.mark.parametrize("text", ["é", "\udcff", "\x00", "a=b", "\u2028"])
def test_any_text_can_be_logged(tmp_path: Path, text: str) -> None:
    out = Log(tmp_path / "log")
    log.info("%s", text, extra={"container": text})
    assert out.path.read_bytes().count(b"\n") == 1
    assert len(out.lines()) == 1


def test_a_mistake_in_a_log_call_does_not_stop_anything(tmp_path: Path) -> None:
    out = Log(tmp_path / "log")
    log.info("%d", "no number")
    log.info("next")
    assert [line.partition("msg=")[2].partition(" source")[0] for line in out.lines()] == [
        '"a record that cannot be formatted"',
        '"next"',
    ]


def test_a_fifo_that_nobody_reads_loses_lines_and_nothing_else() -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    katautils_log.setup(writer)
    for _ in range(100):
        log.info("x" * 4000)
    os.close(reader)
    log.info("nobody")
    os.close(writer)
    log.info("closed")
