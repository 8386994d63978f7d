"""`python -m tests.simt.digest bench/data/conv_layers.csv`: what real layers give, bit for bit.

Prints a line for each layer and kernel, with the plan and the SHA-256 of its results. Two versions of the
kernels that should compute the same print the same:

    python -m tests.simt.digest bench/data/conv_layers.csv > before
    python -m tests.simt.digest bench/data/conv_layers.csv > after && diff before after
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from tests import simt
from tests.layouts import channels_last
from tests.reference import ACTIVATIONS, DTYPES, Problem
from tests.simt.conv import list_plans

LARGEST_IMAGE = 14  # rows and columns: more adds time, and no branch of a kernel
SLOW_PRODUCTS = 20_000_000  # beyond, `direct`, which takes any layer, is left out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("layers", help="a table of layers with the columns of conv_layers.csv")
    parser.add_argument("--sample", type=int, default=200, help="layers, chosen by the seed (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and the inputs (default 0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    given = parser.parse_args()
    with open(given.layers, newline="") as file:
        layers = list(csv.DictReader(file))
    chosen = random.Random(given.seed).sample(layers, given.sample)
    with ProcessPoolExecutor(given.workers) as pool:
        for lines in pool.map(partial(digest_layer, given.seed), range(len(chosen)), chosen):
            print("\n".join(lines), flush=True)


def digest_layer(seed: int, index: int, layer: dict[str, str]) -> list[str]:
    torch.set_num_threads(1)
    dtype = DTYPES[index % len(DTYPES)]
    return [
        f"{index} {kind} {plan}: {_digest(problem, plan)}"
        for kind in ("integers", "normal")
        for problem in (_problem(layer, dtype, kind, seed + index),)
        for plan in _plan_of_each_kernel(problem)
    ]


def _problem(layer: dict[str, str], dtype: torch.dtype, kind: str, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    cin, cout, r, s, groups = (int(layer[name]) for name in ("cin", "cout", "kh", "kw", "groups"))
    stride, padding, dilation = (
        (int(layer[f"{name}_h"]), int(layer[f"{name}_w"])) for name in ("stride", "pad", "dil")
    )
    extents = [step * (taps - 1) + 1 for taps, step in zip((r, s), dilation, strict=True)]
    h, w = (
        min(int(layer[name]), max(LARGEST_IMAGE, extent - 2 * pad))
        for name, extent, pad in zip(("h", "w"), extents, padding, strict=True)
    )

    def draw(*size: int) -> torch.Tensor:
        if kind == "integers":
            return torch.randint(-2, 3, size, generator=generator).to(dtype)
        return torch.randn(size, generator=generator).to(dtype)

    act = "relu" if kind == "integers" else list(ACTIVATIONS)[seed % len(ACTIVATIONS)]
    problem = Problem(
        x=channels_last(draw(1, cin, h, w)),
        weight=channels_last(draw(cout, cin // groups, r, s)),
        bias=draw(cout) if layer["conv_bias"] == "1" else None,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        act=act,
        act_params=ACTIVATIONS[act],
    )
    if layer["norm"] != "none":
        problem = problem.replace(
            norm_weight=torch.tensor([0.5, 1.0, 2.0])[torch.arange(cout) % 3],
            norm_bias=draw(cout).float(),
            running_mean=draw(cout).float(),
            running_var=torch.tensor([0.25, 1.0, 4.0])[torch.arange(cout) % 3],
            eps=0.0,
        )
    if layer["residual"] != "none":
        p, q = (
            (size + 2 * pad - extent) // step + 1
            for size, pad, extent, step in zip((h, w), padding, extents, stride, strict=True)
        )
        residual = channels_last(draw(1, cout, p, q))
        problem = problem.replace(residual=residual, residual_order=layer["residual"])
    return problem


def _plan_of_each_kernel(problem: Problem) -> Iterator[str]:
    """The plan that would be chosen, then the best of every other kernel."""
    k, *taps = problem.weight.shape
    products = k * problem.x.shape[2] * problem.x.shape[3] * torch.Size(taps).numel()
    seen = set()
    for plan in list_plans(
        problem.x,
        problem.weight,
        stride=problem.stride,
        padding=problem.padding,
        dilation=problem.dilation,
        groups=problem.groups,
        allow_tf32=problem.x.dtype == torch.float32,
    ):
        kernel = plan.split()[0]
        if kernel not in seen and not (kernel == "direct" and products > SLOW_PRODUCTS):
            yield plan
        seen.add(kernel)


def _digest(problem: Problem, plan: str) -> str:
    allow_tf32 = problem.x.dtype == torch.float32
    result = problem.call(simt.conv_norm_act, plan=plan, allow_tf32=allow_tf32)
    return hashlib.sha256(result.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main()
