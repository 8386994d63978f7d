"""Kernels that start while those ahead still run: a chain of every kernel, waited for after each and not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fused_cna
from fused_cna import _extension

CHANNELS = 64
LAYERS = {
    "stem": (3, 3, 1),
    "implicit_gemm_sm90": (CHANNELS, 3, 1),
    "depthwise": (CHANNELS, 3, CHANNELS),
    "implicit_gemm_sm80": (CHANNELS, 1, 1),
    "grouped": (CHANNELS, 3, 8),
    "direct": (CHANNELS, 1, 1),
    "depthwise_toeplitz": (CHANNELS, 5, CHANNELS),
    "small_m": (CHANNELS, 1, 1),
}
"""Channels, filter and groups of a layer for each kernel."""
TIMES = 200


def chain_of_layers() -> list[Callable[[], Tensor]]:
    """Calls that each read what the one ahead wrote: a layer's weight, the layer, the next one's weight."""
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, 3, 8, 8, device="cuda", dtype=torch.float16, generator=generator)
    y, calls = x.contiguous(memory_format=torch.channels_last), []
    for kernel, (channels, filter_size, groups) in LAYERS.items():
        values = channels // groups * filter_size**2
        trained = y.new_empty(CHANNELS, values, 1, 1).normal_(0, values**-0.5, generator=generator)
        rows = torch.empty_like(trained)
        weight = rows.view(CHANNELS, filter_size, filter_size, -1).permute(0, 3, 1, 2)
        out = y.new_empty(1, CHANNELS, 8, 8).contiguous(memory_format=torch.channels_last)
        mean, var = (torch.full((CHANNELS,), value, device="cuda") for value in (0.0, 1.0))
        norm: dict[str, Any] = {"running_mean": mean, "running_var": var}
        options = norm | {"padding": filter_size // 2, "groups": groups, "act": "relu"}
        if kernel == "grouped":
            # One behind a copy, which a graph has as a node of another kind.
            copied = torch.empty_like(y)
            calls.append(partial(copied.copy_, y))
            y = copied
        if y.shape == out.shape:
            options["residual"] = y
        ones = y.new_ones(values, 1, 1, 1)
        calls.append(partial(by, "direct", trained, ones, groups=values, out=rows))
        calls.append(partial(by, kernel, y, weight, out=out, **options))
        y = out
    return calls


def by(kernel: str, *args: Tensor, **options: Any) -> Tensor:
    with fused_cna.forced_plan(kernel):
        return fused_cna.conv_norm_act(*args, **options)


def early_starts() -> dict[str, Any]:
    """Whether a chain computes the same when its kernels overlap, launched or in a graph; what that saves."""
    extension = _extension.module()
    calls, failures, microseconds = chain_of_layers(), [], {}

    def run() -> Tensor:
        return [call() for call in calls][-1]

    with torch.inference_mode():
        for call in calls:
            expected = call()
            torch.cuda.synchronize()
        expected = expected.clone()
        for early in (False, True):
            before = extension.allow_early_starts(early)
            try:
                results = [run().clone() for _ in range(TIMES)]
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    last = run()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                graph.replay()
                start.record()
                for _ in range(TIMES):
                    graph.replay()
                end.record()
                end.synchronize()
            finally:
                extension.allow_early_starts(before)
            microseconds[early] = start.elapsed_time(end) * 1e3 / TIMES / len(calls)
            wrong = sum(not torch.equal(result, expected) for result in [*results, last])
            if wrong:
                failures.append(f"{wrong} of {TIMES + 1} chains differ with early starts {early}")
    saved = f"{microseconds[False]:.2f} us a kernel in a graph, {microseconds[True]:.2f} with early starts"
    return {
        "failures": failures,
        "us": microseconds[True],
        "us_without": microseconds[False],
        "text": "; ".join([*failures, saved]),
    }
