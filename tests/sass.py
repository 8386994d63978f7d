"""The kernels in the built extension: what each one takes, and its machine instructions.

The extension's cubins, and their listings as they are asked for, are kept under build/sass/, by the content
of the extension.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

from tests.issue_model import Moment, first_product
from tests.kernel_names import FAMILIES, Instantiation
from tests.locks import locked
from tests.machine_code import Code, count, main_loop, parse_section

CACHE = Path(__file__).resolve().parents[1] / "build" / "sass"
EXTENSIONS_KEPT = 3

REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
SYSTEM_SHARED_BYTES = 1024
"""What the system takes of shared memory for each block. On 9.0 a cubin counts it too."""
SHARED_BYTES_PER_MULTIPROCESSOR = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}

# in .nv.info: the attribute with the block's sides, and the format of attributes that say their size
_MAX_THREADS, _SIZED = 0x05, 0x04
_USAGE = re.compile(r"Function (\w+):\n *REG:(\d+) STACK:(\d+) SHARED:(\d+) ")


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture, and what a thread or a block takes; shared memory is static."""

    name: str
    architecture: str
    registers: int
    threads: int
    stack_bytes: int
    shared_bytes: int
    read_code: Callable[[], Code] = field(compare=False, repr=False)

    @cached_property
    def code(self) -> Code:
        return self.read_code()

    @cached_property
    def made(self) -> Instantiation:
        return Instantiation.of(self.name)

    @property
    def products(self) -> str:
        return FAMILIES[self.made.family].products

    @cached_property
    def main_loop(self) -> Code:
        return main_loop(self.code, self.products)

    @cached_property
    def first_product(self) -> Moment:
        return first_product(self.code, self.products, self.threads)

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode, modifiers included, that ``pattern`` matches as a whole."""
        return count(self.code, pattern)


Compiled = dict[str, list[CompiledKernel]]
"""The kernels for one architecture, by family."""


@cache
def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit on PATH, or the one that triton brings."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.is_file() else None


def find_extension() -> Path | None:
    """The extension that ``import fused_cna`` would load."""
    spec = importlib.util.find_spec("fused_cna._C")
    return Path(spec.origin) if spec and spec.origin else None


def why_unreadable(extension: Path | None) -> str:
    """Why no machine code can be read here; empty where it can."""
    if extension is None:
        return "reads the built extension, and there is none"
    missing = [name for name in ("cuobjdump", "nvdisasm") if find_tool(name) is None]
    return f"needs {missing[0]}, of the CUDA toolkit or of the triton package" if missing else ""


def read_extension(extension: Path, cache_folder: Path = CACHE) -> dict[str, Compiled]:
    """Every kernel in an extension, by architecture and family."""
    found: dict[str, Compiled] = {}
    for cubin in sorted(extract_cubins(extension, cache_folder).glob("*.cubin")):
        # a cuobjdump from before CUDA 13, as older tritons bring it, leaves out what is special to a target
        architecture = cubin.stem.rpartition(".")[2].replace("sm_90a", "sm_90").replace("sm_90", "sm_90a")
        for kernel in read_cubin(cubin, architecture):
            found.setdefault(architecture, {}).setdefault(kernel.made.family, []).append(kernel)
    return found


def read_cubin(cubin: Path, architecture: str) -> list[CompiledKernel]:
    """Every kernel in a cubin. Instructions are read when they are asked for."""
    sections, found = _read_sections(cubin.read_bytes()), []
    reserved = SYSTEM_SHARED_BYTES if ".nv.shared.reserved.0" in sections else 0
    for name, *usage in _USAGE.findall(_output("cuobjdump", "-res-usage", str(cubin))):
        registers, stack_bytes, shared_bytes = map(int, usage)
        threads, static = _most_threads(sections[f".nv.info.{name}"]), max(shared_bytes - reserved, 0)
        read = partial(_read_code, cubin, name, sections[f".text.{name}"])
        found.append(CompiledKernel(name, architecture, registers, threads, stack_bytes, static, read))
    return found


def _read_code(cubin: Path, name: str, encoding: bytes) -> Code:
    return parse_section(_list_sections(cubin)[name], encoding)


def _read_sections(elf: bytes) -> dict[str, bytes]:
    """The sections of a cubin, a 64-bit ELF file, by name."""
    (start,) = struct.unpack_from("<Q", elf, 40)
    size, number, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(number)]
    first_name = headers[names][4]
    found = {}
    for name, _, _, _, offset, length in headers:
        at = first_name + name
        found[elf[at : elf.index(b"\0", at)].decode()] = elf[offset : offset + length]
    return found


def _most_threads(info: bytes) -> int:
    """The threads of a block that a kernel's section ``.nv.info`` promises."""
    at = 0
    while at < len(info):
        form, code, size = struct.unpack_from("<BBH", info, at)
        if (form, code) == (_SIZED, _MAX_THREADS):
            x, y, z = struct.unpack_from("<III", info, at + 4)
            return x * y * z
        at += 4 + (size if form == _SIZED else 0)
    raise ValueError("a kernel has no __launch_bounds__")


def extract_cubins(extension: Path, cache_folder: Path) -> Path:
    """The folder of an extension's cubins, each named by its kernel file and architecture."""
    folder = cache_folder / hashlib.blake2b(extension.read_bytes(), digest_size=8).hexdigest()
    with locked(cache_folder / "lock"):
        if not folder.exists():
            listed = _output("cuobjdump", "-lelf", str(extension)).splitlines()
            new = cache_folder / "new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            _output("cuobjdump", "-xelf", "all", str(extension), cwd=new)
            if lost := len(listed) - len(list(new.iterdir())):
                raise RuntimeError(f"{lost} kernel files have the name of another, and are lost: {listed}")
            new.rename(folder)
            for old in sorted(cache_folder.glob("[0-9a-f]*"), key=os.path.getmtime)[:-EXTENSIONS_KEPT]:
                shutil.rmtree(old)
    return folder


@cache
def _list_sections(cubin: Path) -> dict[str, str]:
    """What nvdisasm prints of each kernel. Functions that it calls, not inlined, count as part of it."""
    listing = cubin.with_suffix(".sass")
    with locked(cubin.with_suffix(".lock")):
        if not listing.exists():
            part = cubin.with_suffix(".part")
            part.write_text(_output("nvdisasm", "-c", str(cubin)))
            part.rename(listing)
    sections = re.split(r"^\s*\.section\s+\.text\.", listing.read_text(), flags=re.MULTILINE)[1:]
    return {section[: section.index(",")]: section for section in sections}


def _output(tool: str, *arguments: str, cwd: Path | None = None) -> str:
    program = find_tool(tool)
    assert program is not None, f"{tool} is gone"
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, check=True, text=True).stdout


def registers_of_a_block(kernel: CompiledKernel) -> int:
    """Registers are given out to a warp in units of 256."""
    return -(-kernel.registers * 32 // 256) * 256 * (kernel.threads // 32)


def resident_blocks(kernel: CompiledKernel, shared_bytes: int) -> int:
    """How many blocks a multiprocessor holds at once, each with so much dynamic shared memory."""
    shared = shared_bytes + kernel.shared_bytes + SYSTEM_SHARED_BYTES
    return min(
        REGISTERS_PER_MULTIPROCESSOR // registers_of_a_block(kernel),
        THREADS_PER_MULTIPROCESSOR // kernel.threads,
        SHARED_BYTES_PER_MULTIPROCESSOR[kernel.architecture] // shared,
    )
