"""What all jobs of the bench share: device, dtype, sizes, effort, and the time that is left."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import fused_cna

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOWEST_CAPABILITY = (8, 0)


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
    """Time that may be spent, in seconds; None is no limit. `keep` is held back for what comes later."""

    seconds: float | None
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    def allows(self, keep: float = 0.0) -> bool:
        """Whether more work may start with `keep` seconds to be left over."""
        return self.seconds is None or self.clock() - self.start < self.seconds - keep


@dataclass(frozen=True)
class Setting:
    """One run of the bench."""

    device: torch.device
    dtype: torch.dtype
    suite: str
    batch: int | None
    effort: Effort
    budget: Budget
    seed: int

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype is self.dtype)

    def batch_or(self, on_cpu: int, on_gpu: int) -> int:
        """The batch asked for, else the job's own default for this kind of device."""
        if self.batch is not None:
            return self.batch
        return on_gpu if self.device.type == "cuda" else on_cpu


def default_effort(device: torch.device) -> Effort:
    return Effort(rounds=15, sample_seconds=2e-3 if device.type == "cuda" else 6e-3)


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
            "expected. On a GPU this run would time the CUDA kernels against every cuDNN route.",
        )
    info = fused_cna.build_info()
    capability = torch.cuda.get_device_capability(device)
    if not info["available"]:
        return FusedPath(
            False, f"There is no CUDA extension, so 'fused' is the eager fallback: {info['reason']}"
        )
    if capability < LOWEST_CAPABILITY:
        return FusedPath(
            False,
            f"The kernels need sm_80, this GPU is sm_{capability[0]}{capability[1]}: the eager fallback.",
        )
    return FusedPath(True, f"On this GPU 'fused' runs the CUDA kernels: {', '.join(info['kernels'])}.")
