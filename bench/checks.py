"""Is the answer right? Measured in the run that measures the time."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.setting import Precision
from fused_cna._accuracy import error_bound, relative_error

NETWORK_ROOM = 2
"""Roundings of dozens of layers compound by chance, so a network has more room than a layer."""

RIVAL_ROOM = 16
"""A rival beyond this computes something else, and its time is not compared.

Wide on purpose: folding into low-precision weights and tf32 are legitimate.
"""


def allowed_error(eager_error: float, precision: Precision, room: float = 1) -> float:
    """The contract of our kernels, given the error of eager PyTorch, times the `room` that something has.

    An eager result that is not finite permits nothing.
    """
    known = eager_error if math.isfinite(eager_error) else 0.0
    return room * error_bound(precision.dtype, precision.float32_products == "tf32", known)


def largest_image_error(output: Tensor, expected: Tensor) -> float:
    """The largest relative error among the images of a batch (N, ...)."""
    return max(
        relative_error(one, other) for one, other in zip(output.split(1), expected.split(1), strict=True)
    )


CHECKED_IMAGES = 8


def checked_images(batch: int) -> list[int]:
    """Which images are compared with float64: at most 8, spread over the batch, first and last included."""
    count = min(batch, CHECKED_IMAGES)
    return [index * (batch - 1) // max(count - 1, 1) for index in range(count)]


def error_of(
    output: Tensor, expected: Tensor, measure: Callable[[Tensor, Tensor], float] = relative_error
) -> float:
    """The error of the checked images, by `measure`; inf if anything in the whole batch is not finite."""
    if not bool(torch.isfinite(output).all()):
        return torch.inf
    return measure(output[checked_images(len(output))], expected)


POISON = 1e4
"""What no answer holds. Finite, because cuDNN's fused calls read their own unwritten output times zero."""


def poison(output: Tensor) -> None:
    """Fill an answer with a value that no answer holds, and as much free memory once more.

    An allocator that caches hands such memory to the next output: what is then not written shows.
    """
    output.fill_(POISON)
    torch.full_like(output, POISON)


def first_call(call: Callable[[], Tensor]) -> float:
    """Seconds of a first call, with all that libraries search and compile in it; its output is poisoned."""
    start = time.perf_counter()
    output = call()
    if output.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    poison(output)
    return seconds
