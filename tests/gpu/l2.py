"""A Triton kernel that reads the L2: every program reads all of a buffer, past the L1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # values that a program reads at a time


@triton.jit
def read_all(x, sums, blocks: tl.constexpr, block: tl.constexpr):
    """Each program begins at another block, so that they do not read the same at the same time."""
    program = tl.program_id(0)
    total = tl.zeros((block,), tl.float32)
    for step in range(blocks):
        at = (program * 7 + step) % blocks * block
        total += tl.load(x + at + tl.arange(0, block), cache_modifier=".cg")
    tl.store(sums + program, tl.sum(total, 0))


@dataclass(frozen=True)
class Reading:
    """A buffer of ones, and what each program counted of them."""

    x: Tensor
    sums: Tensor

    @classmethod
    def of(cls, nbytes: int, programs: int) -> Reading:
        blocks = max(nbytes // 4 // BLOCK, 1)
        return cls(torch.ones(blocks * BLOCK, device="cuda"), torch.zeros(programs, device="cuda"))

    @property
    def bytes(self) -> int:
        return self.sums.numel() * self.x.nbytes

    def launch(self) -> None:
        read_all[(self.sums.numel(),)](self.x, self.sums, self.x.numel() // BLOCK, BLOCK, num_warps=8)
