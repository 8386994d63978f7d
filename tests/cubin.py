"""Reads a cubin, the ELF file with the kernels for one architecture: what each of them takes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SYSTEM_SHARED_BYTES = 1024
"""What the system takes of a multiprocessor's shared memory for each block. On 9.0 a cubin counts it too."""

# attributes of .nv.info, and the format of those that say their size: the others are one word
_MAX_THREADS, _MIN_STACK_SIZE, _REGISTERS = 0x05, 0x12, 0x2F
_SIZED = 0x04

_NO_CONTENTS = 8


@dataclass(frozen=True)
class Section:
    info: int
    data: bytes


@dataclass(frozen=True)
class Resources:
    """Registers a thread, threads a block, bytes of local memory a thread, bytes of static shared memory."""

    registers: int
    threads: int
    stack_bytes: int = 0
    shared_bytes: int = 0


def read_resources(cubin: bytes) -> dict[str, Resources]:
    """What each kernel takes, by mangled name.

    Raises:
        ValueError: a kernel has no ``__launch_bounds__``, or this is no cubin.
    """
    sections = read_sections(cubin)
    of_symbols: dict[tuple[int, int], int] = {}
    for code, value in _attributes(sections[".nv.info"].data):
        if code in (_REGISTERS, _MIN_STACK_SIZE):
            symbol, number = struct.unpack("<II", value)
            of_symbols[code, symbol] = number
    reserved = SYSTEM_SHARED_BYTES if ".nv.shared.reserved.0" in sections else 0
    found = {}
    for section, text in sections.items():
        if not section.startswith(".text."):
            continue
        name = section.removeprefix(".text.")
        symbol = text.info & 0xFFFFFF
        attributes = dict(_attributes(sections[f".nv.info.{name}"].data))
        if _MAX_THREADS not in attributes:
            raise ValueError(f"{name} has no __launch_bounds__")
        x, y, z = struct.unpack("<III", attributes[_MAX_THREADS])
        shared = sections.get(f".nv.shared.{name}")
        found[name] = Resources(
            registers=of_symbols[_REGISTERS, symbol],
            threads=x * y * z,
            stack_bytes=of_symbols[_MIN_STACK_SIZE, symbol],
            shared_bytes=len(shared.data) - reserved if shared else 0,
        )
    return found


def read_sections(elf: bytes) -> dict[str, Section]:
    """The sections of a 64-bit ELF file, by name; zeros for what has a size only, such as shared memory."""
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("this is no 64-bit ELF file")
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, number, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, start + i * size) for i in range(number)]
    first_name = headers[names][4]
    found = {}
    for name, kind, _, _, offset, length, _, info, _, _ in headers:
        at = first_name + name
        data = bytes(length) if kind == _NO_CONTENTS else elf[offset : offset + length]
        found[elf[at : elf.index(b"\0", at)].decode()] = Section(info, data)
    return found


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Code and value of the attributes in a section ``.nv.info``, those of one word left out."""
    at = 0
    while at < len(data):
        form, code, size = struct.unpack_from("<BBH", data, at)
        at += 4
        if form == _SIZED:
            yield code, data[at : at + size]
            at += size
