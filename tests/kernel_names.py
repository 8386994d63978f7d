"""The kernels that must be compiled, from the plan's tiles, and those that are, from their mangled names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from typing_extensions import Self

from fused_cna.plan import planner
from tests.machine_code import CUDA_CORES, TENSOR_CORES, WARPGROUP_TENSOR_CORES

DTYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

ADDRESSING = ("plain", "masked", "pointwise")
"""How an implicit GEMM finds the rows of its left matrix."""

_DTYPE = re.compile(r"I(f|6__half|13__nv_bfloat16)")
_NUMBER = re.compile(r"L(?:[ib]|N\w*?\d+[A-Za-z]+E)(\d+)E")
_ROWS = re.compile(r"\d([A-Z][a-z]+)Rows")

Fields = dict[str, int]


@dataclass(frozen=True)
class Family:
    """The kernels of one name.

    Attributes:
        products: the opcodes of its products.
        tile: the fields of a tile, as the plan lists them and as the template arguments begin.
        label: a tile in words, of ``Instantiation.fields``.
        rest: the other template arguments; ``_variants`` says their values.
        blocks: what the launch bounds promise where no tile says it.
        mark: what only its mangled names hold; else the function.
        k_bytes: the bytes of a row in a step, where no tile says it.
        architectures: those that it is for; for others it is compiled to nothing.
    """

    products: str
    tile: str = ""
    label: str = ""
    rest: str = ""
    blocks: int = 1
    mark: str = ""
    k_bytes: int = 32
    architectures: tuple[str, ...] = ("sm_80", "sm_90a")

    @property
    def arguments(self) -> list[str]:
        return f"{self.tile} {self.rest}".split()


def _gemm(products: str, mark: str) -> Family:
    tile = "m n k_bytes stages warps_m warps_n blocks narrow any_filter"
    return Family(products, tile, "{m}x{n}x{k}", "access_bytes addressing", mark=mark)


FAMILIES = {
    "implicit_gemm_sm80": _gemm(TENSOR_CORES, "11TensorCores"),
    "implicit_gemm_tf32x3": _gemm(TENSOR_CORES, "22CompensatedTensorCores"),
    "implicit_gemm_fp32": _gemm(CUDA_CORES, "9CudaCores"),
    "implicit_gemm_sm90": Family(
        WARPGROUP_TENSOR_CORES,
        "m n schedule narrow any_filter",
        "{m}x{n}x{k} by {schedule}",
        "access_bytes addressing",
        k_bytes=128,
        architectures=("sm_90a",),
    ),
    "stem": Family(TENSOR_CORES, "m n warps blocks", "{m}x{n}x{k}"),
    "grouped": Family(TENSOR_CORES, "reader column_blocks blocks", "64x8x{column_blocks} by {reader}"),
    "depthwise": Family(
        CUDA_CORES, "filter stride blocks by_value", "{filter}x{filter} stride {stride}", "access_bytes"
    ),
    "depthwise_toeplitz": Family(TENSOR_CORES, "filter_rows", "{filter_rows} rows", blocks=3),
    "small_m": Family(
        CUDA_CORES, "rows channels unroll", "{rows}x{channels}x{unroll}", "access_bytes is_pointwise", 3
    ),
    "direct": Family(CUDA_CORES, "m n k", "{m}x{n}x{k}", blocks=3),
    "split_k": Family(r"FADD\b.*"),
}
"""Every kernel of csrc/kernels. The plan lists no tiles of split_k, which only adds up."""


def _variants(family: str, tile: Fields, value_bytes: int) -> Iterable[tuple[int, ...]]:
    """The arguments after those of a tile that a family's launcher may ask for."""
    if family.startswith("implicit_gemm"):
        found = [(16, "masked")] + [(16, "pointwise")] * (family != "implicit_gemm_sm90")
        found += [(8, "masked"), (4, "masked")] * tile["narrow"] + [(4, "plain")] * tile["any_filter"]
        return [(width, ADDRESSING.index(rows)) for width, rows in found]
    if family == "depthwise":
        return [(0,)] if tile["by_value"] else [(16,), (4,)]
    if family == "small_m":
        return [(16, 1), *((width, 0) for width in (16, 8, 4, 2) if width >= value_bytes)]
    return [()]


@dataclass(frozen=True)
class Instantiation:
    """Of a family's template: dtype, and the other arguments as numbers."""

    family: str
    dtype: str
    arguments: tuple[int, ...]

    @classmethod
    def of(cls, name: str) -> Self:
        """What a mangled name says. A ValueError where the family is unknown, or has other arguments."""
        dtype, rows = _DTYPE.search(name), _ROWS.search(name)
        arguments = [int(number) for number in _NUMBER.findall(name)]
        if rows:
            arguments.append(ADDRESSING.index(rows[1].lower()))
        for family, kind in FAMILIES.items():
            is_it = dtype and (kind.mark or f"{len(family)}{family}I") in name
            if is_it and len(arguments) == len(kind.arguments):
                return cls(family, DTYPES[dtype[1]], tuple(arguments))
        raise ValueError(f"unknown, or mangled in another way than expected: {name}")

    @cached_property
    def fields(self) -> Fields:
        """The arguments by name, the blocks, the values of 16 bytes, and ``k`` of a step."""
        family, value_bytes = FAMILIES[self.family], VALUE_BYTES[self.dtype]
        named = dict(zip(family.arguments, self.arguments, strict=True))
        k = named.get("k_bytes", FAMILIES[self.family].k_bytes) // value_bytes
        return {"blocks": family.blocks, "values": 16 // value_bytes, "k": k, **named}

    @property
    def tile(self) -> str:
        return FAMILIES[self.family].label.format(**self.fields)

    @property
    def rows(self) -> str:
        if "addressing" in self.fields:
            return ADDRESSING[self.fields["addressing"]]
        return "pointwise" if self.fields.get("is_pointwise") else ""


def planned(family: str) -> dict[Instantiation, list[int]]:
    """What a launcher may ask for: threads of a block and, where the tile decides it, shared memory."""
    fields, found = FAMILIES[family].tile.split(), {}
    for dtype, value_bytes in VALUE_BYTES.items():
        for row in [[128]] if family == "split_k" else planner().tiles(family, dtype):
            tile = dict(zip(fields, row, strict=False))
            for rest in _variants(family, tile, value_bytes):
                found[Instantiation(family, dtype, (*tile.values(), *rest))] = row[len(fields) :]
    return found
