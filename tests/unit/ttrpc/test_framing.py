"""Frames as bytes: what PROTOCOL.md says, and what hypothesis thinks of."""

import asyncio
import logging
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.ttrpc.echo import Text, calling
from ttrpc import ProtocolError, StatusError, framing, snake_case
from ttrpc.chardev import Unescaper, escape


def read(data: bytes, limit: int = framing.MAX_MESSAGE_BYTES) -> framing.Frame | None:
    async def body() -> framing.Frame | None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        return await framing.read_frame(reader, limit)

    return asyncio.run(body())


def test_header_is_as_the_protocol_says() -> None:
    assert framing.encode(0x01020305, framing.DATA, 0x05, b"ab") == bytes.fromhex(
        "00000002 01020305 03 05 6162"
    )


@given(st.integers(0, 2**32 - 1), st.integers(0, 255), st.integers(0, 255), st.binary(max_size=300))
def test_what_is_encoded_is_read(stream_id: int, type_: int, flags: int, payload: bytes) -> None:
    assert read(framing.encode(stream_id, type_, flags, payload)) == (stream_id, type_, flags, payload, 0)


def test_end_of_connection_is_clean_between_frames_only() -> None:
    assert read(b"") is None
    with pytest.raises(ProtocolError, match="inside a frame"):
        read(framing.encode(1, 1, 0, b"abc")[:-1])
    with pytest.raises(ProtocolError, match="inside a frame"):
        read(b"\0\0\0")


def test_reserved_byte_must_be_zero() -> None:
    with pytest.raises(ProtocolError, match="0x01, expected 0"):
        read(b"\x01\0\0\0" + bytes(6))


def test_oversized_payload_is_thrown_away() -> None:
    frame = read(framing.encode(7, 1, 0, bytes(5000)) + b"x", limit=1000)
    assert frame is not None
    assert (frame.stream_id, frame.payload, frame.oversized) == (7, b"", 5000)
    with pytest.raises(StatusError, match="5000 exceed maximum message size of 1000"):
        framing.check_size(frame.oversized, 1000)


@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=64),
            st.builds(
                framing.encode,
                st.integers(0, 20),
                st.integers(0, 4),
                st.integers(0, 7),
                st.one_of(st.binary(max_size=64), st.just(b"\x0a\x0ftests.echo.Echo\x12\x04Chat")),
            ),
        ),
        max_size=8,
    )
)
def test_no_bytes_bring_the_server_down(pieces: list[bytes]) -> None:
    async def body() -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "s"
            async with calling(path) as (echo, _, _):
                reader, writer = await asyncio.open_unix_connection(str(path))
                for piece in pieces:
                    writer.write(piece)
                writer.write_eof()
                async with asyncio.timeout(30):
                    await reader.read()
                    assert (await echo.say(Text(text="alive"))).text == "alive"
                writer.close()

    logging.disable(logging.CRITICAL)
    try:
        asyncio.run(body())
    finally:
        logging.disable(logging.NOTSET)


@given(st.lists(st.binary(max_size=40)), st.integers(1, 7))
def test_escaping_leaves_no_mark_and_is_undone_at_any_cut(pieces: list[bytes], step: int) -> None:
    data = b"".join(pieces)
    escaped = b"".join(map(escape, pieces))
    assert b"\x7e" not in escaped
    unescaper = Unescaper()
    cut = [escaped[i : i + step] for i in range(0, len(escaped), step)]
    assert b"".join(map(unescaper.feed, cut)) == data


@given(st.lists(st.sampled_from([b"\x7d", b"\x7e", b"\x5d", b"\x5e", b"a"])), st.integers(1, 4))
def test_escaping_of_the_special_bytes_themselves(pieces: list[bytes], step: int) -> None:
    data = b"".join(pieces)
    escaped = escape(data)
    unescaper = Unescaper()
    cut = [escaped[i : i + step] for i in range(0, len(escaped), step)]
    assert b"".join(map(unescaper.feed, cut)) == data


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("CreateContainer", "create_container"),
        ("OnlineCPUMem", "online_cpu_mem"),
        ("GetOOMEvent", "get_oom_event"),
        ("CloseIO", "close_io"),
        ("AddARPNeighbors", "add_arp_neighbors"),
        ("GetIPTables", "get_ip_tables"),
        ("State", "state"),
    ],
)
def test_method_names_in_snake_case(method: str, name: str) -> None:
    assert snake_case(method) == name
