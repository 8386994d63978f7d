"""How every kernel came out of the compiler, as a table: ``python -m tests.kernel_report``.

One row for each instantiation in the built extension. What differs between sm_80 (A100) and sm_90a (H100) is
given as a pair.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.epilogue_code import (
    before_the_first_load,
    epilogue_turns,
    instructions_per_output,
    residual_loads_under_way,
    shared_loads,
)
from tests.kernel_names import KINDS, GemmKernel
from tests.machine_code import CUDA_CORES, TENSOR_CORES, Code, Loop, count, main_loop
from tests.sass import (
    SHARED_BYTES_PER_MULTIPROCESSOR,
    Compiled,
    CompiledKernel,
    find_extension,
    read_extension,
    resident_blocks,
    why_unreadable,
)

KERNEL = ("kernel", "tile", "dtype", "rows", "access")
MAIN_LOOP = ("threads", "registers", "shared KiB", "blocks", "products", "others", "share", "every turn")
ENDS = ("to first load", "an output", "with residual", "under way", "LDS a turn")

NOTES = """\
Pairs are sm_80 / sm_90a, blocks those that one multiprocessor of an A100 / H100 holds at once.

Products (HMMA, or FFMA of the CUDA cores) and others are the instructions that a turn of the main loop
issues, those that a predicate skips and those of the copies among them; share is that of the products
among them all, every turn their share of those that no turn jumps over.

To first load: instructions before the first cp.async, or before the first load where there is none, on the
shortest path, taken by a thread that has no share in the tables; after the +, how many more lie before it.
An output: instructions of the shortest turn of the epilogue's loop that stores 16 bytes, for each value in
them; its activation is the identity. With residual: of the shortest turn that loads 16 bytes of one as well.
Under way: 16-byte loads of the residual that a thread has started when it first waits for one of them.
LDS a turn: loads from shared memory in a turn without a residual, number x bits; two of 128 bits are the
accumulators."""


def pair(values: Iterable[object]) -> str:
    """One value for each architecture, or one where they are the same."""
    return " / ".join(dict.fromkeys(map(str, values)))


def row(family: str, kernels: Sequence[CompiledKernel]) -> tuple[str, ...]:
    """A kernel, as compiled for each architecture: under KERNEL, MAIN_LOOP and ENDS."""
    made = KINDS[family].of(kernels[0].name)
    access = getattr(made, "access_bytes", 0)
    return (
        family,
        getattr(made, "tile", ""),
        made.dtype,
        made.rows if isinstance(made, GemmKernel) else "pointwise" * getattr(made, "is_pointwise", False),
        f"{access} bytes" if access else "",
        str(kernels[0].resources.threads),
        pair(kernel.resources.registers for kernel in kernels),
        *(main_loop_cells(family, made, kernels) if isinstance(made, GemmKernel) else [""] * 6),
        *map(pair, zip(*(end_cells(kernel.code, made.value_bytes) for kernel in kernels), strict=True)),
    )


def main_loop_cells(family: str, gemm: GemmKernel, kernels: Sequence[CompiledKernel]) -> tuple[str, ...]:
    """Shared memory, blocks and main loop of an implicit GEMM."""
    products = CUDA_CORES if family == "implicit_gemm_fp32" else TENSOR_CORES
    loops = [main_loop(kernel.code, products) for kernel in kernels]
    numbers = [count(loop.all, products) for loop in loops]
    return (
        f"{gemm.shared_bytes / 1024:.1f}",
        pair(resident_blocks(kernel, gemm.shared_bytes) for kernel in kernels),
        pair(numbers),
        pair(len(loop.all) - number for loop, number in zip(loops, numbers, strict=True)),
        pair(f"{loop.share(products):.0%}" for loop in loops),
        pair(f"{share_of_every_turn(loop, products):.0%}" for loop in loops),
    )


def end_cells(code: Code, value_bytes: int) -> tuple[str, ...]:
    """What lies before the first load, and a turn of the epilogue."""
    path, position = before_the_first_load(code)
    plain, with_residual = epilogue_turns(code)
    loads = sorted(shared_loads(plain).items(), reverse=True)
    return (
        f"{path}+{position - path}",
        f"{instructions_per_output(plain, value_bytes):.1f}" if plain else "",
        f"{instructions_per_output(with_residual, value_bytes):.1f}" if with_residual else "",
        str(residual_loads_under_way(with_residual) or "?") if with_residual else "",
        " ".join(f"{number}x{bits}" for bits, number in loads),
    )


def share_of_every_turn(loop: Loop, products: str) -> float:
    return count(loop.every_turn, products) / len(loop.every_turn)


def rows(by_architecture: Sequence[Compiled]) -> Iterator[tuple[str, ...]]:
    """Every kernel, by family and as its file instantiates them."""
    for family in KINDS:
        by_name = [
            {kernel.name: kernel for kernel in compiled.get(family, [])} for compiled in by_architecture
        ]
        for name in reversed(by_name[0]):
            yield row(family, [found[name] for found in by_name])


def print_table(headings: Sequence[str], table: Sequence[Sequence[str]]) -> None:
    """With rich where it is installed, else in plain columns."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(headings, *table, strict=True)]
        for cells in (headings, *table):
            print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        return
    pretty = Table(*headings, box=None, pad_edge=False)
    for cells in table:
        pretty.add_row(*cells)
    console = Console()
    # a pipe has no width of its own, and a cut cell says nothing
    Console(width=console.width if console.is_terminal else 160).print(pretty)


def print_report(table: Sequence[Sequence[str]]) -> None:
    """A table of the main loops, one of what lies before and after them, and what they say."""
    names, loops = len(KERNEL), len(KERNEL) + len(MAIN_LOOP)
    print_table(KERNEL + MAIN_LOOP, [cells[:loops] for cells in table])
    print()
    print_table(KERNEL + ENDS, [(*cells[:names], *cells[loops:]) for cells in table])
    print(f"\n{NOTES}")


def main() -> int:
    parser = argparse.ArgumentParser(description="How every kernel came out of the compiler.")
    parser.add_argument("--extension", type=Path, help="the extension to read, instead of the one in use")
    extension = parser.parse_args().extension or find_extension()
    if reason := why_unreadable(extension):
        print(f"This report {reason}.")
        return 1
    found = read_extension(extension)
    print_report(list(rows([found[name] for name in SHARED_BYTES_PER_MULTIPROCESSOR if name in found])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
