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
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path

from tests.cubin import most_threads, read_sections
from tests.kernel_names import Instantiation, family_of
from tests.machine_code import Code, count, parse_section

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "sass"
EXTENSIONS_KEPT = 3

REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
SYSTEM_SHARED_BYTES = 1024
"""What the system takes of shared memory for each block. On 9.0 a cubin counts it too."""
SHARED_BYTES_PER_MULTIPROCESSOR = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}


_USAGE = re.compile(r"Function (\w+):\n *REG:(\d+) STACK:(\d+) SHARED:(\d+) ")


@dataclass(frozen=True)
class Resources:
    """Registers a thread, threads a block, bytes of local memory a thread, bytes of static shared memory."""

    registers: int
    threads: int
    stack_bytes: int = 0
    shared_bytes: int = 0


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, by mangled name, for one architecture."""

    name: str
    architecture: str
    resources: Resources
    read_code: Callable[[], Code] = field(compare=False, repr=False)

    @cached_property
    def code(self) -> Code:
        return self.read_code()

    @cached_property
    def made(self) -> Instantiation:
        return Instantiation.of(self.name)

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
        architecture = cubin.stem.rpartition(".")[2]
        for kernel in read_cubin(cubin, architecture):
            found.setdefault(architecture, {}).setdefault(family_of(kernel.name), []).append(kernel)
    return found


def read_cubin(cubin: Path, architecture: str) -> list[CompiledKernel]:
    """Every kernel in a cubin. Instructions are read when they are asked for."""
    sections, found = read_sections(cubin.read_bytes()), []
    reserved = SYSTEM_SHARED_BYTES if ".nv.shared.reserved.0" in sections else 0
    for name, *usage in _USAGE.findall(_output("cuobjdump", "-res-usage", str(cubin))):
        registers, stack_bytes, shared_bytes = map(int, usage)
        threads = most_threads(sections[f".nv.info.{name}"])
        resources = Resources(registers, threads, stack_bytes, max(shared_bytes - reserved, 0))
        found.append(CompiledKernel(name, architecture, resources, partial(_read_code, cubin, name)))
    return found


def extract_cubins(extension: Path, cache_folder: Path) -> Path:
    """The folder of an extension's cubins, each named by its kernel file and architecture."""
    folder = cache_folder / hashlib.blake2b(extension.read_bytes(), digest_size=8).hexdigest()
    if folder.exists():
        return folder
    cache_folder.mkdir(parents=True, exist_ok=True)
    listed = _output("cuobjdump", "-lelf", str(extension)).splitlines()
    with tempfile.TemporaryDirectory(dir=cache_folder) as temporary:
        result = Path(temporary, "cubins")
        result.mkdir()
        _output("cuobjdump", "-xelf", "all", str(extension), cwd=result)
        if lost := len(listed) - len(list(result.iterdir())):
            raise RuntimeError(f"{lost} kernel files have the name of another, and are lost: {listed}")
        try:
            result.rename(folder)
        except OSError:
            if folder.exists():
                return folder  # another process was faster, with the same result
            raise
    for old in sorted(cache_folder.glob("[0-9a-f]*"), key=os.path.getmtime)[:-EXTENSIONS_KEPT]:
        shutil.rmtree(old)
    return folder


def _read_code(cubin: Path, name: str) -> Code:
    return parse_section(_list_sections(cubin)[name])


@cache
def _list_sections(cubin: Path) -> dict[str, str]:
    """What nvdisasm prints of each kernel. Functions that it calls, not inlined, count as part of it."""
    listing = cubin.with_suffix(".sass")
    if not listing.exists():
        with tempfile.NamedTemporaryFile("w", dir=cubin.parent, suffix=".part", delete=False) as part:
            part.write(_output("nvdisasm", "-c", str(cubin)))
        os.replace(part.name, listing)
    sections = re.split(r"^\s*\.section\s+\.text\.", listing.read_text(), flags=re.MULTILINE)[1:]
    return {section[: section.index(",")]: section for section in sections}


def _output(tool: str, *arguments: str, cwd: Path | None = None) -> str:
    program = find_tool(tool)
    assert program is not None, f"{tool} is gone"
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, check=True, text=True).stdout


def registers_of_a_block(kernel: CompiledKernel) -> int:
    """Registers are given out to a warp in units of 256."""
    return -(-kernel.resources.registers * 32 // 256) * 256 * (kernel.resources.threads // 32)


def resident_blocks(kernel: CompiledKernel, shared_bytes: int) -> int:
    """How many blocks a multiprocessor holds at once, each with so much dynamic shared memory."""
    shared = shared_bytes + kernel.resources.shared_bytes + SYSTEM_SHARED_BYTES
    return min(
        REGISTERS_PER_MULTIPROCESSOR // registers_of_a_block(kernel),
        THREADS_PER_MULTIPROCESSOR // kernel.resources.threads,
        SHARED_BYTES_PER_MULTIPROCESSOR[kernel.architecture] // shared,
    )
