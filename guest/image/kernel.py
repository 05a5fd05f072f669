"""The kernel out of the compressed file it comes in.

A bzImage spends its first moments unpacking itself, which an emulated processor takes a second or two for.
What is inside is an ELF file that QEMU can start just as well, at its PVH entry (a note of type
XEN_ELFNOTE_PHYS32_ENTRY, CONFIG_PVH=y in Debian's and Ubuntu's kernels). The price is that the kernel stands
where it was linked to (no KASLR), as it does in Kata's own guests.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Callable

_ENTRY_NOTE = b"Xen\0"
_PHYS32_ENTRY = 18


class KernelError(Exception):
    """Not a kernel that can be started."""


def extract(image: bytes, *, decompress_zstd: Callable[[bytes], bytes]) -> bytes:
    """The ELF file in a bzImage, by the header's payload fields (Documentation/arch/x86/boot.rst in the
    kernel)."""
    if image[0x202:0x206] != b"HdrS":
        raise KernelError("not a bzImage: no boot header")
    setup_sectors = image[0x1F1] or 4
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = image[start : start + length]
    # The payload's last four bytes are its size when unpacked.
    (size,) = struct.unpack_from("<I", payload, length - 4)
    if payload.startswith(b"\xfd7zXZ\0"):
        kernel = lzma.LZMADecompressor().decompress(payload)
    elif payload.startswith(b"\x28\xb5\x2f\xfd"):
        kernel = decompress_zstd(payload[:-4])
    elif payload.startswith(b"\x1f\x8b"):
        kernel = zlib.decompressobj(wbits=31).decompress(payload)
    else:
        raise KernelError(
            f"the kernel is compressed in an unknown way: it begins with {payload[:4].hex(' ')}"
        )
    if len(kernel) != size:
        raise KernelError(f"the kernel unpacks to {len(kernel)} bytes, expected {size}")
    return kernel


def has_pvh_entry(kernel: bytes) -> bool:
    """Whether QEMU can start this ELF file without a boot loader."""
    (table,) = struct.unpack_from("<Q", kernel, 0x20)
    entry_size, count = struct.unpack_from("<HH", kernel, 0x36)
    for number in range(count):
        kind, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", kernel, table + number * entry_size)
        if kind != 4:  # PT_NOTE
            continue
        notes = kernel[offset : offset + size]
        position = 0
        while position + 12 <= len(notes):
            name_size, description_size, note = struct.unpack_from("<III", notes, position)
            name = notes[position + 12 : position + 12 + name_size]
            if (name, note) == (_ENTRY_NOTE, _PHYS32_ENTRY):
                return True
            position += 12 + -(-name_size // 4) * 4 + -(-description_size // 4) * 4
    return False
