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


def check_kernels() -> None:
    """Runs every shape in every dtype on the GPU, and every instantiation of the tensor-core kernel.

    The results are compared bit for bit. All but the convolutions is computed on the CPU and copied, so that
    the tool sees only these kernels.
    """
    import torch

    import fused_cna
    from fused_cna import _extension
    from tests.reference import DTYPES, Problem, Wanted, expected_rounded, integer_problem
    from tests.shapes import SHAPES
    from tests.test_simt_implicit_gemm import LARGER, tensor_core_plans, without_split
    from tests.test_stem_kernel import STEMS, stem_plans

    fused_cna.config.strict = True
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    extension = _extension.module()
    wanted = Wanted(act="relu", residual_order="add_act")

    def check(problem: Problem, layout: torch.memory_format, plan: str) -> None:
        placed = problem.map(
            lambda tensor: (tensor.contiguous(memory_format=layout) if tensor.dim() == 4 else tensor).cuda()
        )
        extension.force_plan(plan)
        with torch.inference_mode():
            actual = placed.call(fused_cna.conv_norm_act).cpu()
        assert torch.equal(actual, expected_rounded(problem)), (
            f"{problem.x.shape} {layout} {plan}: wrong result"
        )

    for shape in SHAPES:
        for dtype in DTYPES:
            problem = integer_problem(shape, dtype, wanted)
            check(problem, torch.contiguous_format, "direct")
            check(problem, torch.channels_last, "")
    instantiations = set()
    for shape in LARGER:
        for dtype in DTYPES:
            problem = integer_problem(shape, dtype, wanted)
            dense = problem.map(
                lambda tensor: (
                    tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
                )
            )
            # one plan for each instantiation, the one with the most splits
            plans = {without_split(plan): plan for plan in reversed(tensor_core_plans(dense))}
            new = {(dtype, kind): plan for kind, plan in plans.items() if (dtype, kind) not in instantiations}
            for plan in new.values():
                check(problem, torch.channels_last, plan)
            instantiations |= set(new)
    for shape in STEMS:
        for dtype in DTYPES:
            problem = integer_problem(shape, dtype, wanted)
            for layout in (torch.contiguous_format, torch.channels_last):
                # every tile on one shape, on the others the plan's choice
                for plan in stem_plans(problem) if shape is STEMS[1] else ("stem",):
                    check(problem, layout, plan)
    extension.force_plan("")
    torch.cuda.synchronize()
    print(
        f"{len(SHAPES)} shapes, {len(DTYPES)} dtypes, {len(instantiations)} tensor-core kernels: bit for bit"
    )


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
        check_kernels()
    else:
        sys.exit(main())
