"""How every kernel comes out of the compiler, as a table: ``python -m tests.kernel_report``.

The implicit GEMM and small_m by tile, dtype, kind of rows and width of access; the others by dtype.
What differs between sm_80 (A100) and sm_90a (H100) is given as a pair. Needs nvcc and nvdisasm.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence

from tests.machine_code import Loop, count
from tests.sass import (
    SHARED_BYTES_PER_MULTIPROCESSOR,
    Compiled,
    CompiledKernel,
    compile_all,
    find_disassembler,
    gemm_kernel,
    resident_blocks,
    small_m_kernel,
    stem_kernel,
)

HEADINGS = (
    "kernel",
    "tile",
    "dtype",
    "rows",
    "access",
    "threads",
    "registers",
    "shared KiB",
    "blocks",
    "products",
    "others",
    "share",
    "every turn",
)

NOTES = """\
Pairs are sm_80 / sm_90a, blocks those that one multiprocessor of an A100 / H100 holds at once.
Products (HMMA, or FFMA of the CUDA cores) and others are the instructions that a turn of the main loop
issues, those that a predicate skips and those of the copies among them; share is that of the products
among them all, every turn their share of those that no turn jumps over."""

_DTYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}


def pair(values: Sequence[object]) -> str:
    """Both values, or one where they are the same."""
    first, second = map(str, values)
    return first if first == second else f"{first} / {second}"


def gemm_row(kernels: Sequence[CompiledKernel]) -> tuple[str, ...] | None:
    """A row for an instantiation of the implicit GEMM, compiled for both architectures."""
    gemm = gemm_kernel(kernels[0].name)
    if gemm is None:
        return None
    blocks = [
        resident_blocks(kernel, gemm.shared_bytes, architecture)
        for kernel, architecture in zip(kernels, SHARED_BYTES_PER_MULTIPROCESSOR, strict=True)
    ]
    loops = [kernel.main_loop() for kernel in kernels if kernel.code is not None]
    products = [count(loop.all, gemm.products) for loop in loops]
    return (
        gemm.kernel,
        gemm.tile,
        gemm.dtype,
        gemm.rows,
        f"{gemm.access_bytes} bytes",
        str(gemm.threads),
        pair([kernel.resources.registers for kernel in kernels]),
        f"{gemm.shared_bytes / 1024:.1f}",
        pair(blocks),
        pair(products),
        pair([len(loop.all) - count(loop.all, gemm.products) for loop in loops]),
        pair([f"{loop.share(gemm.products):.0%}" for loop in loops]),
        pair([f"{share_of_every_turn(loop, gemm.products):.0%}" for loop in loops]),
    )


def share_of_every_turn(loop: Loop, products: str) -> float:
    return count(loop.every_turn, products) / len(loop.every_turn)


def small_m_row(kernels: Sequence[CompiledKernel]) -> tuple[str, ...] | None:
    """A row for an instantiation of small_m, whose tile is rows x channels of a team x chunks of a step."""
    small_m = small_m_kernel(kernels[0].name)
    if small_m is None:
        return None
    return (
        "small_m",
        f"{small_m.rows}x{small_m.channels}x{small_m.chunks}",
        small_m.dtype,
        "pointwise" if small_m.is_pointwise else "plain",
        f"{small_m.access_bytes} bytes",
        str(kernels[0].bounds.threads),
        pair([kernel.resources.registers for kernel in kernels]),
        *("", "", "", "", "", ""),
    )


def plain_row(file: str, kernels: Sequence[CompiledKernel]) -> tuple[str, ...]:
    """A row for any other kernel."""
    """A row for a kernel other than implicit_gemm_sm80."""
    name = kernels[0].name
    dtype = re.search(r"I(f|6__half|13__nv_bfloat16)", name)
    tile = re.search(r"4TileELi(\d+)ELi(\d+)ELi(\d+)E", name)
    stem = stem_kernel(name)
    return (
        file,
        stem.tile if stem else "x".join(tile.groups()) if tile else "",
        _DTYPES[dtype[1]] if dtype else "",
        *("", ""),
        str(kernels[0].bounds.threads),
        pair([kernel.resources.registers for kernel in kernels]),
        *("", "", "", "", "", ""),
    )


def rows(compiled: Compiled) -> Iterator[tuple[str, ...]]:
    """Every kernel, in the order of the files and of the tiles in them."""
    for file in dict.fromkeys(file for file, _ in compiled):
        by_name = [
            {kernel.name: kernel for kernel in compiled[file, architecture]}
            for architecture in SHARED_BYTES_PER_MULTIPROCESSOR
        ]
        for name in reversed(by_name[0]):
            kernels = [found[name] for found in by_name]
            yield gemm_row(kernels) or small_m_row(kernels) or plain_row(file, kernels)


def print_table(table: Sequence[tuple[str, ...]]) -> None:
    """With rich where it is installed, else in plain columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(HEADINGS, *table, strict=True)]
        for row in (HEADINGS, *table):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    pretty = Table(*HEADINGS, box=None, pad_edge=False)
    for row in table:
        pretty.add_row(*row)
    console = Console()
    # a pipe has no width of its own, and a cut cell says nothing
    Console(width=console.width if console.is_terminal else 160).print(pretty)


def main() -> int:
    if shutil.which("nvcc") is None or find_disassembler() is None:
        print("This report needs nvcc on PATH, and nvdisasm of the CUDA toolkit or of the triton package.")
        return 1
    print_table(list(rows(compile_all(SHARED_BYTES_PER_MULTIPROCESSOR))))
    print(f"\n{NOTES}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
