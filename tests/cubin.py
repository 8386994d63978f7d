"""Reads from a cubin, an ELF file, what cuobjdump's summary of it leaves out."""

from __future__ import annotations

import struct

# in .nv.info: the attribute with the block's sides, and the format of attributes that say their size
_MAX_THREADS, _SIZED = 0x05, 0x04


def read_sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a 64-bit ELF file, by name.

    Raises:
        ValueError: this is no such file.
    """
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("this is no 64-bit ELF file")
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, number, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(number)]
    first_name = headers[names][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        at = first_name + name
        found[elf[at : elf.index(b"\0", at)].decode()] = elf[offset : offset + length]
    return found


def most_threads(info: bytes) -> int:
    """The threads of a block that a kernel's section ``.nv.info`` promises.

    Raises:
        ValueError: the kernel has no ``__launch_bounds__``.
    """
    at = 0
    while at < len(info):
        form, code, size = struct.unpack_from("<BBH", info, at)
        if (form, code) == (_SIZED, _MAX_THREADS):
            x, y, z = struct.unpack_from("<III", info, at + 4)
            return x * y * z
        at += 4 + (size if form == _SIZED else 0)
    raise ValueError("a kernel has no __launch_bounds__")
