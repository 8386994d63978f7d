"""The calls: which steps, in which order, for how long at most."""

from __future__ import annotations

from dataclasses import dataclass

# What the calls ask of the bench.
LAYERS = ("bench", "layers", "--suite", "networks", "--no-compile", "--budget", "{seconds}")
MODELS = ("bench", "models", "--batch", "32", "--no-compile", "--budget", "{seconds}")


@dataclass(frozen=True)
class Step:
    """A Python module with its arguments, run for `limit` seconds at most.

    In the arguments {result} stands for the file that the step writes its JSON to, {out} for the folder of
    the call, {before} for the JSON of the call before, {seconds} for when the step should end by itself.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    least: float = 0.0
    """Not started with less time than that."""
    needs_kernels: bool = True
    tail: int = 0
    """How many of its last lines the summary repeats."""


@dataclass(frozen=True)
class Call:
    seconds: float
    steps: tuple[Step, ...]


USABLE = Step("extension", ("tests.gpu.extension", "{result}"), 90, needs_kernels=False)
BUILT = Step("extension", ("tests.gpu.extension", "{result}", "--build"), 300, needs_kernels=False)

CALLS = {
    "first": Call(
        330,
        (
            USABLE,
            Step("plans", ("tests.gpu.plans", "{result}", "{seconds}"), 95),
            Step("tests", ("tests.gpu.suite", "{result}"), 110),
            Step("probes", ("tests.gpu.probes", "{result}"), 80),
            Step("times", ("tests.gpu.times", "{result}", "{seconds}", "resnet50:32"), 85, least=20),
            Step("networks", ("tests.gpu.networks", "{result}", "{seconds}"), 90, least=15),
        ),
    ),
    "second": Call(
        480,
        (
            USABLE,
            Step("plans", ("tests.gpu.plans", "{result}", "{seconds}", "--again", "{before}"), 30),
            Step("tests", ("tests.gpu.suite", "{result}", "--again", "{before}"), 30),
            Step(
                "times",
                (
                    *("tests.gpu.times", "{result}", "{seconds}"),
                    *("mobilenet_v2:32", "efficientnet_b0:32", "resnet50:1"),
                ),
                130,
            ),
            Step("layers", (*LAYERS, "--dtype", "fp16", "--batch", "32", "--out", "{out}"), 140, tail=16),
            Step("models", (*MODELS, "--out", "{out}"), 130, tail=16),
            Step("memcheck", ("tests.gpu.sanitize", "{seconds}", "memcheck"), 120, least=90, tail=6),
        ),
    ),
    "third": Call(
        300,
        (
            USABLE,
            Step("racecheck", ("tests.gpu.sanitize", "{seconds}", "racecheck"), 90, tail=6),
            Step(
                "batches",
                (*LAYERS, "--dtype", "fp16", "--batch", "1,128", "--out", "{out}/batches"),
                100,
                tail=16,
            ),
            Step(
                "dtypes",
                (*LAYERS, "--dtype", "bf16,tf32,fp32", "--batch", "32", "--out", "{out}/dtypes"),
                100,
                tail=16,
            ),
        ),
    ),
    "build": Call(470, (BUILT,)),
    "test": Call(470, (BUILT, Step("tests", ("tests.gpu.suite", "{result}"), 470))),
    "sanitize": Call(470, (BUILT, Step("sanitize", ("tests.gpu.sanitize", "{seconds}"), 470, tail=40))),
    "profile": Call(470, (BUILT, Step("profile", ("tests.gpu.profile", "{out}", "{seconds}"), 170, tail=4))),
    "bench": Call(
        470,
        (
            BUILT,
            Step(
                "bench",
                (
                    *("bench", "--device", "cuda", "--without", "max-autotune"),
                    *("--budget", "{seconds}", "--out", "{out}"),
                ),
                470,
                tail=40,
            ),
        ),
    ),
}
