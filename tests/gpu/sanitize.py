"""Every kernel under compute-sanitizer's tools: ``python -m tests.gpu.sanitize SECONDS [TOOL ...]``.

All four tools by default, which share the time. Fails where a tool finds anything, a result is wrong, or
compute-sanitizer is missing, unless ``--optional``.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
OPTIONS = ("--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20")

STARTUP = 30.0
"""Seconds that are left to a tool to start and to end."""


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, beside nvcc, in CUDA_HOME, or where toolkits usually are."""
    nvcc = shutil.which("nvcc")
    folders = [
        os.environ.get("PATH", ""),
        *([str(Path(nvcc).resolve().parent)] if nvcc else []),
        os.path.join(os.environ.get("CUDA_HOME", ""), "bin"),
        "/usr/local/cuda/bin",
    ]
    return shutil.which(name, path=os.pathsep.join(folders))


def in_rounds(kinds: Sequence[object]) -> list[int]:
    """The indices of all, by chance, but the first of each kind before the second of any."""
    shuffled, seen = random.Random(0).sample(range(len(kinds)), len(kinds)), Counter[object]()
    rounds = {}
    for index in shuffled:
        rounds[index] = seen[kinds[index]]
        seen[kinds[index]] += 1
    return sorted(shuffled, key=rounds.__getitem__)


def run_cases(seconds: float) -> int:
    """Runs the kernels' plans on the GPU until the time is over, one of each instantiation first.

    And kernels that write into a slice of what they read. The results are compared bit for bit, on the CPU.
    Returns how many are wrong.
    """
    import torch
    from torch import Tensor

    import fused_cna
    from tests.families import FAMILIES, plans_of_every_kernel
    from tests.gpu.plans import run_on_gpu
    from tests.plans import describe
    from tests.reference import DTYPES, Problem, Wanted, difference, expected_rounded, integer_problem
    from tests.shapes import TELLING_SHAPES

    fused_cna.config.strict = True
    end = time.monotonic() + seconds

    def run_in_slice(problem: Problem) -> str:
        """Adds to a channel slice what is computed from another slice of the same tensor."""
        expected = expected_rounded(problem)
        c, h, w = problem.x.shape[1:]
        n, k, p, q = expected.shape
        big = torch.zeros(n, max(h, p), max(w, q), c + k + 3, dtype=expected.dtype).permute(0, 3, 1, 2)
        big[:, :c, :h, :w] = problem.x
        big[:, c + 1 : c + 1 + k, :p, :q] = problem.residual
        placed, big = problem.map(Tensor.cuda), big.cuda()
        out = big[:, c + 1 : c + 1 + k, :p, :q]
        with torch.inference_mode():
            placed.replace(x=big[:, :c, :h, :w], residual=out).call(fused_cna.conv_norm_act, out=out)
        return difference(out.cpu(), expected)

    def cases() -> Iterator[tuple[object, str, partial[str]]]:
        for problem, plan in plans_of_every_kernel():
            family = next(one for one in FAMILIES if one.name == (plan.partition(" ")[0] or "chosen"))
            kind = family.name, problem.x.dtype, family.instantiation(plan)
            yield kind, describe(plan, problem.x, problem.weight), partial(run_on_gpu, problem, plan)
        for shape in TELLING_SHAPES:
            for dtype in DTYPES:
                problem = integer_problem(shape, dtype, Wanted("relu", residual_order="add_act"))
                yield "in a slice", f"in a slice: {shape} {dtype}", partial(run_in_slice, problem)

    todo = list(cases())
    done, wrong = [], 0
    for index in in_rounds([kind for kind, _, _ in todo]):
        if time.monotonic() > end:
            break
        kind, name, run = todo[index]
        if why := run():
            wrong += 1
            print(f"{name}: {why}", flush=True)
        done.append(kind)
    torch.cuda.synchronize()
    kinds = f"{len(set(done))} of {len({kind for kind, _, _ in todo})} instantiations"
    print(f"{len(done)} of {len(todo)} plans and slices run, {kinds}, {wrong} wrong")
    return wrong


def run_tool(sanitizer: str, tool: str, seconds: float) -> int:
    """Its exit status; 124 where it ran out of time."""
    # Without torch's cache every tensor is an allocation of its own, and no overrun lands in a neighbour.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    cases = [sys.executable, "-m", __spec__.name, f"{max(seconds - STARTUP, 5):.0f}", "--cases"]
    try:
        command = [sanitizer, "--tool", tool, *OPTIONS, *cases]
        return subprocess.run(command, env=environment, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"{tool}: not done after {seconds:.0f} s")
        return 124


def main() -> int:
    made = argparse.ArgumentParser()
    made.add_argument("seconds", type=float)
    made.add_argument("tools", nargs="*", metavar="TOOL", help=f"of {', '.join(TOOLS)}")
    made.add_argument("--optional", action="store_true", help="succeed where compute-sanitizer is missing")
    made.add_argument("--cases", action="store_true", help="run the kernels themselves, without a tool")
    options = made.parse_args()
    if options.cases:
        return int(run_cases(options.seconds) > 0)
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        print("there is no compute-sanitizer on PATH, beside nvcc, in CUDA_HOME or in /usr/local/cuda")
        return int(not options.optional)
    end, failed = time.monotonic() + options.seconds, []
    tools = options.tools or TOOLS
    for index, tool in enumerate(tools):
        print(f"== {tool}", flush=True)
        start = time.monotonic()
        status = run_tool(sanitizer, tool, (end - start) / (len(tools) - index))
        print(f"{tool}: status {status} after {time.monotonic() - start:.0f} s", flush=True)
        failed += [tool] * (status != 0)
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(tools)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
