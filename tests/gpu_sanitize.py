"""Every kernel under compute-sanitizer's four tools, on a GPU: ``python -m tests.gpu_sanitize``.

Prints "unavailable" and succeeds where compute-sanitizer is missing or refuses the machine; fails on any
other trouble, with what the tool printed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SECONDS_PER_TOOL = 100
PROBE = "import torch; assert torch.ones(8).cuda().cpu().sum() == 8"


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, in CUDA_HOME, or where toolkits are usually installed."""
    folders = [
        os.environ.get("PATH", ""),
        os.path.join(os.environ.get("CUDA_HOME", ""), "bin"),
        "/usr/local/cuda/bin",
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and output; 124 where it ran out of time."""
    # Without torch's cache every tensor is an allocation of its own, and no overrun lands in a neighbour.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            timeout=SECONDS_PER_TOOL,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        return 124, f"{output}\nnot done after {SECONDS_PER_TOOL} seconds"
    return done.returncode, done.stdout.decode(errors="replace")


def check_kernels() -> int:
    """Runs every instantiation of every kernel on the GPU, and kernels that write into a slice.

    The results are compared bit for bit, on the CPU.

    Returns:
        How many are wrong.
    """
    import torch
    from torch import Tensor

    import fused_cna
    from tests.kernel_cases import plans_of_every_kernel, run_on_gpu
    from tests.reference import DTYPES, Problem, Wanted, difference, expected_rounded, integer_problem
    from tests.shapes import TELLING_SHAPES

    fused_cna.config.strict = True

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

    checked = wrong = 0
    slices = [
        integer_problem(shape, dtype, Wanted("relu", residual_order="add_act"))
        for shape in TELLING_SHAPES
        for dtype in DTYPES
    ]
    for problem, plan in [*plans_of_every_kernel(), *((problem, "in a slice") for problem in slices)]:
        why = run_in_slice(problem) if plan == "in a slice" else run_on_gpu(problem, plan)
        checked += 1
        if why:
            wrong += 1
            print(
                f"{plan}, x {list(problem.x.shape)}, weight {list(problem.weight.shape)}: {why}", flush=True
            )
    torch.cuda.synchronize()
    print(f"{checked} plans and slices run, {wrong} of them wrong")
    return wrong


def main() -> int:
    status, output = run([sys.executable, "-c", PROBE])
    if status != 0:
        print(f"torch cannot use a GPU here:\n{output}")
        return 1
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("unavailable: there is no compute-sanitizer on PATH, in CUDA_HOME or in /usr/local/cuda")
        return 0
    status, output = run([sanitizer, sys.executable, "-c", PROBE])
    if status != 0:
        print(f"unavailable: compute-sanitizer refuses this machine:\n{output[-2000:]}")
        return 0
    failed = []
    for tool in TOOLS:
        start = time.monotonic()
        options = [
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            "--report-api-errors",
            "no",
            "--print-limit",
            "20",
        ]
        status, output = run([sanitizer, *options, sys.executable, "-m", "tests.gpu_sanitize", "kernels"])
        print(
            f"== {tool}: {'failed' if status else 'passed'} in {time.monotonic() - start:.0f} s",
            output[-8000:],
            sep="\n",
        )
        if status != 0:
            failed.append(tool)
    print(f"failed: {', '.join(failed)}" if failed else f"passed: {', '.join(TOOLS)}")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["kernels"]:
        sys.exit(min(check_kernels(), 1))
    else:
        sys.exit(main())
