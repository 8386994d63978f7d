"""Compiles a kernel file with nvcc and reads the result: resources, launch bounds, machine instructions."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """What ``ptxas -v`` says of one kernel. Shared memory is the static one; ptxas knows no other."""

    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class LaunchBounds:
    """``__launch_bounds__``: threads a block, and blocks that must fit a multiprocessor (0: not said)."""

    threads: int
    blocks: int


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel, by mangled name, for one architecture. ``opcodes`` is None without a disassembler."""

    name: str
    resources: Resources
    bounds: LaunchBounds
    opcodes: tuple[str, ...] | None

    def count(self, pattern: str) -> int:
        """How many instructions have an opcode, modifiers included, that ``pattern`` matches as a whole."""
        assert self.opcodes is not None
        return sum(re.fullmatch(pattern, opcode) is not None for opcode in self.opcodes)


def parse_resources(log: str) -> dict[str, Resources]:
    """Resources by mangled name, from what nvcc prints with ``-Xptxas -v``."""
    found: dict[str, Resources] = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'([^']+)'", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        used = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        if name is None or frame is None or used is None:
            raise ValueError(f"ptxas printed something else than expected: {part[:300]!r}")
        stack, stores, loads = map(int, frame.groups())
        found[name[1]] = Resources(int(used[1]), stack, stores, loads, int(shared[1]) if shared else 0)
    return found


def parse_launch_bounds(ptx: str) -> dict[str, LaunchBounds]:
    """Launch bounds by mangled name, from PTX."""
    found: dict[str, LaunchBounds] = {}
    for part in re.split(r"^\.visible \.entry ", ptx, flags=re.MULTILINE)[1:]:
        name, head = part[: part.index("(")], part[: part.index("{")]
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+))?(?:, (\d+))?", head)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        if threads is None:
            raise ValueError(f"{name} has no __launch_bounds__")
        x, y, z = (int(extent or 1) for extent in threads.groups())
        found[name] = LaunchBounds(x * y * z, int(blocks[1]) if blocks else 0)
    return found


def parse_opcodes(listing: str) -> dict[str, tuple[str, ...]]:
    """The opcodes of each kernel in order, modifiers included, by mangled name, from nvdisasm's listing.

    Functions that a kernel calls and that were not inlined lie in its section and so count as part of it.
    """
    found: dict[str, tuple[str, ...]] = {}
    for part in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)[1:]:
        instructions = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part, re.MULTILINE)
        found[part[: part.index(",")]] = tuple(instructions)
    return found


def find_disassembler() -> str | None:
    """nvdisasm of the toolkit on PATH, or the one that triton brings."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(bundled) if bundled.is_file() else None


def compile_kernels(
    source: Path, architecture: str, include: Path, flags: list[str], folder: Path
) -> list[CompiledKernel]:
    """Compiles one .cu file for an architecture such as ``sm_90a`` and reads every kernel in it.

    Args:
        flags: nvcc's, as the build uses them.
        folder: where the files go; must be empty or new.

    Raises:
        RuntimeError: it does not compile. Has all that nvcc printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cubin = folder / f"{source.stem}.cubin"
    target = f"-gencode=arch={architecture.replace('sm_', 'compute_')},code={architecture}"
    intermediate = ["--keep", "--keep-dir", str(folder)]
    command = ["nvcc", "-cubin", target, *flags, f"-I{include}", "-Xptxas", "-v", *intermediate]
    done = subprocess.run(
        [*command, str(source), "-o", str(cubin)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"nvcc could not compile {source} for {architecture}:\n{done.stdout}")
    resources = parse_resources(done.stdout)
    bounds = parse_launch_bounds((folder / f"{source.stem}.ptx").read_text())
    opcodes: dict[str, tuple[str, ...]] = {}
    if disassembler := find_disassembler():
        listing = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, check=True, text=True)
        opcodes = parse_opcodes(listing.stdout)
    return [
        CompiledKernel(name, resources[name], bounds[name], opcodes[name] if opcodes else None)
        for name in resources
    ]
