"""What the mangled name of a kernel says of its instantiation: family, dtype, tile, access."""

from __future__ import annotations

import re
from dataclasses import dataclass

from typing_extensions import Self

DTYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}

_LENGTH = re.compile(r"\d+")
_DTYPE = re.compile(r"I(f|6__half|13__nv_bfloat16)")
_NUMBER = re.compile(r"L(?:[ib]|N\w*?\d+[A-Za-z]+E)(\d+)E")
_ARITHMETIC = re.compile(r"\d([A-Z][A-Za-z]+Cores)E")
_ROWS = re.compile(r"\d([A-Z][a-z]+)Rows")

_GEMM_OF_ARITHMETIC = {
    "TensorCores": "implicit_gemm_sm80",
    "CompensatedTensorCores": "implicit_gemm_tf32x3",
    "CudaCores": "implicit_gemm_fp32",
}


def family_of(name: str) -> str:
    """The kernel as the plan calls it: its function, or which of the implicit GEMMs."""
    function, at = "", len("_ZN")
    while length := _LENGTH.match(name, at):
        at = length.end() + int(length[0])
        function = name[length.end() : at]
    arithmetic = _ARITHMETIC.search(name)
    return _GEMM_OF_ARITHMETIC[arithmetic[1]] if arithmetic else function


def dtype_of(name: str) -> str:
    match = _DTYPE.search(name)
    assert match is not None, f"the names are mangled in another way than expected: {name}"
    return DTYPES[match[1]]


def numbers_of(name: str) -> list[int]:
    """The integers, booleans and enumerators among the template arguments, in order."""
    return [int(number) for number in _NUMBER.findall(name)]


@dataclass(frozen=True)
class Instantiation:
    """Each kind also has ``threads``, of a block, and ``blocks``, that its launch bounds promise."""

    dtype: str

    @property
    def value_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def values(self) -> int:
        """Of 16 bytes."""
        return 16 // self.value_bytes

    @classmethod
    def of(cls, name: str) -> Self:
        """What a mangled name says."""
        return cls(dtype_of(name), *numbers_of(name))


@dataclass(frozen=True)
class GemmKernel(Instantiation):
    m: int
    n: int
    k_bytes: int
    stages: int
    warps_m: int
    warps_n: int
    blocks: int
    access_bytes: int
    rows: str

    @classmethod
    def of(cls, name: str) -> Self:
        rows = _ROWS.search(name)
        assert rows is not None, f"the names are mangled in another way than expected: {name}"
        *tile, access_bytes = numbers_of(name)
        return cls(dtype_of(name), *tile[:7], access_bytes, rows[1].lower())

    @property
    def tile(self) -> str:
        """As the plan prints it."""
        return f"{self.m}x{self.n}x{self.k_bytes // self.value_bytes}"

    @property
    def threads(self) -> int:
        return self.warps_m * self.warps_n * 32

    @property
    def shared_bytes(self) -> int:
        """GemmTile::shared_bytes of csrc/tiles.h, and what the kernel may add to it for alignment."""
        return self.stages * (self.m + self.n) * self.k_bytes + self.m * 16 + self.n * 12 + 128


@dataclass(frozen=True)
class SmallMKernel(Instantiation):
    rows: int
    channels: int
    unroll: int
    access_bytes: int
    is_pointwise: bool
    threads = 128
    blocks = 3

    @property
    def chunks(self) -> int:
        """SmallMTile::unroll_of of csrc/tiles.h: of every row and filter, in a step of one lane."""
        return 1 if self.access_bytes <= 4 else self.unroll

    @property
    def tile(self) -> str:
        return f"{self.rows}x{self.channels}x{self.chunks}"


@dataclass(frozen=True)
class GroupedKernel(Instantiation):
    """``reader`` is the number of a GroupReader."""

    reader: int
    column_blocks: int
    blocks: int
    threads = 256

    @property
    def tile(self) -> str:
        return f"64x{self.column_blocks * 8} {('chunks', 'words')[self.reader]}"


@dataclass(frozen=True)
class DepthwiseKernel(Instantiation):
    """A filter of 0 is any."""

    filter: int
    stride: int
    blocks: int
    by_value: bool
    access_bytes: int
    threads = 128

    @property
    def tile(self) -> str:
        return f"{self.filter}x{self.filter} stride {self.stride}" if self.filter else "any"

    @property
    def shared_bytes(self) -> int:
        """DepthwiseTile::shared_bytes of csrc/tiles.h."""
        taps = self.filter**2 or 32
        return 7 * self.values * 128 * 4 + taps * (8 * self.values + 4) * 4 + 8 * self.values * 12


@dataclass(frozen=True)
class ToeplitzKernel(Instantiation):
    filter_rows: int
    threads = 256
    blocks = 3


@dataclass(frozen=True)
class StemKernel(Instantiation):
    m: int
    n: int
    warps: int
    blocks: int

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def tile(self) -> str:
        """As the plan prints it."""
        return f"{self.m}x{self.n}x{8 if self.dtype == 'float32' else 16}"


@dataclass(frozen=True)
class DirectKernel(Instantiation):
    m: int
    n: int
    k: int
    thread_m: int
    thread_n: int
    threads = 256
    blocks = 3

    @property
    def tile(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"


@dataclass(frozen=True)
class SplitKKernel(Instantiation):
    threads = 128
    blocks = 1


KINDS: dict[str, type[Instantiation]] = {
    "implicit_gemm_sm80": GemmKernel,
    "implicit_gemm_tf32x3": GemmKernel,
    "implicit_gemm_fp32": GemmKernel,
    "stem": StemKernel,
    "grouped": GroupedKernel,
    "depthwise": DepthwiseKernel,
    "depthwise_toeplitz": ToeplitzKernel,
    "small_m": SmallMKernel,
    "direct": DirectKernel,
    "split_k": SplitKKernel,
}
"""Every kernel of csrc/kernels, by family."""
