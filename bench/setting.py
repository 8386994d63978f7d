"""What all jobs of the bench share: device, precisions, sizes, effort, and the time that is left."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import fused_cna
from fused_cna.ops import device_obstacle

LAYER_BATCHES = (1, 8, 32, 128)


@dataclass(frozen=True)
class Precision:
    """A storage type and, for float32, how a GPU multiplies it: "tf32" or "ieee"."""

    name: str
    dtype: torch.dtype
    float32_products: str | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        """PyTorch's switches, which every route follows, set for the time inside."""
        if self.float32_products is None:
            yield
            return
        before = [switch.fp32_precision for switch in _switches()]
        _set_switches([self.float32_products] * len(before))
        try:
            yield
        finally:
            _set_switches(before)


def _switches() -> tuple[Any, Any, Any]:
    return torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul


def _set_switches(precisions: Sequence[str]) -> None:
    """Of convolutions, RNNs and matrix products, and the older switches with them.

    Where all of cuDNN's do not agree, whoever reads `allow_tf32`, as inductor does, gets an error.
    """
    torch.backends.cudnn.allow_tf32 = precisions[0] == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = precisions[2] == "tf32"
    # Last, as the older switches have set them too.
    for switch, precision in zip(_switches(), precisions, strict=True):
        switch.fp32_precision = precision


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp16", torch.float16),
        Precision("bf16", torch.bfloat16),
        Precision("tf32", torch.float32, "tf32"),
        Precision("fp32", torch.float32, "ieee"),
    )
}


@dataclass(frozen=True)
class Effort:
    """How often things are repeated: `rounds` samples of each route, each about `sample_seconds` long.

    On a slow or busy machine fewer rounds are made, so that all samples of a layer take about
    `layer_limit_seconds` and those of a network about `network_limit_seconds`.
    """

    rounds: int
    sample_seconds: float
    layer_limit_seconds: float = 3.0
    network_limit_seconds: float = 20.0


@dataclass
class Budget:
    """Time that may be spent, in seconds; None is no limit. Who interrupts the run ends it."""

    seconds: float | None
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)
    interrupted: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    def allows(self, keep: float = 0.0) -> bool:
        """Whether more work may start with `keep` seconds to be left over."""
        if self.interrupted:
            return False
        return self.seconds is None or self.clock() - self.start < self.seconds - keep

    @property
    def why_not(self) -> str:
        """Why no more work may start."""
        return (
            "the run was interrupted" if self.interrupted else f"the budget of {self.seconds:g} s was spent"
        )


@dataclass(frozen=True)
class Setting:
    """One run of the bench. Jobs that take one precision and one batch take the first of each.

    `batches` is empty where none was asked for, and each job has a default of its own; so is `networks`,
    those of the job models. Without `compiled` no network is compiled; `max_autotune` adds the route that
    compiles so.
    """

    device: torch.device
    precisions: tuple[Precision, ...]
    suites: tuple[str, ...]
    batches: tuple[int, ...]
    effort: Effort
    budget: Budget
    seed: int
    networks: tuple[str, ...] = ()
    compiled: bool = True
    max_autotune: bool = False

    @property
    def precision(self) -> Precision:
        return self.precisions[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype

    def batch_or(self, on_cpu: int, on_gpu: int) -> int:
        """The first batch asked for, else the job's own default for this kind of device."""
        if self.batches:
            return self.batches[0]
        return on_gpu if self.device.type == "cuda" else on_cpu

    @property
    def layer_batches(self) -> tuple[int, ...]:
        """The batches of the layers job: those asked for, else all on a GPU and 1 on a CPU."""
        return self.batches or (LAYER_BATCHES if self.device.type == "cuda" else (1,))


def default_effort(device: torch.device) -> Effort:
    """On a CPU there is no kernel to measure, so little time is spent."""
    if device.type == "cuda":
        return Effort(rounds=15, sample_seconds=2e-3)
    return Effort(rounds=9, sample_seconds=2e-3, layer_limit_seconds=0.3)


@dataclass(frozen=True)
class FusedPath:
    """Whether the fused route runs kernels of its own on a device, and a line that says so."""

    kernels: bool
    line: str


def fused_path(device: torch.device) -> FusedPath:
    """What is timed as 'fused' on this device."""
    if device.type != "cuda":
        return FusedPath(
            False,
            "On a CPU 'fused' is the eager fallback: the same PyTorch operations, so no speed-up is to be "
            "expected but of networks that are 'fused frozen'. On a GPU this run would time the CUDA kernels "
            "against every cuDNN route.",
        )
    info = fused_cna.build_info()
    if not info["available"]:
        return FusedPath(
            False, f"There is no CUDA extension, so 'fused' is the eager fallback: {info['reason']}"
        )
    obstacle = device_obstacle(device.index or 0)
    if obstacle:
        return FusedPath(False, f"'fused' is the eager fallback: {obstacle}")
    return FusedPath(True, f"On this GPU 'fused' runs the CUDA kernels: {', '.join(info['kernels'])}.")
