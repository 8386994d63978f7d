"""Is the answer right? Measured in the run that measures the time."""

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
OURS_TIMES_EAGER = 1.05
OURS_ROUNDOFFS = 4
NETWORK_TIMES_EAGER = 2
RIVAL_TIMES_EAGER = 16


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of float64 `expected`; inf where anything is not finite."""
    difference = torch.linalg.vector_norm(output.double() - expected)
    error = float(difference / torch.linalg.vector_norm(expected))
    return error if math.isfinite(error) else math.inf


def largest_image_error(output: Tensor, expected: Tensor) -> float:
    """The largest relative error among the images of a batch (N, ...)."""
    return max(relative_error(one, other) for one, other in zip(output, expected, strict=True))


def allowed_for_us(eager_error: float, dtype: torch.dtype) -> float:
    """The numerics contract: eager's own error with a margin, or a few roundoffs of the storage type."""
    return max(OURS_TIMES_EAGER * eager_error, OURS_ROUNDOFFS * UNIT_ROUNDOFF[dtype])


def allowed_for_networks(eager_error: float, dtype: torch.dtype) -> float:
    """Roundings of dozens of layers compound by chance, so a network has more room than a layer."""
    return max(NETWORK_TIMES_EAGER * eager_error, OURS_ROUNDOFFS * UNIT_ROUNDOFF[dtype])


def allowed_for_rivals(eager_error: float, dtype: torch.dtype) -> float:
    """A rival beyond this computes something else, and its time is not compared.

    Wide on purpose: folding into low-precision weights and tf32 are legitimate.
    """
    return RIVAL_TIMES_EAGER * max(eager_error, UNIT_ROUNDOFF[dtype])


POISON = 1e4
"""What no answer holds. Finite, because cuDNN's fused calls read their own unwritten output times zero."""


def poison(output: Tensor) -> None:
    """Fill an answer with a value that no answer holds, and as much free memory once more.

    An allocator that caches hands such memory to the next output: what is then not written shows.
    """
    output.fill_(POISON)
    torch.full_like(output, POISON)
