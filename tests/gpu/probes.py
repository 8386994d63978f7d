"""What only a GPU answers, each in a line of text and in numbers: ``python -m tests.gpu.probes RESULT``."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import fused_cna
from fused_cna.eager import conv_norm_act
from tests.gpu.early_start import early_starts
from tests.gpu.evidence import write_json
from tests.gpu.hopper import hopper
from tests.gpu.l2 import Reading
from tests.reference import Problem, Wanted, random_problem
from tests.shapes import ConvShape

Answer = dict[str, Any]


def seconds_of(call: Callable[[], object], times: int = 7) -> float:
    """The median of single calls, between events."""
    call()
    taken = []
    for _ in range(times):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return median(taken)


def copy_bandwidth() -> Answer:
    """Bytes read and written by a copy far larger than the L2."""
    size = min(1 << 30, torch.cuda.get_device_properties(0).total_memory // 8)
    x = torch.zeros(size, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    rate = 2 * size / seconds_of(lambda: y.copy_(x)) / 1e12
    return {
        "tb_per_s": round(rate, 3),
        "text": f"{rate:.2f} TB/s read and written by a copy of {size >> 20} MiB",
    }


def l2_bandwidth() -> Answer:
    """All multiprocessors read the same third of the L2, four programs on each."""
    gpu = torch.cuda.get_device_properties(0)
    reading = Reading.of(gpu.L2_cache_size // 3, 4 * gpu.multi_processor_count)
    seconds = seconds_of(reading.launch)
    counted = reading.sums.tolist()
    assert set(counted) == {float(reading.x.numel())}, (
        f"{reading.x.numel()} ones are counted as {counted[:4]}"
    )
    rate = reading.bytes / seconds / 1e12
    return {
        "tb_per_s": round(rate, 3),
        "text": f"{rate:.2f} TB/s read of {reading.x.nbytes >> 10} KiB in the L2",
    }


def poisoned_addend() -> Answer:
    """Whether a NaN in the memory of cuDNN's output comes through: ATen has cuDNN add 0 x that memory."""
    shape = ConvShape("poisoned", 8, 64, 28, 28, 64, 3, 3, "a middle layer", padding=(1, 1))
    found: dict[str, str] = {}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        problem = random_problem(shape, dtype, Wanted("relu")).map(Tensor.cuda)
        problem = problem.replace(x=problem.x.contiguous(memory_format=torch.channels_last))

        def run(poison: float, problem: Problem = problem) -> Tensor:
            # The allocator gives freed blocks of the same size out again.
            blocks = [torch.full_like(problem.x, poison) for _ in range(8)]
            del blocks
            with fused_cna.forced_plan("cudnn"), torch.inference_mode():
                return problem.call(fused_cna.conv_norm_act)

        right, poisoned = run(0.0), run(float("nan"))
        nan, differ = int(poisoned.isnan().sum()), int((poisoned != right).sum())
        if differ:
            found[str(dtype)] = f"{nan} NaN, {differ} of {right.numel()} values differ"
    return {"came_through": found, "text": f"NaN came through: {found}" if found else "no NaN came through"}


def two_sizes_of_one_kernel() -> Answer:
    """One kernel with less and more shared memory: from two threads, then in a graph behind the other."""
    kernel = "depthwise_toeplitz"
    shapes = [
        ConvShape("less", 4, 96, 56, 56, 96, 7, 7, "one image in a tile", padding=(3, 3), groups=96),
        ConvShape("more", 32, 96, 7, 7, 96, 7, 7, "many images in a tile", padding=(3, 3), groups=96),
    ]
    calls = []
    for shape in shapes:
        problem = random_problem(shape, torch.float16, Wanted("relu")).map(Tensor.cuda)
        calls.append(problem.replace(x=problem.x.contiguous(memory_format=torch.channels_last)))
    failures: list[str] = []

    def run(problem: Problem) -> Tensor:
        with torch.inference_mode():
            return problem.call(fused_cna.conv_norm_act)

    def repeat(problem: Problem, expected: Tensor) -> None:
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                results = [run(problem) for _ in range(200)]
                stream.synchronize()
            wrong = sum(not torch.equal(result, expected) for result in results)
            if wrong:
                failures.append(f"{wrong} of 200 results differ")
        except RuntimeError as error:
            failures.append(str(error).partition("\n")[0])

    with fused_cna.forced_plan(kernel):
        expected = [run(problem) for problem in calls]
        for problem, y in zip(calls, expected, strict=True):
            eager = conv_norm_act(*problem.operator_arguments())
            if float((y.float() - eager.float()).abs().max()) > 0.1 * float(eager.abs().max()):
                failures.append("a first result is far from eager's")
        torch.cuda.synchronize()
        threads = [threading.Thread(target=repeat, args=pair) for pair in zip(calls, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(calls[1])
        run(calls[0])
        graph.replay()
        torch.cuda.synchronize()
        if not torch.equal(captured, expected[1]):
            failures.append("a replay behind the smaller launch differs")
    return {
        "failures": failures,
        "text": "; ".join(failures) or f"two sizes of {kernel} do not disturb each other",
    }


PROBES = (hopper, early_starts, copy_bandwidth, l2_bandwidth, poisoned_addend, two_sizes_of_one_kernel)


def main(result: Path) -> int:
    answers: dict[str, Answer] = {}
    for probe in PROBES:
        start = time.monotonic()
        try:
            answer = probe()
        except Exception as error:  # a probe that fails is an answer too, and the others still count
            answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
            answer["text"] = answer["error"]
        answers[probe.__name__] = answer | {"seconds": round(time.monotonic() - start, 1)}
        print(f"{probe.__name__}: {answer['text']}", flush=True)
        write_json(result, answers)
    return int(any("error" in a or a.get("came_through") or a.get("failures") for a in answers.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
