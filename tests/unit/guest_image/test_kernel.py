from __future__ import annotations

import gzip
import lzma
import struct

import pytest

from guest.image import kernel
from tests.unit.guest_image.elf_files import kernel_with_note


def no_zstd(data: bytes) -> bytes:
    raise AssertionError("nothing here is compressed with zstd")


def bz_image(payload: bytes) -> bytes:
    """A setup of two sectors, and the payload 16 bytes into what follows."""
    setup = bytearray(3 * 512)
    setup[0x1F1] = 2
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, 16, len(payload))
    return bytes(setup) + bytes(16) + payload + b"trailing"


def with_size(compressed: bytes, size: int) -> bytes:
    return compressed + struct.pack("<I", size)


KERNEL = kernel_with_note(b"Xen\0", 18)


def test_a_kernel_compressed_with_xz_comes_out() -> None:
    image = bz_image(with_size(lzma.compress(KERNEL, check=lzma.CHECK_CRC32), len(KERNEL)))
    assert kernel.extract(image, decompress_zstd=no_zstd) == KERNEL


def test_a_kernel_compressed_with_gzip_comes_out() -> None:
    # gzip's own last four bytes are the size.
    image = bz_image(gzip.compress(KERNEL))
    assert kernel.extract(image, decompress_zstd=no_zstd) == KERNEL


def test_zstd_gets_the_payload_without_the_size() -> None:
    compressed = b"\x28\xb5\x2f\xfd..."
    given = []

    def decompress(data: bytes) -> bytes:
        given.append(data)
        return KERNEL

    image = bz_image(with_size(compressed, len(KERNEL)))
    assert kernel.extract(image, decompress_zstd=decompress) == KERNEL
    assert given == [compressed]


def test_a_kernel_that_unpacks_to_another_size_is_refused() -> None:
    image = bz_image(with_size(lzma.compress(KERNEL), len(KERNEL) + 1))
    with pytest.raises(kernel.KernelError, match=rf"{len(KERNEL)} bytes, expected {len(KERNEL) + 1}"):
        kernel.extract(image, decompress_zstd=no_zstd)


def test_an_unknown_compression_is_named_by_its_first_bytes() -> None:
    with pytest.raises(kernel.KernelError, match="42 5a 68 39"):
        kernel.extract(bz_image(b"BZh9" + bytes(100)), decompress_zstd=no_zstd)


def test_what_is_not_a_bz_image_is_refused() -> None:
    with pytest.raises(kernel.KernelError, match="not a bzImage"):
        kernel.extract(KERNEL.ljust(4096, b"\0"), decompress_zstd=no_zstd)


def test_the_pvh_entry_is_a_note_of_xen() -> None:
    assert kernel.has_pvh_entry(KERNEL)
    assert not kernel.has_pvh_entry(kernel_with_note(b"Xen\0", 17))
    assert not kernel.has_pvh_entry(kernel_with_note(b"GNU\0", 18))
