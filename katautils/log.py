"""One logfmt line per record, into containerd's log of the shim (or any other file descriptor).

    time=2026-01-02T03:04:05.678901Z level=info msg="..." source=virtcontainers.vm sandbox=... container=...

A traceback is one more field, `error`, with its newlines escaped: a record is always one line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time

_MAX_LINE = 32 << 10
"""Bytes; the fifo of containerd's log takes 64 KiB before it blocks."""

_LEVELS = {"WARNING": "warning", "CRITICAL": "fatal"}

_FIELDS = ("sandbox", "container")


class LogfmtFormatter(logging.Formatter):
    """`sandbox` is written where a record brings none of its own."""

    def __init__(self, sandbox: str = "") -> None:
        super().__init__()
        self.sandbox = sandbox

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = [
            f"time={seconds}.{int(record.created % 1 * 1_000_000):06}Z",
            f"level={_LEVELS.get(record.levelname, record.levelname.lower())}",
            f"msg={quote(record.getMessage(), always=True)}",
            f"source={quote(record.name)}",
        ]
        for name in _FIELDS:
            value = getattr(record, name, None) or (self.sandbox if name == "sandbox" else "")
            if value:
                line.append(f"{name}={quote(str(value))}")
        if record.exc_info:
            line.append(f"error={quote(self.formatException(record.exc_info), always=True)}")
        if record.stack_info:
            line.append(f"stack={quote(record.stack_info, always=True)}")
        return " ".join(line)


def quote(text: str, *, always: bool = False) -> str:
    """A logfmt value; JSON's escapes are the ones that its parsers know."""
    plain = text and text.isprintable() and not any(c in text for c in ' "=\\')
    return text if plain and not always else json.dumps(text, ensure_ascii=False)


class FdHandler(logging.Handler):
    """Writes each record with one write(2), unbuffered. A log that cannot be written (containerd is gone, or
    does not read a non-blocking fifo) is no reason to fail: the record is lost."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode(errors="backslashreplace")
        except Exception:
            # A caller's mistake: arguments that do not fit the message.
            line = f'level=error msg="a record that cannot be formatted" source={record.name}'.encode()
        if len(line) > _MAX_LINE:
            # Cut where no escape is cut in two, and close the quotes.
            line = line[: _MAX_LINE - 16].rstrip(b"\\") + b'..."'
        with contextlib.suppress(OSError):
            os.write(self.fd, line + b"\n")


def setup(fd: int, *, debug: bool = False, sandbox: str = "") -> None:
    """Send every logger's records to `fd` and nowhere else: from info on, with `debug` all."""
    handler = FdHandler(fd)
    handler.setFormatter(LogfmtFormatter(sandbox))
    logging.getLogger().handlers[:] = [handler]
    set_debug(debug)


def set_debug(debug: bool) -> None:
    """`enable_debug` of [runtime], once the configuration is known."""
    logging.getLogger().setLevel(logging.DEBUG if debug else logging.INFO)
    # asyncio's own debug records are not about containers.
    logging.getLogger("asyncio").setLevel(logging.WARNING)
