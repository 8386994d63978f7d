"""How every kernel came out of the compiler, as a table: ``python -m tests.kernel_report``.

One row for each instantiation in the built extension. What differs between sm_80 (A100) and sm_90a (H100) is
given as a pair.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean

from tests.epilogue_code import epilogue_turns, instructions_per_output
from tests.kernel_names import FAMILIES, VALUE_BYTES, planned
from tests.machine_code import COPIES, LOADS, count, positions, share
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
MAIN_LOOP = ("threads", "registers", "shared KiB", "blocks", "products", "others", "share")
ENDS = ("to first load", "to first product", "memory waits", "an output", "with residual")
MEANS = ("kernel", "instantiations", "to first product", "behind the wait", "memory waits", "at most")

NOTES = """\
Pairs are sm_80 / sm_90a, blocks those that one multiprocessor of an A100 / H100 holds at once; shared memory
and blocks are given where the plan knows the tile, and the tile alone decides them; implicit_gemm_sm90 is for
sm_90a alone. A depthwise filter of 0x0 is any; grouped reads x by 0, chunks of 16 bytes, or 1, words; a
tile of implicit_gemm_sm90 is run by one warpgroup (0), by two together (1) or in turn (2).

Products (HMMA, HGMMA of warpgroups, FFMA of the CUDA cores, or split_k's FADD) and others are the
instructions that a turn of the main loop issues, those that a predicate skips and those of the copies among
them; share is that of the products among them all.

To first load: instructions that lie before the first cp.async, or before the first load where there is none.
To first product: cycles from the entry until the first product is issued, estimated from the instructions
of one warp (tests/issue_model.py). Memory waits: of the loads from memory before it, the most in series, each
asked for once the one before was there; one is the least. Both are given as means by kernel too, with the
most memory waits that an instantiation has. Behind the wait: on sm_90a, what of the cycles lies behind the
wait for the kernel ahead, which hides the rest of a kernel that starts early.

An output: instructions of the shortest turn of the epilogue's loop that stores 16 bytes, for each value in
them; its activation is the identity. With residual: of the shortest that loads 16 bytes of one as well.
To first load and outputs are left out for implicit_gemm_sm90: its warpgroups run different code, its output
goes by bulk copies."""


def pair(values: Iterable[object]) -> str:
    """One value for each architecture, or one where they are the same."""
    return " / ".join(dict.fromkeys(map(str, values)))


def row(kernels: Sequence[CompiledKernel]) -> tuple[str, ...]:
    """A kernel, as compiled for each architecture: under KERNEL, MAIN_LOOP and ENDS."""
    made = kernels[0].made
    access = made.fields.get("access_bytes", 0)
    shared = sum(planned(made.family).get(made, [])[1:])
    loops = [kernel.main_loop for kernel in kernels]
    products = [count(loop, kernels[0].products) for loop in loops]
    return (
        made.family,
        made.tile,
        made.dtype,
        made.rows,
        f"{access} bytes" if access else "",
        str(kernels[0].threads),
        pair(kernel.registers for kernel in kernels),
        f"{shared / 1024:.1f}" if shared else "",
        pair(resident_blocks(kernel, shared) for kernel in kernels) if shared else "",
        pair(products),
        pair(len(loop) - number for loop, number in zip(loops, products, strict=True)),
        pair(f"{share(loop, kernels[0].products):.0%}" for loop in loops),
        *map(pair, zip(*map(end_cells, kernels), strict=True)),
    )


def end_cells(kernel: CompiledKernel) -> tuple[str, ...]:
    """What comes before the first load and the first product, and a turn of the epilogue."""
    product = str(kernel.first_product.cycles), str(kernel.first_product.loads)
    if kernel.made.family == "implicit_gemm_sm90":
        return "", *product, "", ""
    first = min(positions(kernel.code, COPIES) or positions(kernel.code, LOADS))
    value_bytes = VALUE_BYTES[kernel.made.dtype]
    turns = epilogue_turns(kernel.code)
    outputs = (f"{instructions_per_output(turn, value_bytes):.1f}" if turn else "" for turn in turns)
    return str(first), *product, *outputs


def rows(by_architecture: Sequence[Compiled]) -> Iterator[tuple[str, ...]]:
    """Every kernel, by family and as its file instantiates them."""
    for family in FAMILIES:
        by_name = [{each.name: each for each in compiled.get(family, [])} for compiled in by_architecture]
        for name in reversed(by_name[0]):
            kernels = [found[name] for found in by_name]
            yield row([k for k in kernels if k.architecture in FAMILIES[family].architectures])


def means(by_architecture: Sequence[Compiled]) -> Iterator[tuple[str, ...]]:
    """Every family, under MEANS."""
    for family, kind in FAMILIES.items():
        found = [compiled.get(family, []) for compiled in by_architecture]
        moments = [
            [kernel.first_product for kernel in kernels]
            for kernels in found
            if kernels and kernels[0].architecture in kind.architectures
        ]
        yield (
            family,
            pair(map(len, moments)),
            pair(f"{mean(each.cycles for each in of_one):.0f}" for of_one in moments),
            pair(f"{mean(each.cycles - each.waited for each in of_one):.0f}" for of_one in moments[-1:]),
            pair(f"{mean(each.loads for each in of_one):.1f}" for of_one in moments),
            pair(max(each.loads for each in of_one) for of_one in moments),
        )


def print_table(headings: Sequence[str], table: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *table, strict=True)]
    for cells in (headings, *table):
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def print_report(table: Sequence[Sequence[str]], families: Sequence[Sequence[str]]) -> None:
    """A table of the main loops, one of what lies before and after them, one by family, and what they say."""
    names, loops = len(KERNEL), len(KERNEL) + len(MAIN_LOOP)
    print_table(KERNEL + MAIN_LOOP, [cells[:loops] for cells in table])
    print()
    print_table(KERNEL + ENDS, [(*cells[:names], *cells[loops:]) for cells in table])
    print()
    print_table(MEANS, families)
    print(f"\n{NOTES}")


def main() -> int:
    parser = argparse.ArgumentParser(description="How every kernel came out of the compiler.")
    parser.add_argument("--extension", type=Path, help="the extension to read, instead of the one in use")
    extension = parser.parse_args().extension or find_extension()
    if reason := why_unreadable(extension):
        print(f"This report {reason}.")
        return 1
    found = read_extension(extension)
    by_architecture = [found[name] for name in SHARED_BYTES_PER_MULTIPROCESSOR if name in found]
    print_report(list(rows(by_architecture)), list(means(by_architecture)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
